package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/testenv"
	"outbox-relay/migrations"
	"outbox-relay/outbox"
	"outbox-relay/outbox/event"
	"outbox-relay/sink"
)

// house is a migrated database with a housekeeper whose relay streams.
type house struct {
	*testing.T
	*housekeeper
	url      string
	sql      *pgx.Conn
	limits   *fakeLimits
	logged   *logged
	registry *prometheus.Registry
}

// fakeLimits lets everything be sent but what is too large.
type fakeLimits struct {
	tooLarge map[string]bool
	asked    int
	looked   []string
	err      error
}

func (l *fakeLimits) Refresh(context.Context) error {
	l.asked++
	return l.err
}

func (l *fakeLimits) Fits(e *event.Event) error {
	l.looked = append(l.looked, string(e.ID))
	if l.tooLarge[string(e.ID)] {
		return &sink.RejectedError{Reason: "too large"}
	}
	return nil
}

// logged keeps what is logged. Safe for concurrent use.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) count(part string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), part)
}

func newHouse(t *testing.T, keeping Housekeeping) *house {
	t.Helper()
	return newHouseOn(t, testenv.Postgres(t), keeping, "")
}

// newHouseOn runs some SQL before it migrates. Where that makes the outbox, or rows are
// removed and counted, the outbox has no history.
func newHouseOn(t *testing.T, cluster *pgserver.Cluster, keeping Housekeeping, before string) *house {
	t.Helper()
	database := testenv.SeasonedDatabase
	if before != "" || keeping.Retention > 0 {
		database = testenv.InhabitedDatabase
	}
	h := &house{T: t, url: database(t, cluster), limits: &fakeLimits{tooLarge: map[string]bool{}}, logged: &logged{}}
	config, err := pgx.ParseConfig(h.url)
	h.must(err)
	h.sql, err = pgx.Connect(t.Context(), h.url)
	h.must(err)
	t.Cleanup(func() { h.sql.Close(context.Background()) })
	h.exec(before)
	h.must(migrations.Up(t.Context(), config, migrations.Target{Schema: "public", Table: "events", Publication: "outbox_relay"},
		slog.New(slog.DiscardHandler)))
	h.housekeeper = h.keeper(keeping)
	t.Cleanup(h.close)
	return h
}

// keeper is the housekeeper of another session.
func (h *house) keeper(keeping Housekeeping) *housekeeper {
	h.Helper()
	log := slog.New(slog.NewTextHandler(h.logged, nil))
	h.registry = prometheus.NewRegistry()
	table := outbox.Table{Schema: "public", Name: "events", Slot: "slot", Mode: outbox.Mark}
	r := New(Config{Postgres: func() (string, error) { return h.url, nil }, Table: table, Housekeeping: keeping}, log,
		NewMetrics(h.registry))
	r.state.Store(Streaming)
	layout, err := table.Inspect(h.Context(), h.sql)
	h.must(err)
	return newHousekeeper(&session{relay: r, table: table, layout: layout, log: log}, h.limits, &sync.Mutex{})
}

func (h *house) must(err error) {
	if err != nil {
		h.Helper()
		h.Fatal(err)
	}
}

func (h *house) exec(sql string, args ...any) {
	h.Helper()
	_, err := h.sql.Exec(h.Context(), sql, args...)
	h.must(err)
}

func (h *house) count(sql string, args ...any) int {
	h.Helper()
	var n int
	h.must(h.sql.QueryRow(h.Context(), `select count(*) from `+sql, args...).Scan(&n))
	return n
}

// insert inserts n events and returns their ids in their order. The ids are no
// ULIDs, which would tell that they are young.
func (h *house) insert(n int) []string {
	h.Helper()
	h.exec(`alter table events disable trigger on_events_create`)
	rows, err := h.sql.Query(h.Context(), `insert into events (id, aggregate_type, event_type, payload, status, created_at)
		select gen_random_uuid(), 'order', 'created', '{}', 'pending', now() from generate_series(1, $1) returning id`, n)
	h.must(err)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	h.must(err)
	slices.Sort(ids)
	return ids
}

