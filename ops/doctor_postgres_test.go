package ops_test

import (
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/testenv"
	"outbox-relay/migrations"
	"outbox-relay/ops"
	"outbox-relay/outbox"
	"outbox-relay/relay"
)

// ailment is something wrong, and what the doctor has to say of it.
type ailment struct {
	name   string
	make   string              // SQL; $SLOT is the slot's name
	change func(*relay.Config) // or what the configuration says otherwise
	check  string
	state  string
	words  []string
	cure   string // how the remedy is taken: sql, migrate or print; empty: it is for people
}

// treat makes what is wrong, and requires the line; then it takes the remedy as it
// is printed, and requires that the line is ok, where there is one to be taken.
func (d *desk) treat(a ailment) {
	d.Helper()
	if a.make != "" {
		d.exec(strings.ReplaceAll(a.make, "$SLOT", d.slot))
	}
	var changes []func(*relay.Config)
	if a.change != nil {
		changes = append(changes, a.change)
	}
	doctor := d.doctor(changes...)
	line := d.diagnose(doctor)[a.check]
	d.requireLine(a, line)
	switch a.cure {
	case "sql":
		d.run(line.SQL)
	case "migrate":
		d.same(line.Shell, "outbox-relay migrate")
		config, err := pgx.ParseConfig(d.url)
		d.must(err)
		d.must(migrations.Up(d.Context(), config, doctor.Migrate, slog.New(slog.DiscardHandler)))
	case "print":
		d.says(line.Shell, "outbox-relay migrate --print | psql")
		files, err := migrations.Render(doctor.Migrate)
		d.must(err)
		for _, file := range files {
			d.exec(file.SQL)
		}
	default:
		return
	}
	if after := d.diagnose(doctor)[a.check]; after.State != "ok" && after.State != "skipped" {
		d.Errorf("after its remedy %s is %s: %s", a.check, after.State, after.Found)
	}
}

func (d *desk) requireLine(a ailment, line ops.Check) {
	d.Helper()
	if line.State != a.state {
		d.Errorf("%s is %q, want %s: %s", a.check, line.State, a.state, line.Found)
	}
	if line.Remedy == "" || (a.cure == "sql") != (line.SQL != "") && a.cure != "" {
		d.Errorf("%s has the remedy %q and the SQL %q", a.check, line.Remedy, line.SQL)
	}
	d.says(line.Found+" -> "+line.Remedy, a.words...)
}

// run runs statements as psql does, each for itself.
func (d *desk) run(sql string) {
	d.Helper()
	for statement := range strings.SplitSeq(sql, "; ") {
		d.exec(statement)
	}
}

func (d *desk) same(got, want string) {
	d.Helper()
	if got != want {
		d.Errorf("got %q, want %q", got, want)
	}
}

func keep(c *relay.Config)   { c.Table.Mode = outbox.Keep }
func remove(c *relay.Config) { c.Table.Mode = outbox.Delete }

