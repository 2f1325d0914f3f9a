package migrations_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"testing"

	"outbox-relay/internal/testenv"
	. "outbox-relay/migrations" // testenv imports it

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func parse(tb testing.TB, url string) *pgx.ConnConfig {
	tb.Helper()
	config, err := pgx.ParseConfig(url)
	if err != nil {
		tb.Fatal(err)
	}
	return config
}

func connect(tb testing.TB, config *pgx.ConnConfig) *pgx.Conn {
	tb.Helper()
	conn, err := pgx.ConnectConfig(tb.Context(), config)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close(context.WithoutCancel(tb.Context())) })
	return conn
}

func execute(tb testing.TB, conn *pgx.Conn, sql string) {
	tb.Helper()
	if _, err := conn.Exec(tb.Context(), sql); err != nil {
		tb.Fatalf("%s: %v", sql, err)
	}
}

func query[T any](tb testing.TB, conn *pgx.Conn, sql string, args ...any) T {
	tb.Helper()
	var v T
	if err := conn.QueryRow(tb.Context(), sql, args...).Scan(&v); err != nil {
		tb.Fatalf("%s: %v", sql, err)
	}
	return v
}

// newDatabase is empty, with a session in it that owns all.
func newDatabase(tb testing.TB) (*pgx.ConnConfig, *pgx.Conn) {
	tb.Helper()
	config := parse(tb, testenv.InhabitedDatabase(tb, testenv.Postgres(tb)))
	return config, connect(tb, config)
}

func up(tb testing.TB, config *pgx.ConnConfig, t Target) string {
	tb.Helper()
	var log bytes.Buffer
	if err := Up(tb.Context(), config, t, slog.New(slog.NewTextHandler(&log, nil))); err != nil {
		tb.Fatal(err)
	}
	return log.String()
}

func migrated(tb testing.TB, t Target) *pgx.ConnConfig {
	tb.Helper()
	config, _ := newDatabase(tb)
	up(tb, config, t)
	return config
}

func insert(tb testing.TB, conn *pgx.Conn, t Target) (id string) {
	tb.Helper()
	return query[string](tb, conn, fmt.Sprintf(
		`insert into %s.%s (aggregate_type, event_type, payload, aggregate_id, headers) values ('order', 'created', '{"n": 1}', 'a', '{"k": "v"}') returning id`,
		Quote(t.Schema), Quote(t.Table)))
}

// listed are the published columns; nil: the publication lacks the table.
func listed(tb testing.TB, conn *pgx.Conn, t Target) []string {
	tb.Helper()
	return query[[]string](tb, conn, `select (select attnames::text[] from pg_publication_tables
		where pubname = $1 and schemaname = $2 and tablename = $3)`, t.Publication, t.Schema, t.Table)
}

// publicationRows changes with any change of the publication's catalog rows.
func publicationRows(tb testing.TB, conn *pgx.Conn) string {
	tb.Helper()
	return query[string](tb, conn, `select concat((select string_agg(concat(oid, '/', xmin), ',' order by oid) from pg_publication), ' ',
		(select string_agg(concat(oid, '/', xmin), ',' order by oid) from pg_publication_rel))`)
}

func requireColumns(tb testing.TB, conn *pgx.Conn, t Target) {
	tb.Helper()
	got, want := listed(tb, conn, t), slices.Concat(MessageColumns, t.Columns)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		tb.Errorf("publishes %q, want %q", got, want)
	}
}

func requireWorks(tb testing.TB, conn *pgx.Conn, t Target) {
	tb.Helper()
	requireColumns(tb, conn, t)
	if id := insert(tb, conn, t); len(id) != len("event_")+26 || !strings.HasPrefix(id, "event_") {
		tb.Errorf("the id is %q", id)
	}
	got := query[string](tb, conn, `select concat(pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot) from pg_publication where pubname = $1`, t.Publication)
	if got != "tffft" {
		tb.Errorf("insert, update, delete, truncate, via root: %s", got)
	}
}

func requireError(tb testing.TB, err error, want ...string) {
	tb.Helper()
	if err == nil {
		tb.Fatalf("no error, want one with %q", want)
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			tb.Errorf("got %v, want it to hold %q", err, w)
		}
	}
}