// published lets rows have been published so long ago.
func (h *house) published(ago string, ids ...string) {
	h.Helper()
	h.exec(`update events set status = 'published', published_at = now() - $2::text::interval where id = any ($1)`, ids, ago)
}

// failed lets rows have failed so long ago, one a second later than the one
// before, after so many retries.
func (h *house) failed(ago string, retries int, ids ...string) {
	h.Helper()
	for i, id := range ids {
		h.exec(`update events set status = 'failed', failed_at = now() - $2::text::interval + interval '1 s' * $3, retried_attempts = $4
			where id = $1`, id, ago, i, retries)
	}
}

// start runs the housekeeper until the function that it returns, or the test's end.
func (h *house) start() (stop func()) {
	ctx, cancel := context.WithCancel(h.Context())
	ended := make(chan error, 1)
	go func() { ended <- h.run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			h.Errorf("it ended with %v", err)
		}
	})
	h.Cleanup(stop)
	return stop
}

// do lets a chore be done once.
func (h *house) do(chore string) time.Duration {
	h.Helper()
	for _, c := range h.chores {
		if c.name == chore {
			return h.attempt(h.Context(), c)
		}
	}
	h.Fatalf("%s is off", chore)
	return 0
}

// metric returns a counter's value.
func (h *house) metric(name string) float64 {
	h.Helper()
	families, err := h.registry.Gather()
	h.must(err)
	for _, family := range families {
		if family.GetName() == name {
			return family.GetMetric()[0].GetCounter().GetValue()
		}
	}
	h.Fatalf("there is no %s", name)
	return 0
}

// connections counts those of housekeepers.
func (h *house) connections() int {
	h.Helper()
	return h.count(`pg_stat_activity where application_name = 'outbox-relay housekeeper' and datname = current_database()`)
}

func (h *house) eventually(what, sql string, want int, args ...any) {
	h.Helper()
	testenv.Eventually(h, what, func() bool { return h.count(sql, args...) == want })
}

// eventuallyRemoved waits until so many rows were removed and counted: they are gone a
// moment before that, and a housekeeper stopped in between does not know of them.
func (h *house) eventuallyRemoved(want float64) {
	h.Helper()
	testenv.Eventually(h, "rows to be removed and counted", func() bool { return h.metric("outbox_relay_rows_removed_total") == want })
}

func TestNothingToKeep(t *testing.T) {
	t.Parallel()
	h := newHouse(t, Housekeeping{Retries: outbox.Retries{Backoff: time.Minute}})
	h.must(h.run(t.Context()))
	if h.conn != nil || h.connections() != 0 {
		t.Error("it has opened a connection")
	}
}

// Before the relay streams nothing is touched, and no connection opened.
func TestHousekeepingWaitsForStreaming(t *testing.T) {
	t.Parallel()
	h := newHouse(t, Housekeeping{Retention: time.Hour})
	h.published("2 h", h.insert(1)...)
	for _, state := range []State{Starting, Standby, Stopping} {
		h.relay.state.Store(state)
		if rest := h.do("retention"); rest != streamingPause || h.connections() != 0 || h.count(`events`) != 1 {
			t.Errorf("%s: it rests %s, has %d connections, and %d rows are left", state, rest, h.connections(), h.count(`events`))
		}
	}
}

