package relay_test

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats-server/v2/server"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/testenv"
)

// requireEnd waits until the relay ends by itself with that exit code, having
// said all these words.
func requireEnd(t testing.TB, r *testenv.Relay, code int, words ...string) {
	t.Helper()
	if got := r.Wait(time.Minute); got != code {
		t.Fatalf("exit code %d, want %d", got, code)
	}
	for _, want := range words {
		if !strings.Contains(r.Logs(), want) {
			t.Fatalf("the error does not say %q:\n%s", want, r.Logs())
		}
	}
}

// requireLeaves sends SIGTERM to a relay that waits: a clean stop.
func requireLeaves(t testing.TB, r *testenv.Relay) {
	t.Helper()
	if code := r.Terminate(); code != 0 {
		t.Fatalf("exit code %d of a relay that waited, want 0", code)
	}
}

// migrate runs the command of that name.
func (b *bundle) migrate(changes ...string) {
	b.Helper()
	env := b.with(changes...)
	requireEnd(b, testenv.StartRelay(b, env, "migrate"), 0)
	if env["OUTBOX_TABLE"] == "" {
		b.grant()
	}
}

// requireWorks shows that nothing is in the way any more: the relay starts, and
// delivers what is inserted then.
func (b *bundle) requireWorks(changes ...string) {
	b.Helper()
	r := b.streaming(changes...)
	from := len(b.messages()) // with what was pending
	ids := b.insert(3)
	b.requireStatus("published", ids)
	messages := b.messages()
	if len(messages) != from+3 {
		b.Fatalf("%d messages for 3 events", len(messages)-from)
	}
	for i, m := range messages[from:] {
		if m.id != ids[i] {
			b.Fatalf("message %d has id %s, want %s", i, m.id, ids[i])
		}
	}
	requireLeaves(b, r)
}

func TestFaultsOfVariablesAreToldAllAtOnce(t *testing.T) {
	t.Parallel()
	r := testenv.StartRelay(t, map[string]string{
		"OUTBOX_SLOT":           "Bad-Slot",
		"OUTBOX_TABLE":          "",
		"OUTBOX_MAX_INFLIGHT":   "many",
		"OUTBOX_AFTER_PUBLISH":  "burn",
		"OUTBOX_SHUTDOWN_GRACE": "10",
		"OUTBOX_SUBJECT":        "{event_type}",
		"OUTBOX_NATS_URL":       "http://127.0.0.1",
		"OUTBOX_NATS_CREDS":     "/nowhere/at/all",
		"OUTBOX_NATS_PASSWORD":  "hunter2hunter2",
		"OUTBOX_SLTO":           "shop",
	})
	requireEnd(t, r, 2, "OUTBOX_POSTGRES_URL is", "OUTBOX_SLOT is", "OUTBOX_TABLE is empty", "OUTBOX_MAX_INFLIGHT is", "OUTBOX_AFTER_PUBLISH is",
		"mark", "OUTBOX_SHUTDOWN_GRACE is", "with its unit", "OUTBOX_SUBJECT", "OUTBOX_NATS_URL", "OUTBOX_NATS_CREDS names a file", "OUTBOX_NATS_PASSWORD", "OUTBOX_NATS_USER",
		"OUTBOX_SLTO")
	if strings.Contains(r.Logs(), "hunter2") {
		t.Fatal("the output has the password")
	}
	requireEnd(t, testenv.StartRelay(t, nil, "relay"), 2, "relay", "outbox-relay [run]")
	requireEnd(t, testenv.StartRelay(t, nil, "run", "--fast"), 2, "run: flag provided but not defined: -fast")
}

