package ops_test

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"outbox-relay/internal/testenv"
	"outbox-relay/relay"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// editSink changes what a configuration says of NATS.
func editSink(c *relay.Config, edit func(*sink.Config)) {
	before := c.Sink
	c.Sink = func(system replication.System) sink.Config {
		config := before(system)
		edit(&config)
		return config
	}
}

// A standby that could not take over is not ready, and says why: a rolling update
// would end the relay that works. It leaves everything as it is.
func TestStandbyThatCouldNotTakeOver(t *testing.T) {
	t.Parallel()
	e := newEndsOn(t, testenv.OwnPostgres(t, nil))
	first := serve(t, e.config())
	first.run()
	first.await("/readyz", http.StatusOK, "streaming")
	e.exec(t, `create role reader login; grant pg_read_all_data to reader`)
	for name, c := range map[string]struct {
		change func(*relay.Config)
		says   string
	}{
		"NATS is not there": {func(c *relay.Config) {
			editSink(c, func(s *sink.Config) { s.Servers = []string{fmt.Sprintf("nats://127.0.0.1:%d", testenv.FreePort(t))} })
		}, "connect to NATS"},
		"NATS refuses the password": {func(c *relay.Config) {
			editSink(c, func(s *sink.Config) {
				s.Auth = sink.Auth{User: testenv.RelayName, Password: func() (string, error) { return "wrong", nil }}
			})
		}, "Authorization Violation"},
		"another stream": {func(c *relay.Config) { editSink(c, func(s *sink.Config) { s.Stream.Name = "OTHER" }) },
			"the checkpoint belongs to stream EVENTS and OUTBOX_STREAM is OTHER"},
		"subjects that the stream does not have": {func(c *relay.Config) { editSink(c, func(s *sink.Config) { s.Stream.Subjects = "orders.*" }) },
			"do not cover orders.*"},
		"a role without REPLICATION": {func(c *relay.Config) {
			u, err := url.Parse(e.postgres)
			if err != nil {
				t.Fatal(err)
			}
			u.User = url.User("reader")
			c.Postgres = func() (string, error) { return u.String(), nil }
		}, "42501"},
	} {
		t.Run(name, func(t *testing.T) {
			config := e.config()
			c.change(&config)
			second := serve(t, config)
			second.run()
			second.await("/readyz", http.StatusServiceUnavailable, "standby: could not take over: ")
			second.await("/readyz", http.StatusServiceUnavailable, c.says)
			second.await("/healthz", http.StatusOK, "ok")
			second.requireState("standby")
		})
	}
	first.await("/readyz", http.StatusOK, "streaming")
}

// It looks again and again, and is ready again when what was wrong is right.
func TestStandbyLooksAgain(t *testing.T) {
	t.Parallel()
	e := newEndsOn(t, testenv.OwnPostgres(t, map[string]string{"max_wal_senders": "3"}))
	first := serve(t, e.config())
	stop := first.run()
	first.await("/readyz", http.StatusOK, "streaming")
	proxy := testenv.NewProxy(t, strings.TrimPrefix(e.nats, "nats://"))
	e.nats = "nats://" + proxy.Addr()
	config := e.config()
	config.CheckEvery = 100 * time.Millisecond
	second := serve(t, config)
	second.run()
	second.await("/readyz", http.StatusOK, "standby")

	proxy.Refuse(true)
	second.await("/readyz", http.StatusServiceUnavailable, "standby: could not take over: connect to NATS")
	second.await("/metrics", http.StatusOK, `outbox_relay_trouble{reason="no_takeover"} 1`)
	proxy.Refuse(false)
	second.await("/readyz", http.StatusOK, "standby")

	e.exec(t, `update outbox_relay_checkpoints set format = 9`)
	second.await("/readyz", http.StatusServiceUnavailable, "its format is 9")
	e.exec(t, `update outbox_relay_checkpoints set format = 1`)
	second.await("/readyz", http.StatusOK, "standby")

	var taken []*replication.Conn
	testenv.Eventually(t, "all walsenders to be taken", func() bool {
		conn, err := replication.Connect(t.Context(), &e.sql.Config().Config)
		if err == nil {
			taken = append(taken, conn)
		}
		_, body := second.get("/readyz")
		return strings.Contains(body, "raise max_wal_senders")
	})
	for _, conn := range taken {
		conn.Close()
	}
	second.await("/readyz", http.StatusOK, "standby")
	stop()
	second.await("/readyz", http.StatusOK, "streaming")
}