func TestUp(t *testing.T) {
	t.Parallel()
	for name, target := range map[string]Target{
		"usual":  usual,
		"odd":    odd,
		"column": {Schema: "public", Table: "order_events", Publication: "order_events", Columns: []string{"retried_at", "id"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config, conn := newDatabase(t)
			execute(t, conn, "create schema if not exists "+Quote(target.Schema))
			log := up(t, config, target)
			files, err := target.Numbered()
			if err != nil {
				t.Fatal(err)
			}
			for _, file := range files {
				if strings.Count(log, "file="+file.Name) != 1 {
					t.Errorf("log lacks %s once:\n%s", file.Name, log)
				}
			}
			target.Columns = slices.DeleteFunc(target.Columns, func(c string) bool { return c == "id" })
			requireWorks(t, conn, target)

			before := publicationRows(t, conn)
			if log := up(t, config, target); !strings.Contains(log, "nothing to migrate") || strings.Count(log, "\n") != 1 {
				t.Errorf("second run:\n%s", log)
			}
			if after := publicationRows(t, conn); after != before {
				t.Errorf("the second run changed the publication: %s, was %s", after, before)
			}
			versions := query[int](t, conn, "select count(*)::int from "+Quote(target.Schema)+"."+Quote(target.Table+"_migrations")+" where version_id > 0")
			if versions != len(files) {
				t.Errorf("%d versions, want %d", versions, len(files))
			}
		})
	}
}

func TestNamesInTheCatalogs(t *testing.T) {
	t.Parallel()
	config, conn := newDatabase(t)
	execute(t, conn, "create schema shop")
	const inPublic = `select count(*)::int from pg_class where relnamespace = 'public'::regnamespace`
	before := query[int](t, conn, inPublic)
	up(t, config, Target{Schema: "shop", Table: "order_events", Publication: "p"})
	got := query[string](t, conn, `select string_agg(conname, ' ' order by conname) from pg_constraint where conrelid = 'shop.order_events'::regclass and contype <> 'n'`)
	const want = "order_events_aggregate_type_check order_events_event_type_check order_events_id_check order_events_id_primary_key order_events_id_version_unique order_events_status_check order_events_version_check"
	if got != want {
		t.Errorf("constraints %s", got)
	}
	got = query[string](t, conn, `select concat(tgname, ' ', proname) from pg_trigger join pg_proc on pg_proc.oid = tgfoid where tgrelid = 'shop.order_events'::regclass`)
	if got != "on_order_events_create on_order_events_create" {
		t.Errorf("trigger and function %s", got)
	}
	if n := query[int](t, conn, inPublic); n != before {
		t.Errorf("%d relations in public, want %d as before", n, before)
	}
}

var dollarTag = regexp.MustCompile(`\$\w*\$`)

// statements splits a file as psql does: at each semicolon that ends a line
// outside of a quoted body.
func statements(sql string) []string {
	var all []string
	quote, start, end := "", 0, 0 // quote is what opened the body that we are in
	for line := range strings.Lines(sql) {
		end += len(line)
		for _, tag := range dollarTag.FindAllString(line, -1) {
			switch quote {
			case "":
				quote = tag
			case tag:
				quote = ""
			}
		}
		if quote == "" && strings.HasSuffix(strings.TrimSpace(line), ";") {
			all = append(all, sql[start:end])
			start = end
		}
	}
	return append(all, sql[start:])
}

// runAlone runs the files as psql does, and nothing else: in a session of its
// own, each statement sent as text and committed by itself.
func runAlone(t *testing.T, config *pgx.ConnConfig, rendered []File) {
	t.Helper()
	conn := connect(t, config)
	for _, f := range rendered {
		for _, statement := range statements(f.SQL) {
			if strings.Contains(statement, "\n\\") {
				t.Fatalf("%s has what psql takes for a command of its own:\n%s", f.Name, statement)
			}
			if _, err := conn.PgConn().Exec(t.Context(), statement).ReadAll(); err != nil {
				t.Fatalf("%s: %v in\n%s", f.Name, err, statement)
			}
		}
	}
}

func TestFilesAlone(t *testing.T) {
	t.Parallel()
	withColumn := Target{Schema: "shop", Table: "order_events", Publication: "p", Columns: []string{"retried_at"}}
	for name, target := range map[string]Target{"usual": usual, "odd": odd, "column": withColumn, "partitioned": partitioned} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config, conn := newDatabase(t)
			execute(t, conn, "create schema if not exists "+Quote(target.Schema))
			runAlone(t, config, render(t, target))
			requireWorks(t, conn, target)
			before := publicationRows(t, conn)
			// A further column was added in a statement of its own; 002 leaves it.
			runAlone(t, config, render(t, target))
			up(t, config, target)
			requireWorks(t, conn, target)
			if after := publicationRows(t, conn); after != before {
				t.Errorf("running again changed the publication: %s, was %s", after, before)
			}
		})
	}
}

