package ops_test

import (
	"fmt"
	"net/http"
	"net/url"
	"testing"

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
		"another publication": {func(c *relay.Config) { c.Table.Publication = "other" }, "publication other does not exist"},
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
