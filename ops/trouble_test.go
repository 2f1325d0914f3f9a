package ops_test

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// barred keeps a relay's recorder from an answer, by a lock on a table of its own that
// nothing else needs, until the function that it returns is called.
func (e *ends) barred(t *testing.T) (release func()) {
	t.Helper()
	conn, err := pgx.ConnectConfig(t.Context(), e.sql.Config())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	if _, err := conn.Exec(t.Context(), `begin; lock table outbox_relay_leftovers in exclusive mode`); err != nil {
		t.Fatal(err)
	}
	return func() {
		if _, err := conn.Exec(context.Background(), `rollback`); err != nil {
			t.Fatal(err)
		}
	}
}

// A record that takes long shows long before it is a stall.
func TestSlowRecordIsToldBeforeItIsAStall(t *testing.T) {
	t.Parallel()
	e := newEnds(t)
	config := e.config()
	config.StallAfter = time.Hour
	s := serve(t, config)
	s.run()
	s.await("/readyz", http.StatusOK, "streaming")
	release := e.barred(t)
	e.exec(t, insertOne)
	s.await("/readyz", http.StatusServiceUnavailable, "streaming: Postgres has not answered the recorder for")
	s.await("/healthz", http.StatusOK, "ok, and no restart would help: streaming: Postgres has not answered the recorder for")
	s.await("/api/status", http.StatusOK, "Postgres has not answered the recorder for")
	s.await("/metrics", http.StatusOK, `outbox_relay_trouble{reason="slow_record"} 1`)
	if _, metrics := s.get("/metrics"); strings.Contains(metrics, "outbox_relay_record_seconds 0\n") {
		t.Error("the metrics say that the recorder does not wait")
	}
	release()
	s.await("/readyz", http.StatusOK, "streaming")
	s.await("/metrics", http.StatusOK, `outbox_relay_trouble{reason="slow_record"} 0`)
	s.await("/metrics", http.StatusOK, "outbox_relay_record_seconds 0\n")
}

// So does a step of the housekeeping that holds the recorder up.
func TestLongHousekeepingIsTold(t *testing.T) {
	t.Parallel()
	e := newPartitionedEnds(t)
	// At its second call it reads partitions for long.
	e.exec(t, `create table calls (n int primary key); insert into calls values (0)`)
	e.exec(t, `create or replace function outbox_relay_drop_partitions(outbox regclass, older interval) returns setof text as $$
		begin
			update public.calls set n = n + 1;
			if (select n from public.calls) = 2 then perform pg_sleep(600); end if;
			raise notice 'table is in use';
		end $$ language plpgsql`)
	config := e.config()
	config.Housekeeping.Retention = time.Second
	s := serve(t, config)
	s.run()
	s.await("/readyz", http.StatusServiceUnavailable, "streaming: housekeeping (retention) has held the recorder up for")
	s.await("/metrics", http.StatusOK, `outbox_relay_trouble{reason="housekeeping"} 1`)
	e.exec(t, `select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'outbox-relay housekeeper' and datname = current_database()`)
	s.await("/readyz", http.StatusOK, "streaming")
}

// A restart that has not helped is not asked for again; one that has may.
func TestRestartThatDoesNotHelpIsNotRepeated(t *testing.T) {
	t.Parallel()
	e := newEnds(t)
	config := e.config()
	config.StallAfter = time.Second
	first := serve(t, config)
	stop := first.run()
	first.await("/readyz", http.StatusOK, "streaming")
	e.exec(t, insertOne)
	first.await("/metrics", http.StatusOK, "outbox_relay_events_recorded_total 1\n")
	release := e.barred(t)
	e.exec(t, insertOne)
	first.await("/healthz", http.StatusServiceUnavailable, "Postgres has not answered the recorder")
	stop()

	second := serve(t, config)
	second.run()
	second.await("/readyz", http.StatusServiceUnavailable, "stalled: for")
	second.await("/metrics", http.StatusOK, "outbox_relay_stalled 1\n")
	second.await("/healthz", http.StatusOK, "no restart would help: stalled since the last one")
	release()
	second.await("/readyz", http.StatusOK, "streaming")
	second.await("/healthz", http.StatusOK, "ok")

	release = e.barred(t)
	e.exec(t, insertOne)
	second.await("/healthz", http.StatusServiceUnavailable, "Postgres has not answered the recorder")
	release()
	second.await("/healthz", http.StatusOK, "ok")
}

// A start that waits says for what.
func TestLongStartIsTold(t *testing.T) {
	t.Parallel()
	e := newEnds(t)
	tx, err := e.sql.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	if _, err := tx.Exec(t.Context(), `lock table outbox_relay_checkpoints`); err != nil {
		t.Fatal(err)
	}
	s := serve(t, e.config())
	s.run()
	s.await("/readyz", http.StatusServiceUnavailable, "starting: connecting to both ends has taken")
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.await("/readyz", http.StatusOK, "streaming")
}
