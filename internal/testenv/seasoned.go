package testenv

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"sync"
	"testing"
	"time"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/wait"
	"outbox-relay/migrations"

	"github.com/jackc/pgx/v5"
)

// A seasoned database is one that has been in use: what it holds, how it is set, and
// who else is there are made here, once a cluster, in a template.

// History is the aggregate type of all rows of a seasoned outbox. None of them is
// pending, and those that failed have been retried too often to be retried again by
// the relay itself, so none has a place in a stream.
const History = "history"

// historyRows is how many they are: enough for a plan that reads all of them for
// each row of a batch to show.
const historyRows = 20_000

// The templates. The second one is made from the first.
const (
	inhabited = "outbox_relay_inhabited" // neighbours alone, no outbox
	seasoned  = "outbox_relay_seasoned"
)

// SeasonedDatabase is Database with an outbox, public.events and its publication
// outbox_relay, that migrations.Up has made and that has a long history: of rows
// published and failed, of columns dropped and added, of vacuum and a snapshot that held it up.
// There are neighbours, and names that need quotes, also the database's own.
// Database and role have settings that the application chose for itself.
func SeasonedDatabase(tb testing.TB, c *pgserver.Cluster) string {
	tb.Helper()
	return fromTemplate(tb, c, seasoned)
}

// InhabitedDatabase is SeasonedDatabase before anybody migrated: neighbours,
// settings and no outbox.
func InhabitedDatabase(tb testing.TB, c *pgserver.Cluster) string {
	tb.Helper()
	return fromTemplate(tb, c, inhabited)
}

func fromTemplate(tb testing.TB, c *pgserver.Cluster, template string) string {
	tb.Helper()
	if err := templates.make(tb, c); err != nil {
		tb.Fatalf("make the seasoned templates: %v", err)
	}
	name := databaseName(tb.Name(), databases.Add(1)) + ` "Live"`
	quoted := pgx.Identifier{name}.Sanitize()
	// A copy of files costs two checkpoints, a copy of pages their size in WAL, which
	// every walsender of the cluster would have to read.
	createDatabase(tb, c, name, "TEMPLATE "+template+" STRATEGY file_copy")
	if err := execute(c, settingsOf(quoted)); err != nil {
		tb.Fatalf("settings of database %s: %v", name, err)
	}
	return c.URL(name)
}

// SlotName is a name for a slot, unique in the cluster as that of the database at
// the URL is. It is the latter up to where that needs quotes.
func SlotName(tb testing.TB, url string) string {
	tb.Helper()
	config, err := pgx.ParseConfig(url)
	if err != nil {
		tb.Fatal(err)
	}
	return plainPart.FindString(config.Database)
}

var plainPart = regexp.MustCompile(`^[a-z0-9_]*`)

// databaseSettings are for everybody in a seasoned database, the application too.
// ALTER DATABASE … SET is not copied from a template.
var databaseSettings = []string{
	`TimeZone = 'Asia/Kathmandu'`,
	`DateStyle = 'SQL, DMY'`,
	`IntervalStyle = 'sql_standard'`,
	`bytea_output = 'escape'`,
	`extra_float_digits = 0`,
	`work_mem = '64kB'`,
	`random_page_cost = 10`,
	`plan_cache_mode = auto`,
	`jit = on`,
}

// roleSettings are for the relay's role alone: the tests' own sessions could not
// work by them.
var roleSettings = []string{
	`synchronous_commit = off`,
	`statement_timeout = '1s'`,
	`lock_timeout = '100ms'`,
	`idle_in_transaction_session_timeout = '500ms'`,
	`idle_session_timeout = '2s'`,
	`default_transaction_isolation = 'serializable'`,
	`standard_conforming_strings = off`,
	`client_min_messages = error`,
	`search_path = ''`,
	`jit_above_cost = 0`,
	`work_mem = '64kB'`,
}

// settingsOf gives the database of that quoted name its settings.
func settingsOf(quoted string) (sql string) {
	for _, setting := range databaseSettings {
		sql += fmt.Sprintf("ALTER DATABASE %s SET %s;\n", quoted, setting)
	}
	for _, setting := range roleSettings {
		sql += fmt.Sprintf("ALTER ROLE %s IN DATABASE %s SET %s;\n", RelayName, quoted, setting)
	}
	return sql
}

var templates templateMakers

// templateMakers keeps tests of one cluster from making its templates at once.
type templateMakers struct {
	mu    sync.Mutex
	locks map[*pgserver.Cluster]*sync.Mutex
}

