package ops_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
	"outbox-relay/ops"
	"outbox-relay/relay"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// toward has the doctor reach NATS as change says.
func toward(change func(*sink.Config)) func(*relay.Config) {
	return func(c *relay.Config) {
		before := c.Sink
		c.Sink = func(system replication.System) sink.Config {
			config := before(system)
			change(&config)
			return config
		}
	}
}

func (d *desk) js() jetstream.JetStream {
	d.Helper()
	nc, err := nats.Connect(d.nats.URL())
	d.must(err)
	d.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	d.must(err)
	return js
}

// require requires one line of the diagnosis; with a command, where it has one.
func (d *desk) require(lines map[string]ops.Check, check, state, shell string, words ...string) {
	d.Helper()
	d.requireLine(ailment{check: check, state: state, words: words}, lines[check])
	if got := lines[check].Shell; shell == "" && got != "" || !strings.Contains(got, shell) {
		d.Errorf("%s has the command %q, want %q", check, got, shell)
	}
}

// Each kind of stream that the relay refuses has its line.
func TestDoctorOfStreams(t *testing.T) {
	t.Parallel()
	d := setup(t)
	js := d.js()
	_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "ORIGIN", Subjects: []string{"origin.>"}})
	d.must(err)
	const file = "nats stream edit EVENTS --force --config=EVENTS.json"
	for _, c := range []struct {
		change func(*jetstream.StreamConfig)
		check  string
		state  string
		shell  string
		words  []string
	}{
		{func(c *jetstream.StreamConfig) { c.Sources = []*jetstream.StreamSource{{Name: "ORIGIN"}} }, "stream_kind", "fault", file, []string{"has sources"}},
		{func(c *jetstream.StreamConfig) { c.Subjects, c.Mirror = nil, &jetstream.StreamSource{Name: "ORIGIN"} }, "stream_kind", "fault", "", []string{"is a mirror", "another OUTBOX_STREAM"}},
		{func(c *jetstream.StreamConfig) { c.AllowMsgTTL, c.SubjectDeleteMarkerTTL = true, time.Minute }, "stream_kind", "fault", file, []string{"delete markers"}},
		{func(c *jetstream.StreamConfig) { c.AllowMsgCounter = true }, "stream_kind", "fault", "", []string{"counters"}},
		{func(c *jetstream.StreamConfig) { c.AllowMsgSchedules = true }, "stream_kind", "fault", "", []string{"schedules"}},
		{func(c *jetstream.StreamConfig) { c.Retention = jetstream.InterestPolicy }, "stream_kind", "fault", file, []string{"interest retention"}},
		{func(c *jetstream.StreamConfig) { c.Storage = jetstream.MemoryStorage }, "stream_kind", "fault", "", []string{"in memory"}},
		{func(c *jetstream.StreamConfig) {
			c.Discard, c.DiscardNewPerSubject, c.MaxMsgsPerSubject = jetstream.DiscardNew, true, 10
		}, "stream_kind", "fault", file, []string{"discard_new_per_subject"}},
		{func(c *jetstream.StreamConfig) { c.NoAck = true }, "stream_kind", "fault", file, []string{"no_ack"}},
		{func(c *jetstream.StreamConfig) { c.Sealed = true }, "stream_kind", "fault", "", []string{"is sealed"}},
		{func(c *jetstream.StreamConfig) { c.PersistMode = jetstream.AsyncPersistMode }, "stream_kind", "fault", "", []string{"asynchronously"}},
		{func(c *jetstream.StreamConfig) { c.Subjects = []string{"orders.>"} }, "stream_subjects", "fault", "nats stream edit EVENTS --force --subjects='orders.>,events.*.*'", []string{"do not cover events.*.*"}},
		{func(c *jetstream.StreamConfig) {
			c.Metadata = map[string]string{"outbox-relay.system": "7001", "outbox-relay.slot": "billing"}
		}, "stream_owner", "fault", "", []string{"slot billing of Postgres cluster 7001", "another OUTBOX_STREAM"}},
		{func(c *jetstream.StreamConfig) { c.MaxMsgs = 1000 }, "stream_limits", "warning", "nats stream edit EVENTS --force --discard=new", []string{"at most 1,000 messages, discard old"}},
		{func(c *jetstream.StreamConfig) { c.MaxMsgSize = 1000 }, "stream_message_size", "warning", "--max-msg-size=-1", []string{"1000 B, less than the server's 1.0 MiB"}},
		{func(c *jetstream.StreamConfig) {}, "stream_durability", "warning", "", []string{"sync_interval", "1 replica"}},
	} {
		config := jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.*.*"}, Storage: jetstream.FileStorage}
		c.change(&config)
		sealed := config.Sealed
		config.Sealed = false
		_, err := js.CreateStream(t.Context(), config)
		d.must(err)
		if config.Sealed = sealed; sealed {
			_, err = js.UpdateStream(t.Context(), config)
			d.must(err)
		}
		d.require(d.diagnose(d.doctor()), "nats."+c.check, c.state, c.shell, c.words...)
		stream, err := js.Stream(t.Context(), "EVENTS")
		d.must(err)
		if n := stream.CachedInfo().State.Msgs; n != 0 {
			t.Errorf("the stream has %d messages of the doctor", n)
		}
		d.must(js.DeleteStream(t.Context(), "EVENTS"))
	}
	lines := d.diagnose(d.doctor(toward(func(c *sink.Config) { c.Stream.Create = false })))
	d.require(lines, "nats.stream", "fault", "nats stream add EVENTS --subjects='events.*.*'", "does not exist", "OUTBOX_STREAM_CREATE=true")
}