// Several passes; between them rows grow old.
func TestRetention(t *testing.T) {
	t.Parallel()
	h := newHouse(t, Housekeeping{Retention: time.Hour})
	ids := h.insert(2500)
	h.published("2 h", ids[:1200]...)
	h.published("30 min", ids[1200:2000]...)
	h.failed("2 h", 0, ids[2000])
	stop := h.start()
	h.eventuallyRemoved(1200)
	stop()
	h.published("61 min", ids[1900:2000]...)
	h.chores[0].due, h.after = time.Time{}, ""
	stop = h.start()
	h.eventuallyRemoved(1300)
	stop()
	if n := h.count(`events`); n != 1200 {
		t.Errorf("%d rows are left", n)
	}
	if n := h.count(`events where status = 'pending' or status = 'failed' or published_at > now() - interval '1 h'`); n != 1200 {
		t.Errorf("%d of the right rows are left", n)
	}
	if h.logged.count(`rows=1200 older_than=1h0m0s`) != 1 || h.logged.count(`rows=100 older_than`) != 1 {
		t.Errorf("log:\n%s", h.logged.text.String())
	}
	// A backend ends a moment after its client has closed the connection.
	testenv.Eventually(t, "its connection to be gone", func() bool { return h.connections() == 0 })
}

// A lost connection is opened again, and nothing is lost or removed that stays.
func TestHousekeeperLosesItsConnection(t *testing.T) {
	t.Parallel()
	h := newHouse(t, Housekeeping{Retention: time.Second})
	stop := h.start()
	for range 3 {
		h.eventually("a connection", `pg_stat_activity where application_name = 'outbox-relay housekeeper' and datname = current_database()`, 1)
		h.exec(`select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'outbox-relay housekeeper' and datname = current_database()`)
		ids := h.insert(10)
		h.published("1 h", ids[:7]...)
		h.eventually("the old ones to be gone", `events where id = any ($1)`, 3, ids)
	}
	stop()
	if n := h.logged.count("housekeeping waits"); n < 1 || n > 3 {
		t.Errorf("%d lines:\n%s", n, h.logged.text.String())
	}
}

// What does not mend itself is said once, and tried again.
func TestHousekeeperIsRefused(t *testing.T) {
	t.Parallel()
	h := newHouseOn(t, testenv.OwnPostgres(t, nil), Housekeeping{Retention: time.Hour, Retries: outbox.Retries{Attempts: 1, Backoff: time.Second}}, "")
	h.published("2 h", h.insert(1)...)
	h.beWeak()
	for range 3 {
		h.do("retention")
		h.do("retries")
	}
	for _, want := range []string{`chore=retention`, `chore=retries`} {
		if n := h.logged.count(want); n != 1 {
			t.Errorf("%d lines with %s", n, want)
		}
	}
	if h.logged.count("SQLSTATE 42501") != 2 || h.logged.count("deploy/postgres/roles.sql") != 2 {
		t.Errorf("log:\n%s", h.logged.text.String())
	}
	h.exec(`grant usage on schema public to weak; grant select, delete, update (status) on events to weak;
		grant select on outbox_relay_leftovers, outbox_relay_batches to weak`)
	h.do("retention")
	if n := h.count(`events`); n != 0 {
		t.Errorf("%d rows are left", n)
	}
}

// beWeak lets the housekeeper be a role without rights.
func (h *house) beWeak() {
	h.Helper()
	h.exec(`create role weak login`)
	h.url = strings.Replace(h.url, "postgres@", "weak@", 1)
}

// partitioned is an outbox with a partition a month, that of the present month
// being the default one.
const partitioned = `create table events (id text not null, version int not null default 0, aggregate_type text not null, event_type text not null,
		payload jsonb not null, status text not null, published_at timestamptz, failed_at timestamptz, failed_reasons text[],
		failed_attempts int not null default 0, retried_at timestamptz, retried_attempts int not null default 0,
		created_at timestamptz not null, primary key (id, created_at)) partition by range (created_at);
	create table events_now partition of events default;
	create table events_2024_01 partition of events for values from ('2024-01-01') to ('2024-02-01');
	create table events_2024_02 partition of events for values from ('2024-02-01') to ('2024-03-01');
	create table events_2024_03 partition of events for values from ('2024-03-01') to ('2024-04-01')`

