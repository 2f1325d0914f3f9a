package ops_test

import (
	"context"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/testenv"
	"outbox-relay/ops"
	"outbox-relay/relay"
)

const insertOne = `insert into events (aggregate_type, event_type, payload) values ('order', 'placed', '{}')`

// tick waits until the relay's watch has certainly looked several times.
func (s *served) tick(config relay.Config) {
	from := time.Now()
	testenv.Eventually(s, "some looks", func() bool { return time.Since(from) > 3*config.StallAfter })
}

// A recorder that Postgres does not answer is a stall: everything else looks
// well. With nothing to do it is none, and when the answer comes it is over.
func TestRecorderWithoutAnswerIsAStall(t *testing.T) {
	e := newEnds(t)
	config := e.config()
	config.StallAfter = time.Second
	s := serve(t, config)
	s.run()
	s.await("/readyz", http.StatusOK, "streaming")

	tx, err := e.sql.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	if _, err := tx.Exec(t.Context(), `lock table outbox_relay_checkpoints in exclusive mode`); err != nil {
		t.Fatal(err)
	}
	s.tick(config)
	s.require("/healthz", http.StatusOK, "ok") // there is nothing to do
	app, err := pgx.ConnectConfig(t.Context(), e.sql.Config())
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close(context.Background())
	if _, err := app.Exec(t.Context(), insertOne); err != nil {
		t.Fatal(err)
	}
	s.await("/healthz", http.StatusServiceUnavailable, "Postgres has not answered the recorder")
	s.await("/healthz", http.StatusServiceUnavailable, "pg_stat_activity")
	s.await("/readyz", http.StatusServiceUnavailable, "stalled")
	if err := ops.Healthcheck(t.Context(), s.addr); err == nil || !strings.Contains(err.Error(), "stalled") {
		t.Errorf("health check: %v", err)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.await("/healthz", http.StatusOK, "ok")
	s.await("/readyz", http.StatusOK, "streaming")
}

// An outage is no stall, however long: a restart does not mend it. The relay is
// not ready meanwhile, and says why.
func TestOutagesAreNoStall(t *testing.T) {
	e := newEnds(t)
	nats := testenv.NewProxy(t, strings.TrimPrefix(e.nats, "nats://"))
	e.nats = "nats://" + nats.Addr()
	server := e.sql.Config()
	postgres := testenv.NewProxy(t, net.JoinHostPort(server.Host, strconv.Itoa(int(server.Port))))
	e.through(t, postgres.Addr())
	config := e.config()
	config.StallAfter = time.Second
	s := serve(t, config)
	s.run()
	s.await("/readyz", http.StatusOK, "streaming")

	nats.Stall(true) // a frozen server: connections stand, and nobody answers
	e.exec(t, insertOne)
	s.await("/readyz", http.StatusServiceUnavailable, "publishing to the stream is interrupted")
	s.tick(config)
	s.await("/healthz", http.StatusOK, "ok, and no restart would help: streaming: publishing to the stream is interrupted: no answer from the stream")
	nats.Stall(false)
	s.await("/readyz", http.StatusOK, "streaming")
	s.await("/healthz", http.StatusOK, "ok")

	postgres.Refuse(true)
	postgres.Cut()
	s.await("/readyz", http.StatusServiceUnavailable, "starting: connect to Postgres")
	s.tick(config)
	s.await("/healthz", http.StatusOK, "ok, and no restart would help: starting: connect to Postgres")
	postgres.Refuse(false)
	s.await("/readyz", http.StatusOK, "streaming")
}

// A standby does its part, and waits for as long as it takes.
func TestStandbyIsWellAndReady(t *testing.T) {
	e := newEnds(t)
	first := serve(t, e.config())
	first.run()
	first.await("/readyz", http.StatusOK, "streaming")
	config := e.config()
	config.StallAfter = time.Second
	second := serve(t, config)
	second.run()
	second.await("/readyz", http.StatusOK, "standby")
	second.tick(config)
	second.require("/healthz", http.StatusOK, "ok")
}