// A stream that the checkpoint knows and that is gone, or was made again.
func TestDoctorOfALostStream(t *testing.T) {
	t.Parallel()
	d := setup(t)
	r := d.relay()
	d.insert(3, "order", "placed")
	testenv.Eventually(d, "the rows published", func() bool {
		return ask[int](d, `select count(*) from events where status = 'published' and aggregate_type <> 'history'`) == 3
	})
	requireAll(d, d.diagnose(d.doctor()), usual...)
	r.Terminate()
	js := d.js()
	d.must(js.DeleteStream(t.Context(), "EVENTS"))
	d.treat(ailment{check: "nats.stream", state: "fault", words: []string{"the checkpoint knows it", "to start anew"}})
	_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.*.*"}})
	d.must(err)
	testenv.Eventually(d, "the slot free", func() bool {
		return ask[int](d, `select count(*) from pg_replication_slots where active and slot_name = $1`, d.slot) == 0
	})
	d.treat(ailment{check: "nats.stream_checkpoint", state: "fault", words: []string{"deleted and made again", "to start anew"}, cure: "sql"})
	d.treat(ailment{make: `insert into outbox_relay_checkpoints (slot, system_identifier, timeline, commit_lsn, ordinal, confirmed_lsn, stream, stream_created_at, stream_sequence, unrecorded_bound)
			select '$SLOT', system_identifier, 1, '0/1', 0, '0/1', 'OTHER', now(), 0, 0 from pg_control_system()`,
		check: "nats.stream_checkpoint", state: "fault", words: []string{"belongs to stream OTHER", "OUTBOX_SLOT"}})
}