// Where time makes partitions, those go that are published as a whole; rows never
// do. The relay owns none of it.
func TestOldPartitionsAreDropped(t *testing.T) {
	t.Parallel()
	h := newHouseOn(t, testenv.OwnPostgres(t, nil), Housekeeping{Retention: time.Hour}, partitioned)
	h.exec(`alter table events disable trigger on_events_create`)
	h.exec(`insert into events (id, aggregate_type, event_type, payload, status, created_at, published_at)
		select i, 'order', 'created', '{}', case i when 2 then 'failed' else 'published' end,
			case i when 4 then now() - interval '2 h' else '2024-01-10'::timestamptz + interval '1 month' * (i - 1) end, now() - interval '2 h'
		from generate_series(1, 4) i`)
	h.beWeak()
	h.exec(`grant usage on schema public to weak; grant execute on function outbox_relay_drop_partitions(regclass, interval) to weak`)
	requireLeft := func(want string) {
		t.Helper()
		var got string
		h.must(h.sql.QueryRow(t.Context(), `select string_agg(inhrelid::regclass::text, ' ' order by inhrelid::regclass::text)
			from pg_inherits where inhparent = 'events'::regclass`).Scan(&got))
		if got != want {
			t.Errorf("left are %s, want %s", got, want)
		}
	}

	reader, err := h.sql.Begin(t.Context()) // has the third in use
	h.must(err)
	_, err = reader.Exec(t.Context(), `lock table events_2024_03 in row exclusive mode`)
	h.must(err)
	h.do("retention")
	h.do("retention")
	h.must(reader.Rollback(t.Context()))
	requireLeft("events_2024_02 events_2024_03 events_now")
	if h.logged.count("partitions=[public.events_2024_01] older_than=1h0m0s") != 1 || h.logged.count("events_2024_03 is in use") != 1 {
		t.Errorf("log:\n%s", h.logged.text.String())
	}

	h.do("retention")
	requireLeft("events_2024_02 events_now")
	h.exec(`update events set status = 'published' where status = 'failed'`)
	h.do("retention")
	requireLeft("events_now")
	if n := h.count(`events`); n != 1 {
		t.Errorf("%d rows are left", n)
	}
	if n := h.metric("outbox_relay_partitions_dropped_total"); n != 3 {
		t.Errorf("%.0f are counted", n)
	}
}

// A table that something else than time partitions loses rows.
func TestRetentionOfHashPartitions(t *testing.T) {
	t.Parallel()
	h := newHouseOn(t, testenv.Postgres(t), Housekeeping{Retention: time.Hour},
		strings.NewReplacer("primary key (id, created_at)", "primary key (id)").Replace(strings.Split(partitioned, " partition by")[0])+` partition by hash (id);
		create table events_0 partition of events for values with (modulus 2, remainder 0);
		create table events_1 partition of events for values with (modulus 2, remainder 1)`)
	ids := h.insert(100)
	h.published("2 h", ids[:50]...)
	h.do("retention")
	if n := h.count(`events`); n != 50 {
		t.Errorf("%d rows are left, want 50", n)
	}
}

// A server that is away is waited for ever longer, and said so once.
func TestHousekeeperWaitsForPostgres(t *testing.T) {
	t.Parallel()
	h := newHouse(t, Housekeeping{Retention: time.Hour, Retries: outbox.Retries{Attempts: 1, Backoff: time.Second}})
	there := h.url
	h.url = fmt.Sprintf("postgres://postgres@127.0.0.1:%d/x?sslmode=disable", testenv.FreePort(t))
	var rests []time.Duration
	for range 4 {
		rests = append(rests, h.do("retention"), h.do("retries"))
	}
	for i, rest := range rests {
		if want := min(time.Minute, time.Second<<i); rest != want {
			t.Errorf("rest %d is %s, want %s", i, rest, want)
		}
	}
	if n := h.logged.count("housekeeping waits"); n != 1 {
		t.Errorf("%d lines:\n%s", n, h.logged.text.String())
	}
	h.url = there
	if rest := h.do("retention"); rest != time.Minute {
		t.Errorf("it rests %s, want the pause between two passes", rest)
	}
}