func TestOutboxesSideBySide(t *testing.T) {
	t.Parallel()
	config, conn := newDatabase(t)
	execute(t, conn, "create schema shop; create schema "+Quote(odd.Schema))
	targets := []Target{
		usual,
		{Schema: "public", Table: "order_events", Publication: "order_relay"},
		{Schema: "shop", Table: "events", Publication: "shop_relay"},
		odd,
	}
	g, ctx := errgroup.WithContext(t.Context())
	for range 2 {
		for _, target := range targets {
			g.Go(func() error { return Up(ctx, config, target, quiet()) })
		}
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	for _, target := range targets {
		requireWorks(t, conn, target)
	}
	execute(t, conn, "set search_path to pg_temp; drop function public.gen_random_ulid")
	for _, target := range targets[2:] {
		insert(t, conn, target) // calls its own schema's
	}
}

func TestMigrationWaitsForAnother(t *testing.T) {
	t.Parallel()
	config, conn := newDatabase(t)
	execute(t, conn, fmt.Sprintf("select pg_advisory_lock(%d)", LockKey))
	ctx, cancel := context.WithCancel(t.Context())
	waits := make(chan struct{}, 1)
	log := slog.New(slog.NewTextHandler(writer(func(p []byte) {
		if bytes.Contains(p, []byte("another migration")) {
			waits <- struct{}{}
		}
	}), nil))
	done := make(chan error, 1)
	go func() { done <- Up(ctx, config, usual, log) }()
	<-waits
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the cancellation", err)
	}
}

type writer func([]byte)

func (w writer) Write(p []byte) (int, error) { w(p); return len(p), nil }

func TestExistingPartitionedTable(t *testing.T) {
	t.Parallel()
	config, conn := newDatabase(t)
	execute(t, conn, `
		create table events (
			id text not null, version int not null default 0, aggregate_type text not null, event_type text not null,
			payload jsonb not null, status text not null, published_at timestamptz, failed_at timestamptz,
			failed_reasons text[], failed_attempts int not null default 0, retried_at timestamptz,
			retried_attempts int not null default 0, created_at timestamptz not null, primary key (id, created_at)
		) partition by range (created_at);
		create table events_all partition of events default`)
	for range 2 {
		up(t, config, usual)
	}
	requireWorks(t, conn, usual)
	if table := query[string](t, conn, "select tableoid::regclass::text from events"); table != "events_all" {
		t.Errorf("the row is in %s", table)
	}
	runAlone(t, config, render(t, usual))
}

func TestFillfactor(t *testing.T) {
	t.Parallel()
	config, conn := newDatabase(t)
	const options = "select coalesce(array_to_string(reloptions, ','), '') from pg_class where oid = 'events'::regclass"
	up(t, config, usual)
	if got := query[string](t, conn, options); got != "fillfactor=50" {
		t.Errorf("options %q", got)
	}
	execute(t, conn, "alter table events set (fillfactor = 70)")
	execute(t, conn, render(t, usual)[1].SQL)
	if got := query[string](t, conn, options); got != "fillfactor=70" {
		t.Errorf("options %q: a chosen fillfactor is kept", got)
	}
}

// checkpoint writes one as a relay would, with the fingerprint of now.
func checkpoint(t *testing.T, conn *pgx.Conn, slot string) {
	t.Helper()
	execute(t, conn, `insert into outbox_relay_checkpoints (slot, system_identifier, timeline, commit_lsn, ordinal, confirmed_lsn,
		stream, stream_created_at, stream_sequence, unrecorded_bound, publication_state)
		values ('`+slot+`', '1', 1, '0/0', 0, '0/0', 'EVENTS', now(), 0, 0, outbox_relay_publication_state('outbox_relay', 'events'))`)
}

func TestColumnListIsExtended(t *testing.T) {
	t.Parallel()
	config, conn := newDatabase(t)
	up(t, config, usual)
	execute(t, conn, `
		create table "Other T" (a int primary key, "B b" int, c int);
		create table third (a int);
		alter publication outbox_relay add table "Other T" (a, "B b") where (a > 3 and "B b" is null), third;
		alter publication outbox_relay set table events (id, version, aggregate_type, event_type, payload, headers, status, created_at, retried_attempts),
			"Other T" (a, "B b") where (a > 3 and "B b" is null), third`)
	checkpoint(t, conn, "current")
	checkpoint(t, conn, "stale")
	execute(t, conn, "update outbox_relay_checkpoints set publication_state = 'other' where slot = 'stale'")
	const others = "select string_agg(concat(oid, '/', xmin, pg_get_expr(prqual, prrelid)), ' ' order by oid) from pg_publication_rel where prrelid <> 'events'::regclass"
	before := query[string](t, conn, others)

	target := usual
	target.Columns = []string{"failed_reasons"}
	if log := up(t, config, target); !strings.Contains(log, "publication brought up to date") {
		t.Errorf("log:\n%s", log)
	}
	target.Columns = append(target.Columns, "retried_attempts") // was there and is kept
	requireColumns(t, conn, target)
	if after := query[string](t, conn, others); after != before {
		t.Errorf("other tables' rows changed: %s, were %s", after, before)
	}
	got := query[string](t, conn, `select string_agg(concat(slot, ' ', publication_state = outbox_relay_publication_state('outbox_relay', 'events')), ', ' order by slot) from outbox_relay_checkpoints`)
	if got != "current t, stale f" {
		t.Errorf("fingerprint carried: %s", got)
	}
}

