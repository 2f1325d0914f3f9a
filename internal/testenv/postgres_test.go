package testenv

import (
	"context"
	"regexp"
	"testing"

	"outbox-relay/internal/pgserver"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

func query[T any](tb testing.TB, url, sql string, args ...any) T {
	tb.Helper()
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		tb.Fatal(err)
	}
	defer conn.Close(ctx)
	var value T
	if err := conn.QueryRow(ctx, sql, args...).Scan(&value); err != nil {
		tb.Fatalf("%s: %v", sql, err)
	}
	return value
}

func TestPostgresIsShared(t *testing.T) {
	if first, second := Postgres(t), Postgres(t); first != second {
		t.Error("two clusters")
	}
}

func TestOwnPostgres(t *testing.T) {
	c := OwnPostgres(t, map[string]string{"wal_sender_timeout": "1234"})
	if got := query[string](t, c.URL("postgres"), "SHOW wal_sender_timeout"); got != "1234ms" {
		t.Errorf("wal_sender_timeout = %s", got)
	}
	Database(t, c) // its Cleanup must bear a stopped cluster
	if err := c.Stop(t.Context(), pgserver.Immediate); err != nil {
		t.Fatal(err)
	}
}

// TestDatabaseIsDroppedInUse has an idle slot, one that a session streams from,
// and a session in a transaction.
func TestDatabaseIsDroppedInUse(t *testing.T) {
	c := Postgres(t)
	var name string
	t.Run("Uses it, \"quoted\" & with a name longer than Postgres takes", func(t *testing.T) {
		url := Database(t, c)
		name = query[string](t, url, "SELECT current_database()")
		query[string](t, url, "SELECT slot_name FROM pg_create_logical_replication_slot('testenv_idle', 'pgoutput')")
		query[string](t, url, "SELECT slot_name FROM pg_create_logical_replication_slot('testenv_busy', 'pgoutput')")
		stream(t, url, "testenv_busy")
	})
	if !regexp.MustCompile(`^[a-z0-9_]{1,63}$`).MatchString(name) {
		t.Errorf("database name %q", name)
	}
	left := query[int](t, c.URL("postgres"), `SELECT (SELECT count(*) FROM pg_database WHERE datname = $1)
		+ (SELECT count(*) FROM pg_replication_slots WHERE database = $1)`, name)
	if left != 0 {
		t.Errorf("%d databases or slots left of %s", left, name)
	}
}

// stream leaves a walsender active on slot: dropping the database has to end it.
func stream(t *testing.T, url, slot string) {
	t.Helper()
	ctx := context.Background()
	conn, err := pgconn.Connect(ctx, url+"&replication=database")
	if err != nil {
		t.Fatal(err)
	}
	options := pglogrepl.StartReplicationOptions{PluginArgs: []string{"proto_version '1'", "publication_names 'p'"}}
	if err := pglogrepl.StartReplication(ctx, conn, slot, 0, options); err != nil {
		t.Fatal(err)
	}
	if !query[bool](t, url, "SELECT active FROM pg_replication_slots WHERE slot_name = $1", slot) {
		t.Fatal("the slot is not in use")
	}
}