// A restart with the remedy takes up two-phase transactions too.
func TestWALLevelIsNotLogical(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.OwnPostgres(t, map[string]string{"wal_level": "replica", "max_prepared_transactions": "4"}), testenv.NATSOptions{})
	early := b.insert(1)
	requireEnd(t, b.start(), 1, `wal_level is "replica"`, "ALTER SYSTEM SET wal_level = 'logical'", "restart Postgres")
	b.requireStatus("pending", early)
	b.exec(`alter system set wal_level = 'logical'`)
	b.must(b.cluster.Restart(t.Context()))
	b.sql = b.connect()
	b.streaming()
	prepare := func(name string) []string {
		b.exec(`begin`)
		ids := b.insert(2)
		b.exec(`prepare transaction '` + name + `'`)
		return ids
	}
	kept, dropped := prepare("kept"), prepare("dropped")
	more := b.insert(1)
	b.exec(`rollback prepared 'dropped'`)
	b.exec(`commit prepared 'kept'`)
	b.requireStream(append(append(early, more...), kept...))
	b.requireStatus("published", kept)
	if n := b.count(`select count(*) from events where id = any ($1)`, dropped); n != 0 {
		t.Fatalf("%d rows of a transaction that was rolled back", n)
	}
}

func passwordPostgres(t *testing.T, password string) *pgserver.Cluster {
	t.Helper()
	cluster, err := pgserver.Start(t.Context(), pgserver.Options{Password: password})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cluster.Close(); err != nil {
			t.Error(err)
		}
	})
	return cluster
}

func withPassword(t *testing.T, address, password string) string {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(u.User.Username(), password)
	return u.String()
}

func TestPostgresAwayAndItsPasswordWrong(t *testing.T) {
	t.Parallel()
	b := setupOn(t, passwordPostgres(t, "first-secret"), testenv.NATSOptions{})
	r := b.start("POSTGRES_URL=" + withPassword(t, b.url, "wrong-secret"))
	requireEnd(t, r, 1, "28P01", "check user and password in OUTBOX_POSTGRES_URL")
	if strings.Contains(r.Logs(), "-secret") {
		t.Fatal("the output has the password")
	}

	b.must(b.cluster.Stop(t.Context(), pgserver.Fast))
	r = b.start()
	r.WaitLog("waiting to start again")
	r.WaitLog("OUTBOX_POSTGRES_URL")
	requireLeaves(t, r)

	file := filepath.Join(t.TempDir(), "url")
	b.must(os.WriteFile(file, []byte(b.url), 0o600))
	delete(b.env, "OUTBOX_POSTGRES_URL")
	r = b.start("POSTGRES_URL_FILE=" + file)
	r.WaitLog("waiting to start again")
	b.must(b.cluster.Restart(t.Context()))
	r.WaitLog("msg=streaming")
	b.sql = b.connect()
	ids := b.insert(3)
	b.requireStatus("published", ids)

	// A password that is changed under a running relay is waited out.
	b.exec(`alter role postgres password 'second-secret'`)
	b.exec(`select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'outbox-relay%'`)
	r.WaitLog("28P01")
	missed := b.insert(3)
	b.must(os.WriteFile(file, []byte(withPassword(t, b.url, "second-secret")), 0o600))
	b.requireStatus("published", missed)
	b.requireStream(append(ids, missed...))
	b.exec(`alter role postgres password 'first-secret'`)
	requireLeaves(t, r)
}

func TestNoSuchDatabase(t *testing.T) {
	t.Parallel()
	b := setup(t)
	address, err := url.Parse(b.url)
	b.must(err)
	address.Path = "/shop_that_is_not"
	requireEnd(t, b.start("POSTGRES_URL="+address.String()), 1, `database "shop_that_is_not" does not exist`, "OUTBOX_POSTGRES_URL")
}

func TestNATSAwayAtStart(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.nats.Stop()
	r := b.start()
	r.WaitLog("waiting for NATS")
	r.WaitLog("OUTBOX_NATS_URL")
	requireLeaves(t, r)
	r = b.start()
	r.WaitLog("waiting for NATS")
	b.nats.Restart()
	r.WaitLog("msg=streaming")
	ids := b.insert(3)
	b.requireStatus("published", ids)
	b.requireStream(ids)
}

