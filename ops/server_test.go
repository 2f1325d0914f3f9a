package ops_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/testenv"
	"outbox-relay/migrations"
	"outbox-relay/ops"
	"outbox-relay/outbox"
	"outbox-relay/relay"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// served is a relay's server on a port of its own.
type served struct {
	*testing.T
	relay *relay.Relay
	addr  string
}

func serve(t *testing.T, config relay.Config, changes ...func(*ops.Serving)) *served {
	t.Helper()
	registry := prometheus.NewRegistry()
	journal := ops.NewJournal(slog.DiscardHandler)
	log := slog.New(journal)
	r := relay.New(config, log, relay.NewMetrics(registry))
	serving := ops.Serving{Relay: r, Gatherer: registry, Journal: journal, Log: log, Version: "development", Stream: "EVENTS",
		Admin: ops.Admin{Postgres: config.Postgres, Table: config.Table}}
	for _, change := range changes {
		change(&serving)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ops.NewServer(serving).Run(ctx, listener) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the server ends by %v", err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
	return &served{T: t, relay: serving.Relay, addr: listener.Addr().String()}
}

// ends are where a relay under test reads and publishes.
type ends struct {
	postgres, nats string
	slot           string
	sql            *pgx.Conn
}

func newEnds(t *testing.T) *ends {
	t.Helper()
	return newEndsOn(t, testenv.Postgres(t))
}

func newEndsOn(t *testing.T, cluster *pgserver.Cluster) *ends {
	t.Helper()
	return newEndsIn(t, testenv.SeasonedDatabase(t, cluster))
}

// newPartitionedEnds has an outbox that is partitioned.
func newPartitionedEnds(t *testing.T) *ends {
	t.Helper()
	url := testenv.InhabitedDatabase(t, testenv.Postgres(t))
	config, err := pgx.ParseConfig(url)
	if err == nil {
		err = migrations.Up(t.Context(), config, migrations.Target{Schema: "public", Table: "events", Publication: "outbox_relay", Partitioned: true},
			slog.New(slog.DiscardHandler))
	}
	if err != nil {
		t.Fatal(err)
	}
	return newEndsIn(t, url)
}

func newEndsIn(t *testing.T, url string) *ends {
	t.Helper()
	e := &ends{postgres: url, nats: testenv.NATS(t, testenv.NATSOptions{}).URL()}
	config, err := pgx.ParseConfig(e.postgres)
	if err != nil {
		t.Fatal(err)
	}
	e.slot = testenv.SlotName(t, e.postgres)
	if e.sql, err = pgx.ConnectConfig(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.sql.Close(context.Background()) })
	e.exec(t, withoutFailures)
	return e
}

func (e *ends) config() relay.Config {
	return relay.Config{
		Postgres: func() (string, error) { return e.postgres, nil },
		Table:    outbox.Table{Schema: "public", Name: "events", Publication: "outbox_relay", Slot: e.slot, Mode: outbox.Mark},
		Grace:    time.Second,
		Sink: func(system replication.System) sink.Config {
			return sink.Config{Servers: []string{e.nats}, InboxPrefix: "_INBOX_outbox", MaxInflight: 1000, MaxBytes: 1 << 20,
				Stream:  sink.StreamConfig{Name: "EVENTS", Create: true, Subjects: "events.*", Replicas: 1, SystemID: system.ID, Slot: e.slot},
				Message: sink.MessageConfig{Subject: []sink.Token{{Literal: "events"}, {Column: "event_type"}}}}
		},
	}
}

// through leads the relay to Postgres by another address.
func (e *ends) through(t *testing.T, addr string) {
	t.Helper()
	u, err := url.Parse(e.postgres)
	if err != nil {
		t.Fatal(err)
	}
	u.Host = addr
	e.postgres = u.String()
}

// exec runs SQL of the application.
func (e *ends) exec(t *testing.T, sql string, args ...any) {
	t.Helper()
	if _, err := e.sql.Exec(t.Context(), sql, args...); err != nil {
		t.Fatal(err)
	}
}

// run runs the relay until the test ends, or stop is called.
func (s *served) run() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.relay.Run(ctx); err != nil {
			s.Errorf("the relay ends by %v", err)
		}
	}()
	stop = func() { cancel(); <-done }
	s.Cleanup(stop)
	return stop
}