// Each fault of table, publication and slot that a relay refuses has a line with
// its remedy; a remedy in SQL mends it.
func TestDoctorBeforeTheFirstRun(t *testing.T) {
	t.Parallel()
	const partitioned = `drop table events;
		create table events (id text, version int, aggregate_type text, event_type text, payload jsonb, status text, created_at timestamptz,
			published_at timestamptz, failed_at timestamptz, failed_reasons text[], failed_attempts int, retried_at timestamptz, retried_attempts int) partition by list (%s);
		create table ours partition of events for values in ('a');
		create %s table theirs partition of events default;
		alter publication outbox_relay add table events`
	for _, a := range []ailment{
		{"no table", ``, func(c *relay.Config) { c.Table.Name = "orders" }, "postgres.table", "fault", []string{`"public"."orders" does not exist (OUTBOX_TABLE)`, "migrate"}, "migrate"},
		{"a column missing", `alter table events drop column version cascade`, nil, "postgres.table", "fault", []string{"has no column version", "add it"}, "sql"},
		{"a column of the subject missing", ``, func(c *relay.Config) { c.Table.Columns.Extra = []string{"tenant"} }, "postgres.table", "fault", []string{"has no column tenant", "OUTBOX_SUBJECT"}, ""},
		{"not migrated", `drop table outbox_relay_checkpoints, events_migrations`, nil, "postgres.migrations", "fault", []string{"outbox_relay_checkpoints", "migrate"}, "migrate"},
		{"its own table dropped", `drop table outbox_relay_backlog`, nil, "postgres.migrations", "fault", []string{"outbox_relay_backlog", "although every migration was applied"}, "print"},
		{"a function dropped", `drop function outbox_retry_all()`, nil, "postgres.migrations", "fault", []string{"outbox_retry_all", "although every migration was applied"}, "print"},
		{"migrations to come", `delete from events_migrations where version_id = 8`, nil, "postgres.migrations", "fault", []string{"7 of 8 are applied"}, "migrate"},
		{"partitioned by what is updated", fmt.Sprintf(partitioned, "status", ""), nil, "postgres.partition_key", "fault", []string{"partitioned by status"}, ""},
		{"trigger off", `alter table events disable trigger on_events_create`, nil, "postgres.trigger", "warning", []string{"on_events_create is off", "turn it on"}, "sql"},
		{"trigger dropped", `drop trigger on_events_create on events`, nil, "postgres.trigger", "warning", []string{"on_events_create is not there", "make it"}, "print"},
		{"updates published without an identity", `alter table events replica identity nothing; create publication other for table events with (publish = 'update')`, nil,
			"postgres.replica_identity", "fault", []string{"no outcome can be recorded", "replica identity"}, "sql"},
		{"deletes published without an identity", `alter table events drop constraint events_id_primary_key; create publication other for all tables with (publish = 'delete')`, remove,
			"postgres.replica_identity", "fault", []string{"no outcome can be recorded", "replica identity"}, "sql"},
		{"updates published without the identity's columns", `create publication other for table events (payload) with (publish = 'update')`, nil,
			"postgres.replica_identity", "fault", []string{"no outcome can be recorded", "not all of its columns"}, "sql"},
		{"updates published by a filter", `create publication other for table events where (version = 0)`, nil,
			"postgres.replica_identity", "fault", []string{"no outcome can be recorded", "not all of its columns or rows"}, "sql"},

		{"no publication", ``, func(c *relay.Config) { c.Table.Publication = "shop" }, "postgres.publication", "fault", []string{"publication shop does not exist"}, "migrate"},
		{"publication dropped", `drop publication outbox_relay`, nil, "postgres.publication", "fault", []string{"does not exist", "migrate"}, "migrate"},
		{"table not published", `alter publication outbox_relay drop table events`, nil, "postgres.publication", "fault", []string{"does not contain table", "ADD TABLE"}, "sql"},
		{"another table published", `create table other (n int); alter publication outbox_relay set table other`, nil, "postgres.publication", "fault", []string{"does not contain table"}, "sql"},
		{"table renamed and made again", `alter table events rename to events_old; create table events (like events_old including all)`, nil, "postgres.publication", "fault", []string{"does not contain table"}, "sql"},
		{"all tables", `drop publication outbox_relay; create publication outbox_relay for all tables`, nil, "postgres.publication", "fault", []string{"for all tables", "another OUTBOX_PUBLICATION"}, ""},
		{"of a schema", `drop publication outbox_relay; create publication outbox_relay for tables in schema public`, nil, "postgres.publication", "fault", []string{"for a schema"}, ""},
		{"columns not published", `alter publication outbox_relay set table events (id, version, status)`, nil, "postgres.publication_columns", "fault", []string{"does not list column aggregate_type, event_type, payload, created_at"}, "migrate"},
		{"no inserts", `alter publication outbox_relay set (publish = 'delete')`, nil, "postgres.publication_operations", "fault", []string{"does not publish inserts"}, "sql"},
		{"updates too", `alter publication outbox_relay set (publish = 'insert, update')`, nil, "postgres.publication_operations", "fault", []string{"more than inserts"}, "sql"},
		{"not by the root", `alter publication outbox_relay set (publish_via_partition_root = false)`, nil, "postgres.publication_root", "fault", []string{"under their root"}, "sql"},
		{"a filter", `alter publication outbox_relay set table events where (version = 0)`, nil, "postgres.publication_filter", "fault", []string{"has a row filter"}, "sql"},
		{"a partition without WAL", fmt.Sprintf(partitioned, "id", "unlogged"), nil, "postgres.publication_logged", "fault", []string{"unlogged"}, "sql"},

		{"slot of another plugin", `select pg_create_logical_replication_slot('$SLOT', 'test_decoding')`, nil, "postgres.slot", "fault", []string{"test_decoding", "OUTBOX_SLOT"}, "sql"},
		{"physical slot", `select pg_create_physical_replication_slot('$SLOT')`, nil, "postgres.slot", "fault", []string{"physical", "OUTBOX_SLOT"}, "sql"},
		{"two-phase slot", `select pg_create_logical_replication_slot('$SLOT', 'pgoutput', twophase => true)`, nil, "postgres.slot", "fault", []string{"two_phase", "OUTBOX_SLOT"}, "sql"},
		{"slot made by hand", `select pg_create_logical_replication_slot('$SLOT', 'pgoutput')`, nil, "postgres.checkpoint", "fault", []string{"has no checkpoint"}, "sql"},
	} {
		t.Run(a.name, func(t *testing.T) {
			t.Parallel()
			setup(t).treat(a)
		})
	}
}