// A server that takes the connection and then says nothing holds nobody up.
func TestSilentServersAtStart(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	b := setup(t)
	r := b.start("NATS_URL=nats://" + silent.Addr().String())
	r.WaitLog("waiting for NATS")
	requireLeaves(t, r)
	r = b.start("POSTGRES_URL=postgres://postgres@" + silent.Addr().String() + "/shop?sslmode=disable")
	r.WaitLog("msg=outbox-relay")
	requireLeaves(t, r)
	b.requireWorks()
}

func TestNATSRefusesThePassword(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.Postgres(t), testenv.NATSOptions{Edit: func(o *server.Options) {
		o.Users = []*server.User{{Username: "test", Password: "test"}, {Username: "relay", Password: "right-secret"}}
		o.NoAuthUser = "test"
	}})
	r := b.start("NATS_USER=relay", "NATS_PASSWORD=wrong-secret")
	requireEnd(t, r, 1, "connect to NATS", "OUTBOX_NATS_CREDS", "_PASSWORD")
	if strings.Contains(r.Logs(), "-secret") {
		t.Fatal("the output has the password")
	}
	b.requireWorks("NATS_USER=relay", "NATS_PASSWORD=right-secret")
}

func TestJetStreamIsNotEnabled(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.Postgres(t), testenv.NATSOptions{NoJetStream: true})
	requireEnd(t, b.start(), 1, "JetStream is not enabled", "start nats-server with -js")
	b.nats = testenv.NATS(t, testenv.NATSOptions{})
	b.dial()
	b.requireWorks("NATS_URL=" + b.nats.URL())
}

func TestNATSServerIsTooOld(t *testing.T) {
	t.Parallel()
	b := setup(t)
	requireEnd(t, b.start("NATS_URL="+testenv.OldNATS(t, "2.10.26")), 1, "the NATS server is version 2.10.26", "2.10.27 or newer")
	b.requireWorks()
}

func TestTableIsMissing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	requireEnd(t, b.start("TABLE=shop.orders"), 1, `table "shop"."orders" does not exist (OUTBOX_TABLE)`, "outbox-relay migrate")
	b.exec(`create schema shop`)
	b.migrate("TABLE=shop.orders", "PUBLICATION=orders")
	b.exec(`drop table public.events; alter database ` + pgx.Identifier{b.database()}.Sanitize() + ` set search_path = shop`)
	b.sql = b.connect()
	b.exec(`create view public.events as select 1`) // one name of two schemas is not taken for the other
	r := b.streaming("TABLE=shop.orders", "PUBLICATION=orders")
	var id string
	b.must(b.sql.QueryRow(t.Context(), `insert into orders (aggregate_type, event_type, payload) values ('order', 'created', '1') returning id`).Scan(&id))
	b.requireStream([]string{id})
	requireLeaves(t, r)
}

func TestNotMigrated(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`drop table outbox_relay_checkpoints`)
	requireEnd(t, b.start(), 1, `table "public"."outbox_relay_checkpoints" does not exist`, "outbox-relay migrate")
}

func TestColumnIsMissing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`alter table events drop column version cascade`)
	requireEnd(t, b.start(), 1, `table "public"."events" has no column version`, "add it")
	b.exec(`alter table events add column version int not null default 0`)
	requireEnd(t, b.start(), 1, "publication outbox_relay does not contain table", "outbox-relay migrate")
	b.migrate()
	b.requireWorks()
	requireEnd(t, b.start("SUBJECT=events.{tenant}.{event_type}"), 1, `has no column tenant`, "OUTBOX_SUBJECT")
}