func (t *templateMakers) of(c *pgserver.Cluster) *sync.Mutex {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.locks == nil {
		t.locks = map[*pgserver.Cluster]*sync.Mutex{}
	}
	if t.locks[c] == nil {
		t.locks[c] = new(sync.Mutex)
	}
	return t.locks[c]
}

// make makes the templates of a cluster that has none yet.
func (t *templateMakers) make(tb testing.TB, c *pgserver.Cluster) error {
	lock := t.of(c)
	lock.Lock()
	defer lock.Unlock()
	there, err := haveTemplates(c)
	if err != nil || there {
		return err
	}
	if err := leaveSlot(c); err != nil {
		return fmt.Errorf("another tool's slot: %w", err)
	}
	if err := inTemplate(c, inhabited, "template1", inhabit); err != nil {
		return fmt.Errorf("%s: %w", inhabited, err)
	}
	err = inTemplate(c, seasoned, inhabited, func(ctx context.Context, conn *pgx.Conn) error {
		target := migrations.Target{Schema: "public", Table: "events", Publication: "outbox_relay"}
		if err := migrations.Up(ctx, conn.Config(), target, slog.New(slog.DiscardHandler)); err != nil {
			return err
		}
		GrantRoles(tb, conn.Config().ConnString())
		return season(ctx, conn)
	})
	if err != nil {
		return fmt.Errorf("%s: %w", seasoned, err)
	}
	return nil
}

// haveTemplates tells whether both are done. A cluster may be a copy of one that has them.
func haveTemplates(c *pgserver.Cluster) (there bool, err error) {
	err = withConn(c, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, `SELECT count(*) = 2 FROM pg_database WHERE datname IN ($1, $2) AND datistemplate`, inhabited, seasoned).Scan(&there)
	})
	return there, err
}

// inTemplate creates a template, lets fill work in it, and closes it to sessions.
func inTemplate(c *pgserver.Cluster, name, from string, fill func(context.Context, *pgx.Conn) error) error {
	if err := execute(c, "CREATE DATABASE "+name+" TEMPLATE "+from+" STRATEGY file_copy"); err != nil {
		return err
	}
	err := withConnTo(c, name, fill)
	return errors.Join(err, execute(c, "ALTER DATABASE "+name+" IS_TEMPLATE true ALLOW_CONNECTIONS false"))
}

// leaveSlot makes a database with a slot that another tool has left behind: it keeps
// WAL, and the dead rows of all catalogs, for as long as the cluster lives. A cluster
// without logical decoding has none.
func leaveSlot(c *pgserver.Cluster) error {
	var level string
	err := withConn(c, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, `SHOW wal_level`).Scan(&level)
	})
	if err != nil || level != "logical" {
		return err
	}
	const warehouse = "Data Warehouse"
	if err := execute(c, "CREATE DATABASE "+pgx.Identifier{warehouse}.Sanitize()); err != nil {
		return err
	}
	return withConnTo(c, warehouse, func(ctx context.Context, conn *pgx.Conn) error {
		return eachOf(ctx, conn, `SELECT pg_create_logical_replication_slot('data_warehouse', 'pgoutput')`)
	})
}

// inhabit makes the neighbours: other tables, one of them large, and what other
// tools publish.
func inhabit(ctx context.Context, conn *pgx.Conn) error {
	return eachOf(ctx, conn,
		`CREATE SCHEMA "Shop Floor"`,
		`CREATE TABLE "Shop Floor"."Order Lines" (id bigint PRIMARY KEY, "Unit Price" numeric NOT NULL, note text, changed timestamptz NOT NULL DEFAULT now())`,
		fmt.Sprintf(`INSERT INTO "Shop Floor"."Order Lines" SELECT i, i / 100.0, repeat('x', 100) FROM generate_series(1, %d) i`, neighbourRows),
		`CREATE INDEX "By Price" ON "Shop Floor"."Order Lines" ("Unit Price")`,
		`CREATE TABLE "order" ("select" text PRIMARY KEY, "Größe" int)`,
		`CREATE PUBLICATION "Data Warehouse" FOR TABLE "Shop Floor"."Order Lines", "order" WITH (publish = 'insert, update, delete')`,
		`CREATE PUBLICATION "Everything" FOR ALL TABLES`, // as Debezium makes one by default
		`VACUUM ANALYZE "Shop Floor"."Order Lines"`,
	)
}