// What has happened since a relay ran: what the next start mends is a warning.
func TestDoctorAfterARun(t *testing.T) {
	t.Parallel()
	const remade = `begin; drop publication outbox_relay; create publication outbox_relay for table events with (publish = 'insert', publish_via_partition_root = true); commit`
	d := setup(t)
	r := d.relay()
	d.insert(3, "order", "placed")
	testenv.Eventually(d, "the rows published", func() bool {
		return ask[int](d, `select count(*) from events where status = 'published' and aggregate_type <> 'history'`) == 3
	})
	r.Terminate()
	testenv.Eventually(d, "the slot free", func() bool {
		return ask[int](d, `select count(*) from pg_replication_slots where active and slot_name = $1`, d.slot) == 0
	})
	d.treat(ailment{name: "nobody reads", check: "postgres.slot_reader", state: "warning", words: []string{"nobody reads from it", "start a relay"}})
	d.treat(ailment{name: "another cluster's", make: `update outbox_relay_checkpoints set system_identifier = '1'`, check: "postgres.checkpoint", state: "fault",
		words: []string{"written by Postgres cluster 1", "restored from a dump"}, cure: "sql"})
	d.treat(ailment{name: "an old primary", make: `update outbox_relay_checkpoints set timeline = 7`, check: "postgres.checkpoint", state: "fault", words: []string{"old primary", "current one"}})
	d.exec(`update outbox_relay_checkpoints set timeline = 1, foreign_seen = true`)
	d.treat(ailment{name: "others publish", check: "postgres.checkpoint", state: "warning", words: []string{"messages of others", "deny"}})
	d.exec(`update outbox_relay_checkpoints set foreign_seen = false`)
	d.treat(ailment{name: "publication made again", make: remade, check: "postgres.publication_state", state: "warning", words: []string{"was changed or made again", "start the relay"}})
	d.treat(ailment{name: "the same with keep", change: keep, check: "postgres.publication_state", state: "fault", words: []string{"was changed or made again", "status 'pending'"}, cure: "sql"})
	d.exec(`select pg_replication_slot_advance($1, pg_current_wal_lsn())`, d.slot)
	d.treat(ailment{name: "advanced by hand", check: "postgres.checkpoint", state: "warning", words: []string{"advanced by hand", "start the relay"}})
	d.treat(ailment{name: "the same with keep", change: keep, check: "postgres.checkpoint", state: "fault", words: []string{"advanced by hand", "status 'pending'"}})
	d.exec(`select pg_drop_replication_slot($1)`, d.slot)
	d.treat(ailment{name: "slot gone", check: "postgres.checkpoint", state: "warning", words: []string{"is gone", "start the relay"}})
	d.treat(ailment{name: "the same with keep", change: keep, check: "postgres.checkpoint", state: "fault", words: []string{"is gone", "OUTBOX_AFTER_PUBLISH=keep"}, cure: "sql"})
}