// A publication that would pass over events is refused, by what is wrong.
func TestPublicationIsNotUsable(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const columns = `(id, version, aggregate_type, aggregate_id, event_type, payload, headers, status, created_at)`
	requireEnd(t, b.start("PUBLICATION=shop"), 1, "publication shop does not exist", "outbox-relay migrate")
	for _, c := range []struct {
		name, fault string
		words       []string
		remedy      string
	}{
		{"lacks the table", `alter publication outbox_relay drop table events`,
			[]string{`does not contain table "public"."events"`, "outbox-relay migrate", "ADD TABLE"}, `alter publication outbox_relay add table events`},
		{"of another table", `create table other (n int); alter publication outbox_relay set table other`,
			[]string{`does not contain table "public"."events"`}, `alter publication outbox_relay set table events ` + columns},
		{"lacks a column", `alter publication outbox_relay set table events (id, version, status)`,
			[]string{"does not list column aggregate_type, event_type, payload, created_at", "outbox-relay migrate"}, `alter publication outbox_relay set table events ` + columns},
		{"no inserts", `alter publication outbox_relay set (publish = 'delete')`,
			[]string{"does not publish inserts", "SET (publish = 'insert')"}, `alter publication outbox_relay set (publish = 'insert')`},
		{"updates too", `alter publication outbox_relay set (publish = 'insert, update')`,
			[]string{"publishes more than inserts", "SET (publish = 'insert')"}, `alter publication outbox_relay set (publish = 'insert')`},
		{"not via root", `alter publication outbox_relay set (publish_via_partition_root = false)`,
			[]string{"SET (publish_via_partition_root = true)"}, `alter publication outbox_relay set (publish_via_partition_root = true)`},
		{"row filter", `alter publication outbox_relay set table events ` + columns + ` where (version = 0)`,
			[]string{"has a row filter", "remove it"}, `alter publication outbox_relay set table events ` + columns},
		{"all tables", `drop publication outbox_relay; create publication outbox_relay for all tables with (publish = 'insert', publish_via_partition_root = true)`,
			[]string{"for all tables", "name the table"}, `drop publication outbox_relay; create publication outbox_relay for table events ` + columns + ` with (publish = 'insert', publish_via_partition_root = true)`},
	} {
		t.Run(c.name, func(t *testing.T) {
			b.exec(c.fault)
			requireEnd(t, b.start(), 1, append(c.words, "publication outbox_relay")...)
			b.exec(c.remedy)
		})
	}
	b.requireWorks()
}

func TestUnloggedTable(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`alter publication outbox_relay drop table events; alter table events set unlogged`)
	requireEnd(t, b.start(), 1, "does not contain table") // Postgres does not let it in
	b.exec(`alter table events set logged`)
	b.migrate()
	b.requireWorks()
}

func TestSlotIsNotTheRelays(t *testing.T) {
	t.Parallel()
	b := setup(t)
	slot := b.slot()
	drop := "SELECT pg_drop_replication_slot('" + slot + "')"
	for _, c := range []struct {
		name, made string
		words      []string
	}{
		{"another plugin's", `select pg_create_logical_replication_slot($1, 'test_decoding')`, []string{"test_decoding", "pgoutput", "OUTBOX_SLOT", drop}},
		{"physical", `select pg_create_physical_replication_slot($1)`, []string{"physical", "pgoutput", "OUTBOX_SLOT", drop}},
		{"two-phase", `select pg_create_logical_replication_slot($1, 'pgoutput', twophase => true)`, []string{"two_phase", "OUTBOX_SLOT", drop}},
		{"made by hand", `select pg_create_logical_replication_slot($1, 'pgoutput')`, []string{"has no checkpoint", drop}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b.exec(c.made, slot)
			requireEnd(t, b.start(), 1, append(c.words, "slot "+slot)...)
			b.dropSlot()
		})
	}
	b.requireWorks()
}