// season gives the outbox its history.
func season(ctx context.Context, conn *pgx.Conn) error {
	err := eachOf(ctx, conn,
		`ALTER TABLE events ADD COLUMN legacy_reference bigint`,
		`ALTER TABLE events ADD COLUMN "Tenant Id" text, ADD COLUMN region text DEFAULT 'eu'`, // the latter without a rewrite
		`ALTER TABLE events SET (autovacuum_vacuum_threshold = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 0,
			autovacuum_analyze_threshold = 50, autovacuum_analyze_scale_factor = 0)`,
		fmt.Sprintf(`INSERT INTO events (aggregate_type, aggregate_id, event_type, payload, headers, "Tenant Id")
			SELECT '%s', 'order-' || i %% 1000, 'placed', jsonb_build_object('n', i), jsonb_build_object('traceparent', i), 'tenant-' || i %% 10
			FROM generate_series(1, %d) i`, History, historyRows),
		`ALTER TABLE events DROP COLUMN legacy_reference, ADD COLUMN second_reference bigint`,
	)
	if err != nil {
		return err
	}
	if err := whileASnapshotIsHeld(ctx, conn, publishHistory); err != nil {
		return err
	}
	return eachOf(ctx, conn,
		`ALTER TABLE events DROP COLUMN second_reference`,
		`VACUUM ANALYZE events`,
		// Dead rows that nobody has vacuumed yet.
		`UPDATE events SET retried_at = failed_at, retried_attempts = 1000 WHERE status = 'failed'`,
	)
}

// publishHistory does with the rows what a relay has done over weeks. What vacuum
// can't remove of it stays as free space.
func publishHistory(ctx context.Context, conn *pgx.Conn) error {
	return eachOf(ctx, conn,
		`UPDATE events SET status = 'published', published_at = now() - ('x' || right(md5(id), 5))::bit(20)::int * interval '1 second', created_at = now() - interval '14 days'`,
		`UPDATE events SET status = 'failed', published_at = NULL, failed_at = now() - interval '1 day', failed_attempts = 1,
			failed_reasons = '{"payload is larger than the server takes"}' WHERE (payload->>'n')::int % 200 = 0`,
		`UPDATE events SET failed_at = now() - interval '3 days', failed_attempts = 1, failed_reasons = '{"illegal header"}',
			retried_at = now() - interval '2 days', retried_attempts = 1 WHERE (payload->>'n')::int % 200 = 100`,
		`VACUUM events`,
	)
}

// whileASnapshotIsHeld lets use work while another session's snapshot keeps vacuum
// from removing what it makes dead.
func whileASnapshotIsHeld(ctx context.Context, conn *pgx.Conn, use func(context.Context, *pgx.Conn) error) error {
	holder, err := pgx.ConnectConfig(ctx, conn.Config())
	if err != nil {
		return err
	}
	err = eachOf(ctx, holder, `BEGIN ISOLATION LEVEL REPEATABLE READ`, `SELECT count(*) FROM events`)
	if err == nil {
		err = use(ctx, conn)
	}
	return errors.Join(err, holder.Close(ctx))
}

// eachOf runs the statements, each in a transaction of its own.
func eachOf(ctx context.Context, conn *pgx.Conn, statements ...string) error {
	for _, sql := range statements {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("%s: %w", sql, err)
		}
	}
	return nil
}

// Busy has a neighbour of the outbox, in the seasoned or inhabited database at the
// URL, change about that many of its rows a second until the test ends. Every walsender
// of the database decodes them. Where Postgres goes away it connects again.
func Busy(tb testing.TB, url string, perSecond int) {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			_ = changeNeighbour(ctx, url, perSecond) // the test may have stopped Postgres
			wait.For(ctx, 100*time.Millisecond)
		}
	}()
	tb.Cleanup(func() { cancel(); <-done })
}

// neighbourRows is how many rows the neighbour has, with ids from 1 on.
const neighbourRows = 20_000

// changeNeighbour works until ctx or its session ends.
func changeNeighbour(ctx context.Context, url string, perSecond int) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	const each = 100
	for first := 1; ctx.Err() == nil; first = (first + each) % neighbourRows {
		_, err := conn.Exec(ctx, `UPDATE "Shop Floor"."Order Lines" SET changed = clock_timestamp() WHERE id BETWEEN $1 AND $2`, first, first+each-1)
		if err != nil {
			return err
		}
		wait.For(ctx, each*time.Second/time.Duration(perSecond))
	}
	return nil
}
