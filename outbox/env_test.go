package outbox_test

import (
	"context"
	"log/slog"
	"testing"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/testenv"
	"outbox-relay/migrations"
	"outbox-relay/outbox"
)

// bundle is a migrated database, with a connection of the relay and one of the
// application.
type bundle struct {
	*testing.T
	url   string
	table outbox.Table
	relay *pgx.Conn
	sql   *pgx.Conn
}

func setup(t *testing.T) *bundle {
	t.Helper()
	return setupOn(t, testenv.Postgres(t))
}

func setupOn(t *testing.T, cluster *pgserver.Cluster) *bundle {
	t.Helper()
	return setupDatabase(t, testenv.SeasonedDatabase(t, cluster))
}

// setupFresh is for tests that count or list all rows of the outbox.
func setupFresh(t *testing.T) *bundle {
	t.Helper()
	b := setupDatabase(t, testenv.Database(t, testenv.Postgres(t)))
	b.migrate()
	return b
}

func setupDatabase(t *testing.T, url string) *bundle {
	t.Helper()
	b := &bundle{T: t, url: url,
		table: outbox.Table{Schema: "public", Name: "events", Publication: "outbox_relay", Slot: "slot", Mode: outbox.Mark}}
	b.relay, b.sql = b.connect(), b.connect()
	return b
}

func (b *bundle) migrate() {
	b.Helper()
	config, err := pgx.ParseConfig(b.url)
	b.must(err)
	b.must(migrations.Up(b.Context(), config, migrations.Target{Schema: "public", Table: "events", Publication: "outbox_relay"},
		slog.New(slog.DiscardHandler)))
}

func (b *bundle) must(err error) {
	if err != nil {
		b.Helper()
		b.Fatal(err)
	}
}

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

// get returns a query's only value.
func get[T any](b *bundle, sql string, args ...any) T {
	b.Helper()
	var v T
	b.must(b.sql.QueryRow(b.Context(), sql, args...).Scan(&v))
	return v
}

// insert inserts n events and returns their ids.
func (b *bundle) insert(n int) []string {
	b.Helper()
	rows, err := b.sql.Query(b.Context(), `insert into events (aggregate_type, event_type, payload)
		select 'order', 'created', '{}' from generate_series(1, $1) returning id`, n)
	b.must(err)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	b.must(err)
	return ids
}