func TestSlotOfAnotherDatabase(t *testing.T) {
	t.Parallel()
	b, other := setup(t), setup(t)
	other.streaming().Terminate()
	requireEnd(t, b.start("SLOT="+other.slot()), 1, "slot "+other.slot(), fmt.Sprintf("belongs to database %q", other.database()), fmt.Sprintf("not to %q", b.database()), "OUTBOX_SLOT")
	b.requireWorks()
	other.requireWorks()
}

func TestRelayThatStandsByLeavesAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	first := b.streaming()
	second := b.start()
	second.WaitLog("standing by: another relay has the slot")
	requireLeaves(t, second)
	ids := b.insert(3)
	b.requireStatus("published", ids)
	requireLeaves(t, first)
}

// Who holds the slot need not be a relay.
func TestSlotHeldByAnotherProgram(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.requireWorks()
	ids := b.insert(2)
	before := b.last()
	config, err := pgx.ParseConfig(b.url)
	b.must(err)
	config.RuntimeParams["replication"] = "database"
	config.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	holder, err := pgx.ConnectConfig(t.Context(), config)
	b.must(err)
	defer holder.Close(context.Background())
	holding := holder.PgConn().Exec(t.Context(), `START_REPLICATION SLOT "`+b.slot()+`" LOGICAL 0/0 (proto_version '1', publication_names 'outbox_relay')`)
	_ = holding // it streams; nobody reads
	testenv.Eventually(t, "the slot held", func() bool {
		return b.count(`select count(*) from pg_replication_slots where slot_name = $1 and active`, b.slot()) == 1
	})
	r := b.start()
	r.WaitLog("standing by")
	if n := b.last(); n != before {
		t.Fatalf("%d messages were published without the slot", n-before)
	}
	b.must(holder.PgConn().Conn().Close())
	b.requireStatus("published", ids)
	requireLeaves(t, r)
}

// A slot that is gone, or whose WAL is, is made anew, and what it has lost comes
// from the table; with keep the rows don't tell what was published.
func TestSlotIsLost(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"gone", "invalidated"} {
		for _, mode := range []string{"mark", "delete", "keep"} {
			t.Run(how+" "+mode, func(t *testing.T) {
				t.Parallel()
				b := setupOn(t, testenv.OwnPostgres(t, map[string]string{"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}), testenv.NATSOptions{})
				after := "AFTER_PUBLISH=" + mode
				r := b.streaming(after)
				ids := b.insert(3)
				b.requireStream(ids)
				requireLeaves(t, r)
				missed := b.insert(2)
				if how == "gone" {
					b.dropSlot()
				} else {
					b.loseWAL()
				}
				r = b.start(after)
				if mode == "keep" {
					requireEnd(t, r, 1, "slot "+b.slot()+" is "+how, "OUTBOX_AFTER_PUBLISH=keep", "pg_drop_replication_slot('"+b.slot()+"')", "outbox_relay_checkpoints")
					return
				}
				r.WaitLog("slot " + b.slot() + " is " + how)
				r.WaitLog("msg=streaming")
				ids = append(append(ids, missed...), b.insert(3)...)
				b.requireStream(ids)
				b.requireDone(mode, ids)
				requireLeaves(t, r)
			})
		}
	}
}

// loseWAL writes until Postgres has taken the slot's WAL away.
func (b *bundle) loseWAL() {
	b.Helper()
	b.exec(`create table bulk (text text)`)
	testenv.Eventually(b, "the slot invalidated", func() bool {
		b.exec(`insert into bulk select repeat('x', 1000) from generate_series(1, 20000)`)
		b.exec(`select pg_switch_wal()`)
		b.exec(`checkpoint`)
		return b.count(`select count(*) from pg_replication_slots where wal_status = 'lost' and slot_name = $1`, b.slot()) == 1
	})
}

func TestHTTPAddressIsTaken(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	b := setup(t)
	requireEnd(t, b.start("HTTP_ADDR="+taken.Addr().String()), 1, "OUTBOX_HTTP_ADDR: listen tcp", "choose another address")
	b.requireWorks()
}
