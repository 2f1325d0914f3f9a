package relay_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/testenv"
	"outbox-relay/migrations"
)

// bundle is a test's own database, migrated and seasoned, with its own NATS server.
type bundle struct {
	testing.TB
	cluster *pgserver.Cluster
	url     string
	sql     *pgx.Conn
	nats    *testenv.NATSServer
	nc      *nats.Conn
	js      jetstream.JetStream
	env     map[string]string
	granted map[string]bool // variables whose grants the relay's role has
}

// setup uses the shared Postgres, with a slot named after the test.
func setup(t testing.TB) *bundle {
	t.Helper()
	return setupOn(t, testenv.Postgres(t), testenv.NATSOptions{})
}

func setupOn(t testing.TB, cluster *pgserver.Cluster, options testenv.NATSOptions) *bundle {
	t.Helper()
	b := setupDatabase(t, cluster, testenv.SeasonedDatabase(t, cluster), options)
	b.grant()
	return b
}

// setupFresh is setup with an outbox that never had a row, and nobody beside it.
func setupFresh(t testing.TB) *bundle {
	t.Helper()
	return setupFreshOn(t, testenv.Postgres(t), testenv.NATSOptions{})
}

func setupFreshOn(t testing.TB, cluster *pgserver.Cluster, options testenv.NATSOptions) *bundle {
	t.Helper()
	b := setupDatabase(t, cluster, testenv.Database(t, cluster), options)
	config, err := pgx.ParseConfig(b.url)
	b.must(err)
	b.must(migrations.Up(t.Context(), config, migrations.Target{Schema: "public", Table: "events", Publication: "outbox_relay"},
		slog.New(slog.DiscardHandler)))
	b.grant()
	return b
}

// setupEmpty does not migrate.
func setupEmpty(t testing.TB, cluster *pgserver.Cluster, options testenv.NATSOptions) *bundle {
	t.Helper()
	return setupDatabase(t, cluster, testenv.InhabitedDatabase(t, cluster), options)
}

func setupDatabase(t testing.TB, cluster *pgserver.Cluster, database string, options testenv.NATSOptions) *bundle {
	t.Helper()
	testenv.RelayBinary(t) // compiled before there is any load
	b := &bundle{TB: t, cluster: cluster, url: database, nats: testenv.NATS(t, options), granted: map[string]bool{}}
	b.sql = b.connect()
	b.env = map[string]string{
		"OUTBOX_POSTGRES_URL":  b.url,
		"OUTBOX_SLOT":          b.slot(),
		"OUTBOX_NATS_URL":      b.nats.URL(),
		"OUTBOX_NATS_USER":     testenv.RelayName,
		"OUTBOX_NATS_PASSWORD": testenv.RelayName,
		"OUTBOX_HTTP_ADDR":     "",
		"OUTBOX_LOG_LEVEL":     "debug",
	}
	if !options.NoJetStream {
		b.dial()
	}
	return b
}

// grant gives the relay's role in Postgres what deploy/postgres/roles.sql does.
func (b *bundle) grant() {
	b.Helper()
	testenv.GrantRoles(b, b.url, slices.Collect(maps.Keys(b.granted))...)
}

// asRelay lets a relay that would run as anybody run as the role and the user
// that deploy/ has for it: these are for its own names of table, stream and subjects.
func (b *bundle) asRelay(env map[string]string) map[string]string {
	b.Helper()
	if env["OUTBOX_SUBJECT"] != "" || env["OUTBOX_STREAM"] != "" {
		delete(env, "OUTBOX_NATS_USER")
		delete(env, "OUTBOX_NATS_PASSWORD")
	}
	if env["OUTBOX_TABLE"] != "" || env["OUTBOX_POSTGRES_URL"] == "" {
		return env
	}
	before := len(b.granted)
	for name, value := range env {
		if name == "OUTBOX_RETENTION" || name == "OUTBOX_RETRY_ATTEMPTS" || name+"="+value == "OUTBOX_AFTER_PUBLISH=delete" {
			b.granted[name] = true
		}
	}
	if len(b.granted) > before {
		b.grant()
	}
	env["OUTBOX_POSTGRES_URL"] = testenv.AsRelay(b, env["OUTBOX_POSTGRES_URL"])
	return env
}

// dial connects the test itself to NATS.
func (b *bundle) dial() {
	var err error
	b.nc, err = nats.Connect(b.nats.URL(), nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond))
	b.must(err)
	b.Cleanup(b.nc.Close)
	b.js, err = jetstream.New(b.nc)
	b.must(err)
}

// source is the header ce-source: a URI reference, whose percent signs are encoded again
// as those of any header are.
// Source: section 3.1.3.2 of CloudEvents' HTTP protocol binding.
func (b *bundle) source() string {
	return "/" + strings.ReplaceAll(url.PathEscape(b.database()), "%", "%25") + "/" + b.slot()
}

// database is the database's name, which needs quotes.
func (b *bundle) database() string {
	config, err := pgx.ParseConfig(b.url)
	b.must(err)
	return config.Database
}

// slot is unique in the cluster, which tests share.
func (b *bundle) slot() string {
	return testenv.SlotName(b, b.url)
}