// Who can be sent is put back to pending with the attempt counted; who can't is
// left, and not read again for a while.
func TestAutomaticRetries(t *testing.T) {
	t.Parallel()
	h := newHouse(t, Housekeeping{Retries: outbox.Retries{Attempts: 3, Backoff: time.Minute}})
	ids := h.insert(6)
	h.failed("2 min", 0, ids[0])
	h.failed("30 s", 0, ids[1])  // too early
	h.failed("3 min", 1, ids[2]) // the second time, after two minutes
	h.failed("1 h", 3, ids[3])   // often enough
	h.failed("1 h", 0, ids[4])   // does not fit
	h.exec(`update events set failed_reasons = '{x}', failed_attempts = 1 where id = any ($1)`, ids)
	h.limits.tooLarge[ids[4]] = true
	h.do("retries")
	state := func() string {
		var s string
		h.must(h.sql.QueryRow(t.Context(), `select string_agg(status || ' ' || retried_attempts, ', ' order by id) from events where id = any ($1)`, ids).Scan(&s))
		return s
	}
	if got, want := state(), "pending 1, failed 0, pending 2, failed 3, failed 0, pending 0"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if want := []string{ids[4], ids[2], ids[0]}; !slices.Equal(h.limits.looked, want) || h.limits.asked != 1 {
		t.Errorf("looked at %q, asked for limits %d times", h.limits.looked, h.limits.asked)
	}
	if n := h.metric("outbox_relay_automatic_retries_total"); n != 2 {
		t.Errorf("%.0f are counted", n)
	}

	// It fails again: the wait doubles from then on.
	h.failed("3 min", 2, ids[0])
	h.do("retries")
	h.failed("241 s", 2, ids[2])
	h.do("retries")
	if got, want := state(), "failed 2, failed 0, pending 3, failed 3, failed 0, pending 0"; got != want {
		t.Errorf("%s, want %s", got, want)
	}

	// The limit is raised: what did not fit is looked at again after a while.
	h.limits.tooLarge = map[string]bool{}
	h.do("retries")
	h.unfit[ids[4]] = time.Now().Add(-unfitPause - time.Second)
	h.do("retries") // forgets it at its end
	h.do("retries")
	if got, want := state(), "failed 2, failed 0, pending 3, failed 3, pending 1, pending 0"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// However many can't be sent, those behind them are reached.
func TestManyFailures(t *testing.T) {
	t.Parallel()
	h := newHouse(t, Housekeeping{Retries: outbox.Retries{Attempts: 1, Backoff: time.Minute}})
	ids := h.insert(3*retryStep + 1)
	h.exec(`update events set status = 'failed', failed_at = now() - interval '1 h' where id = any ($1)`, ids)
	for _, id := range ids[:3*retryStep] {
		h.limits.tooLarge[id] = true
	}
	steps := 1
	for h.do("retries") != between(time.Minute) {
		steps++
	}
	if steps != 4 || h.count(`events where status = 'pending' and id = $1`, ids[3*retryStep]) != 1 {
		t.Errorf("%d steps, %d pending", steps, h.count(`events where status = 'pending'`))
	}
}

// Where the limits are not known nothing is retried.
func TestRetriesWithoutLimits(t *testing.T) {
	t.Parallel()
	h := newHouse(t, Housekeeping{Retries: outbox.Retries{Attempts: 1, Backoff: time.Second}})
	ids := h.insert(1)
	h.failed("1 h", 0, ids...)
	h.limits.err = errors.New("no answer")
	h.do("retries")
	if h.count(`events where status = 'failed' and id = $1`, ids[0]) != 1 || h.logged.count("no answer") != 1 {
		t.Errorf("log:\n%s", h.logged.text.String())
	}
	h.limits.err = nil
	h.do("retries")
	if h.count(`events where status = 'pending'`) != 1 {
		t.Error("it is not retried")
	}
}