func TestDoctorFindsNoPostgres(t *testing.T) {
	t.Parallel()
	d := setup(t)
	for name, c := range map[string]struct {
		edit  func(*url.URL)
		words []string
	}{
		"away":             {func(u *url.URL) { u.Host = fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(d)) }, []string{"connection refused", "OUTBOX_POSTGRES_URL"}},
		"no such database": {func(u *url.URL) { u.Path = "/nowhere" }, []string{`"nowhere" does not exist`, "create the database"}},
		"no such role":     {func(u *url.URL) { u.User = url.User("nobody_at_all") }, []string{`"nobody_at_all" does not exist`, "check user and password"}},
	} {
		address, err := url.Parse(d.url)
		d.must(err)
		c.edit(address)
		lines := d.diagnose(d.doctor(func(config *relay.Config) { config.Postgres = func() (string, error) { return address.String(), nil } }))
		line := lines["postgres.connection"]
		d.says(line.Found+" -> "+line.Remedy, c.words...)
		if line.State != "fault" || lines["postgres.slot"].State != "skipped" || lines["nats.connection"].State != "ok" {
			t.Errorf("%s: %+v, and the others %+v", name, line, lines)
		}
	}
}

// A server that was never set up for it: what is at fault hides nothing else.
func TestDoctorOfAServer(t *testing.T) {
	t.Parallel()
	cluster := testenv.OwnPostgres(t, map[string]string{"wal_level": "replica", "max_replication_slots": "1", "max_wal_senders": "1"})
	d := setupOn(t, cluster)
	d.exec(`select pg_create_physical_replication_slot('other')`)
	holder := relay.Examine(d.doctor().Config)
	defer holder.Close()
	_, err := holder.Postgres(t.Context())
	d.must(err)
	_, err = holder.Replication(t.Context())
	d.must(err)
	lines := d.diagnose(d.doctor())
	var sql []string
	for _, a := range []ailment{
		{check: "postgres.wal_level", state: "fault", words: []string{`wal_level is "replica"`, "restart Postgres"}, cure: "sql"},
		{check: "postgres.replication_slots", state: "fault", words: []string{"1 of 1 are in use", "restart Postgres"}, cure: "sql"},
		{check: "postgres.replication", state: "fault", words: []string{"max_wal_senders", "restart Postgres"}, cure: "sql"},
		{check: "postgres.slot_limits", state: "warning", words: []string{"max_slot_wal_keep_size is -1"}, cure: "sql"},
	} {
		d.requireLine(a, lines[a.check])
		sql = append(sql, lines[a.check].SQL)
	}
	d.run(strings.Join(sql, "; "))
	d.must(cluster.Restart(t.Context()))
	d.reconnect()
	requireAll(d, d.diagnose(d.doctor()), append(streamLines, "postgres.slot_wal", "postgres.slot_reader", "postgres.slot_failover", "nats.stream_durability")...)
	line := d.diagnose(d.doctor(keep))["postgres.slot_limits"]
	d.requireLine(ailment{check: "postgres.slot_limits", state: "warning", words: []string{"is 50GB", "OUTBOX_AFTER_PUBLISH=keep"}}, line)
	d.requireTLS()
	if cluster.Version() < 17 {
		return
	}
	d.run(`alter system set synchronized_standby_slots = 'other'; select pg_reload_conf()`)
	standbys := func(state string) (line ops.Check) {
		testenv.Eventually(d, "the doctor to say "+state, func() bool {
			line = d.diagnose(d.doctor())["postgres.standbys"]
			return line.State == state
		})
		return line
	}
	line = standbys("fault")
	d.requireLine(ailment{check: "postgres.standbys", state: "fault", words: []string{"synchronized_standby_slots names other", "no event is sent"}, cure: "sql"}, line)
	d.run(line.SQL)
	standbys("ok")
}

