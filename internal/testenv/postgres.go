package testenv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"outbox-relay/internal/pgserver"

	"github.com/jackc/pgx/v5"
)

// startTimeout leaves time for a download.
const startTimeout = 5 * time.Minute

var shared sharedCluster

// sharedCluster is started by the first test that asks for it.
type sharedCluster struct {
	mu      sync.Mutex
	cluster *pgserver.Cluster
	err     error
}

// Postgres returns the cluster that the test binary shares. A test that stops
// it has to start it again.
func Postgres(tb testing.TB) *pgserver.Cluster {
	tb.Helper()
	c, err := shared.get()
	if err != nil {
		tb.Fatalf("start Postgres: %v", err)
	}
	if !c.Running() {
		tb.Fatalf("an earlier test left the shared Postgres stopped; its log:\n%s", c.LogTail())
	}
	return c
}

func (s *sharedCluster) get() (*pgserver.Cluster, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cluster == nil && s.err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
		defer cancel()
		s.cluster, s.err = pgserver.Start(ctx, pgserver.Options{Logf: logToStderr})
	}
	return s.cluster, s.err
}

func (s *sharedCluster) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cluster == nil {
		return nil
	}
	return s.cluster.Close()
}

// logToStderr shows progress at once, which tb.Log does not.
func logToStderr(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// OwnPostgres starts a cluster for this test alone, with settings for its
// postgresql.conf. A failing test logs the end of the server's log.
func OwnPostgres(tb testing.TB, settings map[string]string) *pgserver.Cluster {
	tb.Helper()
	return owned(tb, func(ctx context.Context) (*pgserver.Cluster, error) {
		return pgserver.Start(ctx, pgserver.Options{Settings: settings, Logf: logToStderr})
	})
}

// OwnPostgresSince is OwnPostgres of at least that major version.
func OwnPostgresSince(tb testing.TB, major int, settings map[string]string) *pgserver.Cluster {
	tb.Helper()
	if version, err := strconv.Atoi(os.Getenv("POSTGRES_VERSION")); err == nil {
		major = max(major, version)
	}
	return owned(tb, func(ctx context.Context) (*pgserver.Cluster, error) {
		return pgserver.Start(ctx, pgserver.Options{Major: major, Settings: settings, Logf: logToStderr})
	})
}

// CopyPostgres is a copy of a cluster that is stopped, and not started either;
// see pgserver.Copy.
func CopyPostgres(tb testing.TB, c *pgserver.Cluster, signal string, settings map[string]string) *pgserver.Cluster {
	tb.Helper()
	return owned(tb, func(ctx context.Context) (*pgserver.Cluster, error) { return c.Copy(ctx, signal, settings) })
}

// owned starts a cluster that the test closes.
func owned(tb testing.TB, start func(context.Context) (*pgserver.Cluster, error)) *pgserver.Cluster {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	c, err := start(ctx)
	if err != nil {
		tb.Fatalf("start Postgres: %v", err)
	}
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("end of the log of Postgres:\n%s", c.LogTail())
		}
		if err := c.Close(); err != nil {
			tb.Errorf("close Postgres: %v", err)
		}
	})
	return c
}

var databases atomic.Int64

// Database creates an empty database named after the test and returns its URL: for
// a test that says why it does not take a SeasonedDatabase. Cleanup
// drops it with its replication slots, whoever still uses them; it leaves a
// cluster alone that no longer runs.
func Database(tb testing.TB, c *pgserver.Cluster) string {
	tb.Helper()
	name := databaseName(tb.Name(), databases.Add(1))
	createDatabase(tb, c, name, "")
	return c.URL(name)
}

// EncodedDatabase is Database whose text is in another encoding than UTF8.
func EncodedDatabase(tb testing.TB, c *pgserver.Cluster, encoding string) string {
	tb.Helper()
	name := databaseName(tb.Name(), databases.Add(1))
	createDatabase(tb, c, name, "TEMPLATE template0 LOCALE 'C' ENCODING '"+encoding+"'")
	return c.URL(name)
}

// createDatabase creates a database that Cleanup drops.
func createDatabase(tb testing.TB, c *pgserver.Cluster, name, options string) {
	tb.Helper()
	if err := execute(c, "CREATE DATABASE "+pgx.Identifier{name}.Sanitize()+" "+options); err != nil {
		tb.Fatalf("create database %s: %v", name, err)
	}
	tb.Cleanup(func() {
		if !c.Running() {
			return
		}
		if err := dropDatabase(c, name); err != nil {
			tb.Errorf("drop database %s: %v", name, err)
		}
	})
}

// databaseName makes a name of at most 63 bytes that needs no quotes.
func databaseName(test string, n int64) string {
	plain := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, strings.ToLower(test))
	return fmt.Sprintf("t%d_%.40s", n, plain)
}

// dropDatabase shuts the database to new sessions first, so that no relay that
// connects again can take a slot back.
func dropDatabase(c *pgserver.Cluster, name string) error {
	quoted := pgx.Identifier{name}.Sanitize()
	if err := execute(c, "ALTER DATABASE "+quoted+" ALLOW_CONNECTIONS false"); err != nil {
		return err
	}
	if err := dropSlots(c, name); err != nil {
		return fmt.Errorf("its replication slots: %w", err)
	}
	return execute(c, "DROP DATABASE "+quoted+" WITH (FORCE)")
}

func dropSlots(c *pgserver.Cluster, database string) error {
	return withConn(c, func(ctx context.Context, conn *pgx.Conn) error {
		for {
			var active int
			err := conn.QueryRow(ctx, `SELECT count(pg_terminate_backend(active_pid)) FROM pg_replication_slots
				WHERE database = $1 AND active_pid IS NOT NULL`, database).Scan(&active)
			if err != nil {
				return err
			}
			if active == 0 {
				_, err := conn.Exec(ctx, "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = $1", database)
				return err
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
}

func execute(c *pgserver.Cluster, sql string) error {
	return withConn(c, func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, sql)
		return err
	})
}

// withConn lends a connection to the cluster's database postgres, for as long as patience.
func withConn(c *pgserver.Cluster, use func(context.Context, *pgx.Conn) error) error {
	return withConnTo(c, "postgres", use)
}

func withConnTo(c *pgserver.Cluster, database string, use func(context.Context, *pgx.Conn) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := pgx.Connect(ctx, c.URL(database))
	if err != nil {
		return err
	}
	return errors.Join(use(ctx, conn), conn.Close(ctx))
}