func TestDoctorFindsNoNATS(t *testing.T) {
	t.Parallel()
	d := setup(t)
	secret := func() (string, error) { return "wrong", nil }
	locked := testenv.NATS(t, testenv.NATSOptions{Edit: func(o *server.Options) { o.Users = []*server.User{{Username: "relay", Password: "right"}} }})
	plain := testenv.NATS(t, testenv.NATSOptions{NoJetStream: true})
	for _, c := range []struct {
		change       func(*sink.Config)
		check, shell string
		words        []string
	}{
		{func(c *sink.Config) {
			c.Servers = []string{fmt.Sprintf("nats://127.0.0.1:%d", testenv.FreePort(d))}
		}, "nats.connection", "", []string{"no servers", "OUTBOX_NATS_URL"}},
		{func(c *sink.Config) {
			c.Servers, c.Auth = []string{locked.URL()}, sink.Auth{User: "relay", Password: secret}
		}, "nats.connection", "", []string{"Authorization", "_PASSWORD"}},
		{func(c *sink.Config) { c.Servers = []string{testenv.OldNATS(d, "2.10.26")} }, "nats.connection", "", []string{"version 2.10.26", "2.10.27 or newer"}},
		{func(c *sink.Config) { c.Servers, c.TLS = []string{d.nats.URL()}, sink.TLS{CA: "/nowhere"} }, "nats.connection", "", []string{"secure"}},
		{func(c *sink.Config) { c.Servers = []string{plain.URL()} }, "nats.stream", "nats-server -js", []string{"JetStream is not enabled"}},
	} {
		lines := d.diagnose(d.doctor(toward(c.change)))
		line := lines[c.check]
		d.says(line.Found+" -> "+line.Remedy, c.words...)
		if line.State != "fault" || line.Shell != c.shell || lines["postgres.table"].State != "ok" || lines["nats.stream_kind"].State != "skipped" {
			t.Errorf("%+v, and the others %+v", line, lines)
		}
	}
}

// What the relay's user may not do is found by trying it, and nothing is stored.
func TestDoctorTriesPermissions(t *testing.T) {
	t.Parallel()
	d := setup(t)
	allowed := func(publish, subscribe string) *server.Permissions {
		return &server.Permissions{Publish: &server.SubjectPermission{Allow: strings.Fields(publish)}, Subscribe: &server.SubjectPermission{Allow: strings.Fields(subscribe)}}
	}
	const create, info, get, events = "$JS.API.STREAM.CREATE.EVENTS", "$JS.API.STREAM.INFO.EVENTS", "$JS.API.STREAM.MSG.GET.EVENTS", "events.>"
	users := map[string]*server.Permissions{
		"all": allowed(strings.Join([]string{create, info, get, events}, " "), "_INBOX_test.>"), "no_info": allowed(get+" "+events, "_INBOX_test.>"),
		"no_get": allowed(info+" "+events, "_INBOX_test.>"), "no_events": allowed(info+" "+get, "_INBOX_test.>"), "no_inbox": allowed("$JS.API.> events.>", "other.>"),
		"no_create": allowed(info, "_INBOX_test.>"),
	}
	n := testenv.NATS(t, testenv.NATSOptions{Edit: func(o *server.Options) {
		o.NoAuthUser = "admin"
		o.Users = []*server.User{{Username: "admin", Password: "x"}}
		for name, permissions := range users {
			o.Users = append(o.Users, &server.User{Username: name, Password: "x", Permissions: permissions})
		}
	}})
	d.nats = n
	as := func(user string) map[string]ops.Check {
		return d.diagnose(d.doctor(toward(func(c *sink.Config) {
			c.Servers, c.Auth = []string{n.URL()}, sink.Auth{User: user, Password: func() (string, error) { return "x", nil }}
		})))
	}
	const grant = `publish: { allow: ["events.*.*", "$JS.API.STREAM.INFO.EVENTS", "$JS.API.STREAM.MSG.GET.EVENTS", "$JS.API.STREAM.CREATE.EVENTS"] }, subscribe: { allow: ["_INBOX_test.>"] }`
	if line := as("all")["nats.stream"]; line.State != "ok" {
		t.Errorf("it may make the stream: %+v", line)
	}
	d.require(as("no_create"), "nats.stream", "fault", "", create, grant)
	js := d.js()
	stream, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.*.*"}})
	d.must(err)
	if lines := as("all"); lines["nats.may_publish"].State != "ok" || lines["nats.may_read"].State != "ok" || lines["nats.account"].State != "skipped" {
		t.Errorf("with all that it needs: %+v", lines)
	}
	d.require(as("no_info"), "nats.stream", "fault", "", info, grant)
	d.require(as("no_inbox"), "nats.stream", "fault", "", "_INBOX_test.", grant)
	d.require(as("no_events"), "nats.may_publish", "fault", "", "events.outbox_relay_doctor.outbox_relay_doctor", grant)
	d.require(as("no_get"), "nats.may_read", "fault", "", get, grant)
	state, err := stream.Info(t.Context())
	d.must(err)
	if state.State.LastSeq != 0 {
		t.Errorf("the stream has %d messages", state.State.LastSeq)
	}
}