// requireTLS gives the server a certificate, and requires that the doctor says
// what is in use.
func (d *desk) requireTLS() {
	d.Helper()
	a := testenv.NewAuthority(d)
	a.Issue("server")
	data := ask[string](d, `show data_directory`)
	owner, err := os.Stat(data)
	d.must(err)
	for from, to := range map[string]string{"server.pem": "server.crt", "server.key": "server.key"} {
		text, err := os.ReadFile(a.Path(from))
		d.must(err)
		d.must(os.WriteFile(filepath.Join(data, to), text, 0o600))
		d.must(os.Chown(filepath.Join(data, to), int(owner.Sys().(*syscall.Stat_t).Uid), -1))
	}
	d.run(`alter system set ssl = on; select pg_reload_conf()`)
	address, err := url.Parse(d.url)
	d.must(err)
	address.Host = "localhost:" + address.Port()
	address.RawQuery = url.Values{"sslmode": {"verify-full"}, "sslrootcert": {a.Path("ca.pem")}}.Encode()
	secured := d.doctor(func(c *relay.Config) { c.Postgres = func() (string, error) { return address.String(), nil } })
	testenv.Eventually(d, "TLS", func() bool { return d.diagnose(secured)["postgres.connection"].State == "ok" })
	if line := d.diagnose(secured)["postgres.tls"]; line.State != "ok" || !strings.Contains(line.Found, "TLSv1.3, TLS_AES_") {
		d.Errorf("by TLS: %+v", line)
	}
	address.RawQuery = url.Values{"sslmode": {"verify-full"}, "sslrootcert": {testenv.NewAuthority(d).Path("ca.pem")}}.Encode()
	d.requireLine(ailment{check: "postgres.connection", state: "fault", words: []string{"unknown authority", "sslrootcert"}}, d.diagnose(secured)["postgres.connection"])
}

// The rights of deploy/postgres/roles.sql are all that the doctor looks for, and each
// that is taken away is named, with the statement that gives it back.
func TestDoctorNamesEachRight(t *testing.T) {
	t.Parallel()
	d := setupOn(t, testenv.OwnPostgres(t, nil))
	const role = testenv.RelayName
	all := []string{"OUTBOX_AFTER_PUBLISH", "OUTBOX_RETENTION", "OUTBOX_RETRY_ATTEMPTS"}
	testenv.GrantRoles(t, d.url, all...)
	address := testenv.AsRelay(t, d.url)
	as := func(c *relay.Config) {
		c.Postgres = func() (string, error) { return address, nil }
		c.Table.Mode, c.Housekeeping.Retention, c.Housekeeping.Retries.Attempts = outbox.Delete, 1, 1
	}
	requireAll(d, d.diagnose(d.doctor(as)), append(streamLines, "postgres.slot_wal", "postgres.slot_reader", "postgres.slot_failover", "postgres.slot_limits", "nats.stream_durability")...)

	granted := regexp.MustCompile(`(?m)^grant (.*) on (.*) to `+role).FindAllStringSubmatch(testenv.RolesSQL(t, all...), -1)
	if len(granted) < 7 {
		t.Fatalf("roles.sql grants %q", granted)
	}
	for _, g := range granted {
		if strings.HasPrefix(g[1], "execute") {
			continue // it is of partitioned tables
		}
		if strings.HasPrefix(g[1], "usage") {
			d.exec(`revoke usage on schema public from public`)
		}
		for _, right := range regexp.MustCompile(`[a-z]+( \([^)]*\))?`).FindAllString(g[1], -1) {
			d.exec(`revoke ` + right + ` on ` + g[2] + ` from ` + role)
			line := d.diagnose(d.doctor(as))["postgres.privileges"]
			a := ailment{check: "postgres.privileges", state: "fault", words: []string{strings.ToUpper(strings.SplitN(right, " ", 2)[0])}, cure: "sql"}
			d.requireLine(a, line)
			d.run(line.SQL)
			if line := d.diagnose(d.doctor(as))["postgres.privileges"]; line.State != "ok" {
				t.Errorf("after %s: %+v", right, line)
			}
		}
	}
	config, err := pgx.ParseConfig(d.url)
	d.must(err)
	d.must(migrations.Up(t.Context(), config, migrations.Target{Schema: "public", Table: "parts", Publication: "parts", Partitioned: true}, slog.New(slog.DiscardHandler)))
	d.exec(`revoke execute on function outbox_relay_drop_partitions(regclass, interval) from ` + role)
	d.treat(ailment{check: "postgres.privileges", state: "fault", words: []string{"EXECUTE ON FUNCTION", "SELECT, DELETE ON", "UPDATE (status, "}, cure: "sql",
		change: func(c *relay.Config) {
			as(c)
			c.Table.Name, c.Table.Publication = "parts", "parts"
		}})
	for sql, a := range map[string]ailment{
		`alter role ` + role + ` noreplication`:        {check: "postgres.replication", state: "fault", words: []string{"42501", "REPLICATION"}, cure: "sql"},
		`alter table events enable row level security`: {check: "postgres.row_security", state: "fault", words: []string{"row level security"}, cure: "sql"},
	} {
		a.make, a.change = sql, as
		d.treat(a)
	}
}