// await waits until path answers so; text is a part of it.
func (s *served) await(path string, status int, text string) {
	s.Helper()
	testenv.Eventually(s, fmt.Sprintf("%s to answer %d %q", path, status, text), func() bool {
		got, body := s.get(path)
		return got == status && strings.Contains(body, text)
	})
}

func (s *served) get(path string) (status int, body string) {
	s.Helper()
	response, err := http.Get("http://" + s.addr + path)
	if err != nil {
		s.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		s.Fatal(err)
	}
	return response.StatusCode, strings.TrimSpace(string(text))
}

func (s *served) require(path string, status int, body string) {
	s.Helper()
	if gotStatus, got := s.get(path); gotStatus != status || got != body {
		s.Errorf("%s answers %d %q, want %d %q", path, gotStatus, got, status, body)
	}
}

// requireState looks at the gauge that has 1 for the state.
func (s *served) requireState(want string) {
	s.Helper()
	_, metrics := s.get("/metrics")
	var states []string
	for line := range strings.Lines(metrics) {
		if name, on := strings.CutSuffix(strings.TrimSpace(line), `"} 1`); on {
			if state, ok := strings.CutPrefix(name, `outbox_relay_state{state="`); ok {
				states = append(states, state)
			}
		}
	}
	if len(states) != 1 || states[0] != want {
		s.Errorf("the metrics say %q, want %s", states, want)
	}
}

// A relay that waits is well and not ready; one that halted is neither, and
// says so to who asks for containers.
func TestHealth(t *testing.T) {
	fault := errors.New("a fault that no waiting mends")
	s := serve(t, relay.Config{Postgres: func() (string, error) { return "", fault }})
	s.require("/healthz", http.StatusOK, "ok")
	s.require("/readyz", http.StatusServiceUnavailable, "starting")
	s.requireState("starting")
	if err := ops.Healthcheck(t.Context(), s.addr); err != nil {
		t.Errorf("health check: %v", err)
	}
	if err := s.relay.Run(t.Context()); !errors.Is(err, fault) {
		t.Fatalf("the relay ends by %v", err)
	}
	if status, _ := s.get("/healthz"); status != http.StatusServiceUnavailable {
		t.Errorf("healthz answers %d for a relay that halted", status)
	}
	s.require("/readyz", http.StatusServiceUnavailable, "halted: "+fault.Error())
	s.requireState("halted")
	if err := ops.Healthcheck(t.Context(), s.addr); err == nil || !strings.Contains(err.Error(), "not well") {
		t.Errorf("health check: %v", err)
	}
	if status, _ := s.get("/elsewhere"); status != http.StatusNotFound {
		t.Errorf("another path answers %d", status)
	}
	response, err := http.Post("http://"+s.addr+"/healthz", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST answers %d", response.StatusCode)
	}
}

// Ready means that events flow; the server outlives the relay, so that its end
// can be seen.
func TestReady(t *testing.T) {
	s := serve(t, newEnds(t).config())
	stop := s.run()
	s.await("/readyz", http.StatusOK, "streaming")
	s.require("/healthz", http.StatusOK, "ok")
	s.requireState("streaming")
	stop()
	if status, text := s.get("/readyz"); status != http.StatusServiceUnavailable {
		t.Errorf("readyz answers %d %q for a relay that has stopped", status, text)
	}
}

func TestHealthcheckFaults(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	for addr, want := range map[string]string{
		"":                     "OUTBOX_HTTP_ADDR is empty",
		"8080":                 "OUTBOX_HTTP_ADDR",
		closed.Addr().String(): "ask the relay",
	} {
		if err := ops.Healthcheck(t.Context(), addr); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want it to hold %q", addr, err, want)
		}
	}
}

// An address to listen on everywhere is asked on this machine.
func TestHealthcheckOfAnyAddress(t *testing.T) {
	s := serve(t, relay.Config{})
	_, port, err := net.SplitHostPort(s.addr)
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"", "0.0.0.0", "127.0.0.1", "localhost", "[::]"} {
		if err := ops.Healthcheck(t.Context(), host+":"+port); err != nil {
			t.Errorf("host %q: %v", host, err)
		}
	}
}