func TestDoctorSeesTLSToNATS(t *testing.T) {
	t.Parallel()
	d := setup(t)
	a := testenv.NewAuthority(t)
	certificate := a.Issue("server")
	d.nats = testenv.NATS(t, testenv.NATSOptions{Edit: func(o *server.Options) {
		o.TLSConfig, o.TLS, o.TLSTimeout = &tls.Config{Certificates: []tls.Certificate{certificate}}, true, 5
	}})
	secured := strings.Replace(d.nats.URL(), "127.0.0.1", "localhost", 1)
	lines := d.diagnose(d.doctor(toward(func(c *sink.Config) { c.Servers, c.TLS = []string{secured}, sink.TLS{CA: a.Path("ca.pem")} })))
	if line := lines["nats.tls"]; line.State != "ok" || !strings.Contains(line.Found, "TLS 1.3") {
		t.Errorf("%+v", line)
	}
}

// closing is a way to a NATS server that ends for good at the client's n-th publish, by an
// error of the protocol after which the client library gives the connection up. passed is
// how many publishes it has seen.
func closing(t *testing.T, target string, n int64) (addr string, passed *atomic.Int64) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	passed = &atomic.Int64{}
	serve := func(client net.Conn) {
		defer client.Close()
		server, err := net.Dial("tcp", target)
		if err != nil {
			t.Error(err)
			return
		}
		defer server.Close()
		go func() { _, _ = io.Copy(client, server) }()
		for lines := bufio.NewReader(client); ; {
			line, err := lines.ReadBytes('\n')
			if err != nil {
				return
			}
			if bytes.HasPrefix(line, []byte("PUB ")) || bytes.HasPrefix(line, []byte("HPUB ")) {
				if passed.Add(1) == n {
					_, _ = client.Write([]byte("-ERR 'an error that no client knows'\r\n"))
					return
				}
			}
			if _, err := server.Write(line); err != nil {
				return
			}
		}
	}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go serve(client)
		}
	}()
	return listener.Addr().String(), passed
}

// Whenever NATS ends the connection for good, the doctor reports it, and goes on.
func TestDoctorWhoseNATSCloses(t *testing.T) {
	t.Parallel()
	d := setup(t)
	r := d.relay()
	d.insert(3, "order", "placed")
	testenv.Eventually(d, "the rows published", func() bool {
		return ask[int](d, `select count(*) from events where status = 'published' and aggregate_type <> 'history'`) == 3
	})
	r.Terminate()
	target := strings.TrimPrefix(d.nats.URL(), "nats://")
	for n := int64(1); ; n++ {
		addr, passed := closing(t, target, n)
		lines := d.diagnose(d.doctor(toward(func(c *sink.Config) { c.Servers = []string{"nats://" + addr} })))
		if passed.Load() < n {
			if n < 6 || lines["nats.stream_checkpoint"].State != "ok" {
				t.Errorf("the doctor publishes %d times, and finds %+v", n-1, lines["nats.stream_checkpoint"])
			}
			return
		}
		told := false
		for _, line := range lines {
			told = told || strings.HasPrefix(line.Group, "nats") && (line.State == "fault" || line.State == "skipped") && strings.Contains(line.Found, "clos")
		}
		if !told {
			t.Errorf("NATS closes at message %d, and the doctor says\n%+v", n, lines)
		}
	}
}