func TestPublicationIsHealed(t *testing.T) {
	t.Parallel()
	config, conn := newDatabase(t)
	up(t, config, usual)
	for _, harm := range []string{
		"drop publication outbox_relay",
		"alter publication outbox_relay drop table events",
		"alter table events rename to old; create table events (like old including all)",
	} {
		execute(t, conn, harm)
		if got := listed(t, conn, usual); got != nil {
			t.Fatalf("%s: still publishes %q", harm, got)
		}
		up(t, config, usual)
		requireColumns(t, conn, usual)
	}
}

func TestPublicationOfAllColumnsIsLeftAlone(t *testing.T) {
	t.Parallel()
	for _, of := range []string{"for all tables", "for tables in schema public", "for table events"} {
		t.Run(of, func(t *testing.T) {
			t.Parallel()
			config, conn := newDatabase(t)
			up(t, config, usual)
			execute(t, conn, "drop publication outbox_relay; create publication outbox_relay "+of)
			before := publicationRows(t, conn)
			up(t, config, usual)
			if after := publicationRows(t, conn); after != before {
				t.Errorf("changed to %s, was %s", after, before)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	withColumn := usual
	withColumn.Columns = []string{"tenant"}
	for name, c := range map[string]struct {
		target Target
		before string
		want   []string
	}{
		"missing schema": {
			target: Target{Schema: "Shop", Table: "events", Publication: "p"},
			want:   []string{`schema "Shop" does not exist`, `CREATE SCHEMA "Shop"`},
		},
		"missing column": {
			target: withColumn,
			want:   []string{`"tenant"`, "public.events", "configuration"},
		},
		"row filter": {
			target: usual,
			before: "create table events (id text primary key, aggregate_type text, event_type text, payload jsonb); create publication outbox_relay for table events where (id <> '')",
			want:   []string{"row filter", "events", "ALTER PUBLICATION"},
		},
		"unlogged": {
			target: usual,
			before: "create unlogged table events (id text primary key, version int, aggregate_type text, event_type text, payload jsonb, status text, created_at timestamptz)",
			want:   []string{"unlogged"},
		},
		"missing usual column": {
			target: usual,
			before: "create table events (id text primary key, aggregate_type text, event_type text, payload jsonb)",
			want:   []string{`"version"`, "public.events"},
		},
		"another outbox": {
			target: usual,
			before: "create table events (id text primary key, payload jsonb)",
			want:   []string{"aggregate_type, event_type", "OUTBOX_COLUMN_AGGREGATE_TYPE"},
		},
		"another id": {
			target: usual,
			before: "create table events (id uuid primary key, aggregate_type text, event_type text, payload jsonb)",
			want:   []string{"uuid", "OUTBOX_COLUMN_ID=id"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config, conn := newDatabase(t)
			execute(t, conn, c.before)
			requireError(t, Up(t.Context(), config, c.target, quiet()), c.want...)
		})
	}
}

func TestLackingPrivilege(t *testing.T) {
	t.Parallel()
	config, conn := newDatabase(t)
	role := "migrator_" + testenv.SlotName(t, config.ConnString())
	execute(t, conn, "create role "+role+" login password 'secret'; create schema mine")
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if _, err := conn.Exec(ctx, "drop owned by "+role+"; drop role "+role); err != nil {
			t.Error(err)
		}
	})
	weak := config.Copy()
	weak.User, weak.Password = role, "secret"
	target := Target{Schema: "mine", Table: "events", Publication: "p"}

	for _, grant := range []string{
		"grant usage on schema mine to " + role,
		"grant create on schema mine to " + role,
	} {
		execute(t, conn, grant)
		err := Up(t.Context(), weak, target, quiet())
		requireError(t, err, role, "owner of mine.events", "CREATE on schema mine", "CREATE on database")
		var pgErr *pgconn.PgError
		if !errors.As(err, &pgErr) || pgErr.Code != InsufficientPrivilege {
			t.Errorf("the cause is lost: %v", err)
		}
	}
	execute(t, conn, "grant create on database "+Quote(config.Database)+" to "+role)
	up(t, weak, target)
	requireWorks(t, conn, target)
}

func TestWALLevelIsWarnedOf(t *testing.T) {
	t.Parallel()
	c := testenv.OwnPostgres(t, map[string]string{"wal_level": "replica"})
	log := up(t, parse(t, c.URL("postgres")), usual)
	for _, want := range []string{"level=WARN", "wal_level=replica", "ALTER SYSTEM"} {
		if !strings.Contains(log, want) {
			t.Errorf("log lacks %s:\n%s", want, log)
		}
	}
}