// The doctor can't change anything, even where it would.
func TestDoctorChangesNothing(t *testing.T) {
	t.Parallel()
	d := setup(t)
	e := relay.Examine(d.doctor().Config)
	defer e.Close()
	conn, err := e.Postgres(t.Context())
	d.must(err)
	_, err = conn.Exec(t.Context(), `delete from public.events`)
	if err == nil || !strings.Contains(err.Error(), "25006") {
		t.Errorf("got %v, want SQLSTATE 25006, read only", err)
	}
	d.diagnose(d.doctor())
	if n := ask[int](d, `select (select count(*) from outbox_relay_checkpoints) + (select count(*) from pg_replication_slots where slot_name = $1)`, d.slot); n != 0 {
		t.Error("it has made a checkpoint or a slot")
	}
	if code, out := d.command("status"); code != 0 || !strings.Contains(out, "stream EVENTS does not exist") {
		t.Errorf("it has made the stream:\n%s", out)
	}
}

// The command: its exit codes, and its text.
func TestDoctorCommand(t *testing.T) {
	t.Parallel()
	d := setup(t)
	code, out := d.command("doctor")
	if code != 0 {
		t.Errorf("exit code %d of one that finds no fault", code)
	}
	d.says(out, "Postgres\n", "NATS\n", "  ok       wal_level               logical\n", "warnings: ")
	d.exec(`alter publication outbox_relay set (publish = 'delete')`)
	code, out = d.command("doctor")
	if code != 1 {
		t.Errorf("exit code %d of one that finds a fault", code)
	}
	d.says(out, "  fault    publication_operations", "\n           sql   ALTER PUBLICATION \"outbox_relay\" SET (publish = 'insert');\n", "Faults: 1,")
	if code, out = d.command("doctor", "--json"); code != 1 || !strings.Contains(out, `"sql": "ALTER PUBLICATION \"outbox_relay\" SET (publish = 'insert')"`) {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	if code, _ = d.command("doctor", "--fast"); code != 2 {
		t.Errorf("exit code %d of a flag that does not exist", code)
	}
	d.admin.Table.Slot = "Not A Slot"
	d.slot = "Not A Slot"
	if code, _ = d.command("doctor"); code != 2 {
		t.Errorf("exit code %d of a bad configuration", code)
	}
}

func (d *desk) reconnect() {
	d.Helper()
	var err error
	d.sql, err = pgx.Connect(d.Context(), d.url)
	d.must(err)
}

// A pooler shows, whether or not it takes what the relay says at the start of a
// session.
func TestDoctorSeesAPooler(t *testing.T) {
	t.Parallel()
	d := setup(t)
	through := func(ignored string) map[string]ops.Check {
		address := testenv.Pooler(t, d.url, ignored)
		return d.diagnose(d.doctor(func(c *relay.Config) { c.Postgres = func() (string, error) { return address, nil } }))
	}
	const remedy = "OUTBOX_POSTGRES_URL"
	d.requireLine(ailment{check: "postgres.connection", state: "fault", words: []string{"unsupported startup parameter", "connection pooler", remedy}},
		through("")["postgres.connection"])
	lines := through("lock_timeout,statement_timeout,idle_session_timeout,idle_in_transaction_session_timeout,default_transaction_isolation,default_transaction_read_only," +
		"synchronous_commit,plan_cache_mode,standard_conforming_strings,client_min_messages," +
		"tcp_keepalives_idle,tcp_keepalives_interval,tcp_keepalives_count,search_path,extra_float_digits")
	d.requireLine(ailment{check: "postgres.pooler", state: "warning", words: []string{"a pooler or proxy answers", remedy}}, lines["postgres.pooler"])
	d.requireLine(ailment{check: "postgres.replication", state: "fault", words: []string{"connection pooler", remedy}}, lines["postgres.replication"])
}