func (b *bundle) must(err error) {
	if err != nil {
		b.Helper()
		b.Fatal(err)
	}
}

// connect opens a connection of the application.
func (b *bundle) connect() *pgx.Conn {
	b.Helper()
	conn, err := pgx.Connect(b.Context(), b.url)
	b.must(err)
	b.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func (b *bundle) exec(sql string, args ...any) {
	b.Helper()
	_, err := b.sql.Exec(b.Context(), sql, args...)
	b.must(err)
}

// dropSlot drops the slot of a relay that has ended: Postgres may not know it yet.
func (b *bundle) dropSlot() {
	b.Helper()
	testenv.Eventually(b, "the slot to be free", func() bool {
		return b.count(`select count(*) from pg_replication_slots where slot_name = $1 and active`, b.slot()) == 0
	})
	b.exec(`select pg_drop_replication_slot($1)`, b.slot())
}

// start starts the relay, with variables that change its environment.
func (b *bundle) start(changes ...string) *testenv.Relay {
	b.Helper()
	return testenv.StartRelay(b, b.asRelay(b.with(changes...)))
}

// streaming starts the relay and waits until it streams.
func (b *bundle) streaming(changes ...string) *testenv.Relay {
	b.Helper()
	r := b.start(changes...)
	r.WaitLog("msg=streaming")
	return r
}

func (b *bundle) with(changes ...string) map[string]string {
	env := map[string]string{}
	for name, value := range b.env {
		env[name] = value
	}
	for _, change := range changes {
		name, value, _ := strings.Cut(change, "=")
		env["OUTBOX_"+name] = value
	}
	return env
}

// forgetFailures takes the failed rows out of the history, for a test that asks for
// all failed rows.
func (b *bundle) forgetFailures() {
	b.Helper()
	b.exec(`delete from events where status = 'failed'`)
}

// insert inserts n events in one statement and returns their ids in order.
func (b *bundle) insert(n int) []string {
	b.Helper()
	return insert(b, b.sql, n)
}

// querier is a connection or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func insert(b *bundle, q querier, n int) []string {
	b.Helper()
	rows, err := q.Query(b.Context(), `insert into events (aggregate_type, event_type, payload)
		select 'order', 'created', jsonb_build_object('n', i) from generate_series(1, $1) i returning id`, n)
	b.must(err)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	b.must(err)
	return ids
}

// message is one message of the stream.
type message struct {
	*jetstream.RawStreamMsg
	id string
}

// messages reads the whole stream.
func (b *bundle) messages() []message {
	b.Helper()
	stream, err := b.js.Stream(b.Context(), "EVENTS")
	if err != nil {
		return nil
	}
	state := stream.CachedInfo().State
	all := make([]message, state.LastSeq+1) // by sequence
	var readers errgroup.Group
	readers.SetLimit(64)
	for seq := max(1, state.FirstSeq); seq <= state.LastSeq; seq++ {
		readers.Go(func() error {
			raw, err := stream.GetMsg(b.Context(), seq)
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				return nil
			}
			if err == nil {
				all[seq] = message{raw, raw.Header.Get("Nats-Msg-Id")}
			}
			return err
		})
	}
	b.must(readers.Wait())
	return slices.DeleteFunc(all, func(m message) bool { return m.RawStreamMsg == nil })
}

func (b *bundle) last() uint64 {
	stream, err := b.js.Stream(b.Context(), "EVENTS")
	if err != nil {
		return 0
	}
	return stream.CachedInfo().State.LastSeq
}

// requireStream waits until the stream holds as many messages as want, and
// compares their ids: each exactly once, in that order.
func (b *bundle) requireStream(want []string) []message {
	b.Helper()
	testenv.Eventually(b, fmt.Sprintf("%d messages in the stream", len(want)), func() bool { return b.last() >= uint64(len(want)) })
	messages := b.messages()
	got := make([]string, len(messages))
	for i, m := range messages {
		got[i] = m.id
	}
	if diff := firstDifference(got, want); diff != "" {
		b.Fatal(diff)
	}
	return messages
}

func firstDifference(got, want []string) string {
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			return fmt.Sprintf("message %d of %d has id %s, want %s", i+1, len(got), got[i], want[i])
		}
	}
	if len(got) != len(want) {
		return fmt.Sprintf("the stream has %d messages, want %d", len(got), len(want))
	}
	return ""
}

// requireStatus waits until all these rows have the status.
func (b *bundle) requireStatus(status string, ids []string) {
	b.Helper()
	testenv.Eventually(b, fmt.Sprintf("%d rows %s", len(ids), status), func() bool {
		return b.count(`select count(*) from events where id = any ($1) and status = $2`, ids, status) == len(ids)
	})
}

func (b *bundle) count(sql string, args ...any) int {
	b.Helper()
	var n int
	b.must(b.sql.QueryRow(b.Context(), sql, args...).Scan(&n))
	return n
}

// requireNoRows waits until none of the rows is left.
func (b *bundle) requireNoRows(ids []string) {
	b.Helper()
	testenv.Eventually(b, fmt.Sprintf("%d rows deleted", len(ids)), func() bool {
		return b.count(`select count(*) from events where id = any ($1)`, ids) == 0
	})
}
