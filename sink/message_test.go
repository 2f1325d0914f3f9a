package sink

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/nats-io/nats.go"

	"outbox-relay/internal/lsn"
	"outbox-relay/internal/testenv"
	"outbox-relay/outbox/event"
)

var messageConfig = MessageConfig{
	Subject:     []Token{{Literal: "events"}, {Column: "aggregate_type"}, {Column: "event_type"}},
	CloudEvents: true,
	Source:      "/shop/größe slot",
	Timeline:    3,
}

func sample() *event.Event {
	return &event.Event{
		Position: event.Position{Commit: 0x1_00ABCDE0, Ordinal: 7},
		ID:       []byte("event_01"), Version: []byte("0"), AggregateType: []byte("order"), EventType: []byte("created"),
		Payload: []byte(`{"n": 12345678901234567890}`), Status: []byte("pending"), CreatedAt: []byte("2026-01-02 03:04:05.6789+00"),
	}
}

const anyLimit = 1 << 30

func TestSubjectTokens(t *testing.T) {
	long := strings.Repeat("x", 200)
	hash := func(value string) string {
		sum := sha256.Sum256([]byte(value))
		return "=~" + hex.EncodeToString(sum[:])[:16]
	}
	for _, c := range []struct{ value, want string }{
		{"order", "order"},
		{"Order_line-7", "Order_line-7"},
		{"", "="},
		{"=", "=3D"},
		{"a.b", "a=2Eb"},
		{"*", "=2A"},
		{">", "=3E"},
		{"a b\tc\r\nd", "a=20b=09c=0D=0Ad"},
		{"größe", "gr=C3=B6=C3=9Fe"},
		{"a=2Eb", "a=3D2Eb"}, // what is escaped cannot be had otherwise
		{"\x00\x7f\xff", "=00=7F=FF"},
		{long, long},
		{long + "x", long + hash(long+"x")},
		{long[:198] + ".", long[:198] + hash(long[:198]+".")}, // no half escape
		{long[:197] + ".", long[:197] + "=2E"},
		{strings.Repeat(".", 67), strings.Repeat("=2E", 66) + hash(strings.Repeat(".", 67))},
		{strings.Repeat(".", 66) + "xx", strings.Repeat("=2E", 66) + "xx"},
		{strings.Repeat(".", 66) + "xxx", strings.Repeat("=2E", 66) + "xx" + hash(strings.Repeat(".", 66)+"xxx")},
		{strings.Repeat("y", 1<<20), strings.Repeat("y", 200) + hash(strings.Repeat("y", 1<<20))},
	} {
		got, whole := appendToken([]byte("events."), []byte(c.value))
		if string(got) != "events."+c.want {
			t.Errorf("%.300q\ngot  %s\nwant events.%s", c.value, got, c.want)
		}
		if whole == strings.Contains(c.want, "=~") {
			t.Errorf("%.300q: whole %v", c.value, whole)
		}
	}
}

// Different values never meet in one token.
func FuzzSubjectToken(f *testing.F) {
	f.Add([]byte("a.b"), []byte("a=2Eb"))
	f.Add([]byte(strings.Repeat("x", 201)), []byte(strings.Repeat("x", 200)))
	f.Add([]byte(""), []byte("="))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		one, whole := appendToken(nil, a)
		two, _ := appendToken(nil, b)
		if !bytes.Equal(a, b) && bytes.Equal(one, two) {
			t.Fatalf("%q and %q both become %s", a, b, one)
		}
		if len(one) > maxToken+len("=~")+16 || len(one) == 0 || bytes.ContainsAny(one, ".*> \t\r\n") {
			t.Fatalf("%q becomes %q", a, one)
		}
		if !whole || len(a) == 0 {
			return
		}
		if back, err := url.PathUnescape(strings.ReplaceAll(string(one), "=", "%")); err != nil || back != string(a) {
			t.Fatalf("%q becomes %s, and that %q: %v", a, one, back, err)
		}
	})
}

// echo publishes what the builder made on a connection like the relay's, and
// returns the message that a consumer gets.
type echo struct {
	testing.TB
	client *Client
	got    chan *nats.Msg
}

func newEcho(t testing.TB) *echo {
	t.Helper()
	server := testenv.NATS(t, testenv.NATSOptions{})
	client := connectTo(t, Config{Servers: []string{server.URL()}})
	consumer, err := nats.Connect(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(consumer.Close)
	e := &echo{TB: t, client: client, got: make(chan *nats.Msg, 10)}
	if _, err := consumer.ChanSubscribe(">", e.got); err != nil {
		t.Fatal(err)
	}
	if err := consumer.Flush(); err != nil {
		t.Fatal(err)
	}
	return e
}

// send returns what arrives of an event: the headers but for the expected
// sequence, which it checks.
func (e *echo) send(config MessageConfig, event *event.Event) *nats.Msg {
	e.Helper()
	b := newBuilder(config)
	if err := b.build(event, anyLimit); err != nil {
		e.Fatal(err)
	}
	const reply, sequence = "_INBOX_outbox.x.1.2", 1234567
	if err := e.client.wire.publish(b, []byte(reply), sequence); err != nil {
		e.Fatal(err)
	}
	if err := e.client.wire.flush(); err != nil {
		e.Fatal(err)
	}
	select {
	case msg := <-e.got:
		if msg.Reply != reply {
			e.Errorf("reply %q", msg.Reply)
		}
		if got := msg.Header.Values("Nats-Expected-Last-Sequence"); len(got) != 1 || got[0] != fmt.Sprint(sequence) {
			e.Errorf("expected sequence %q", got)
		}
		msg.Header.Del("Nats-Expected-Last-Sequence")
		return msg
	case <-time.After(time.Minute):
		e.Fatalf("nothing arrives; the connection says %v", e.client.nc.LastError())
		return nil
	}
}

func requireHeaders(t *testing.T, got nats.Header, want map[string]string) {
	t.Helper()
	for name, value := range want {
		if values := got[name]; len(values) != 1 || values[0] != value { // by the letter: names are case-sensitive
			t.Errorf("header %s is %q, want %q", name, values, value)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d headers, want %d: %v", len(got), len(want), got)
	}
}

// What goes out as bytes comes back through a server and nats.go as the message
// that the design describes.
func TestMessageArrives(t *testing.T) {
	e := newEcho(t)
	t.Run("cloud events", func(t *testing.T) {
		event := sample()
		event.AggregateID = []byte(`o "7" %ü`)
		event.EventType = []byte("order.created\n")
		event.Headers = []byte(`{"traceparent": "00-4bf9-01", "X-Name": "  Ä \u00e9 \t: x ", "empty": ""}`)
		msg := e.send(messageConfig, event)
		if msg.Subject != "events.order.order=2Ecreated=0A" {
			t.Errorf("subject %s", msg.Subject)
		}
		if !bytes.Equal(msg.Data, event.Payload) {
			t.Errorf("body %s", msg.Data)
		}
		requireHeaders(t, msg.Header, map[string]string{
			"Nats-Msg-Id": "event_01", "Outbox-Position": "3/1/ABCDE0/7",
			"ce-specversion": "1.0", "ce-source": "/shop/gr%C3%B6%C3%9Fe%20slot", "content-type": "application/json",
			"ce-id": "event_01", "ce-type": "order.created%0A", "ce-aggregatetype": "order", "ce-eventversion": "0",
			"ce-subject": "o%20%227%22%20%25%C3%BC", "ce-time": "2026-01-02T03:04:05.6789Z",
			"traceparent": "00-4bf9-01", "X-Name": "Ä é \t: x ", "empty": "",
		})
	})
	t.Run("minimal", func(t *testing.T) {
		config := messageConfig
		config.CloudEvents = false
		event := sample()
		event.Payload = nil
		msg := e.send(config, event)
		requireHeaders(t, msg.Header, map[string]string{"Nats-Msg-Id": "event_01", "Outbox-Position": "3/1/ABCDE0/7"})
		if len(msg.Data) != 0 {
			t.Errorf("body %q", msg.Data)
		}
	})
	t.Run("long tokens", func(t *testing.T) {
		config := MessageConfig{Subject: []Token{{Literal: "events"}, {Column: "tenant"}}, Columns: event.Columns{Extra: []string{"tenant"}}}
		event := sample()
		event.Extra = [][]byte{[]byte(strings.Repeat("ö", 300))}
		msg := e.send(config, event)
		requireHeaders(t, msg.Header, map[string]string{"Nats-Msg-Id": "event_01", "Outbox-Position": "0/1/ABCDE0/7",
			"Outbox-tenant": strings.Repeat("%C3%B6", 300)})
		if len(msg.Subject) != len("events.")+33*6+len("=~")+16 {
			t.Errorf("subject %s", msg.Subject)
		}
	})
	t.Run("NULL and a big one", func(t *testing.T) {
		config := MessageConfig{Subject: []Token{{Literal: "events"}, {Column: "aggregate_id"}, {Literal: "x"}}}
		event := sample()
		event.Payload = bytes.Repeat([]byte("0123456789abcdef"), 60_000)
		msg := e.send(config, event)
		if msg.Subject != "events.=.x" || !bytes.Equal(msg.Data, event.Payload) {
			t.Errorf("subject %s, %d bytes", msg.Subject, len(msg.Data))
		}
	})
}

func TestTimes(t *testing.T) {
	for value, want := range map[string]string{
		"2026-01-02 03:04:05+00":            "2026-01-02T03:04:05Z",
		"0001-01-02 03:04:05.000001+00":     "0001-01-02T03:04:05.000001Z",
		"2026-01-02 03:04:05":               "2026-01-02T03:04:05Z", // timestamp
		"2026-01-02 03:04:05.5":             "2026-01-02T03:04:05.5Z",
		"2026-01-02 03:04:05 BC":            "",
		"2026-01-02 03:04:05.5 BC":          "",
		"2026-01-02 03:04:05.123+05:30":     "",
		"infinity":                          "",
		"-infinity":                         "",
		"":                                  "",
		"0044-03-15 12:00:00+00 BC":         "",
		"12026-01-02 03:04:05+00":           "",
		"2026-01-02 03:04:05+05:30":         "",
		"02/01/2026 03:04:05.000000 UTC+00": "",
	} {
		b := newBuilder(messageConfig)
		e := sample()
		e.CreatedAt = []byte(value)
		if err := b.build(e, anyLimit); err != nil {
			t.Fatal(err)
		}
		_, rest, there := strings.Cut(string(b.headers), "\r\nce-time: ")
		got, _, _ := strings.Cut(rest, "\r\n")
		if there != (want != "") || got != want {
			t.Errorf("%q becomes %q, want %q", value, got, want)
		}
		if want == "" {
			continue
		}
		if _, err := time.Parse(time.RFC3339, got); err != nil {
			t.Error(err)
		}
	}
}

// Whatever no message can carry is refused before it is sent, with a reason.
func TestRejections(t *testing.T) {
	headers := func(object string) func(*event.Event) {
		return func(e *event.Event) { e.Headers = []byte(object) }
	}
	id := func(id string) func(*event.Event) { return func(e *event.Event) { e.ID = []byte(id) } }
	for _, c := range []struct {
		name   string
		change func(*event.Event)
		want   string // of the reason; empty: accepted
	}{
		{"no headers", headers(`{}`), ""},
		{"legal names", headers("{\"!#$%&'*+-.^_`|~()<>@,;/[]?={}\\\"\\\\\": \"v\"}"), ""},
		{"names that are nearly the relay's", headers(`{"nat-s": "", "outboxer": "", "cecil": "", "content-types": "", "n": ""}`), ""},
		{"an id with UTF-8 and spaces", id("événement 1"), ""},

		{"headers: a string", headers(`"x"`), "not a JSON object"},
		{"headers: an array", headers(`[]`), "not a JSON object"},
		{"headers: JSON's null", headers(`null`), "not a JSON object"},
		{"a number", headers(`{"a": 1}`), `"a" is not a string`},
		{"a null", headers(`{"a": null}`), `"a" is not a string`},
		{"an object", headers(`{"a": {}}`), `"a" is not a string`},
		{"an empty name", headers(`{"": "v"}`), "printable ASCII"},
		{"a name with a space", headers(`{"a b": "v"}`), "printable ASCII"},
		{"a name with a colon", headers(`{"a:b": "v"}`), "printable ASCII"},
		{"a name with a letter beyond ASCII", headers(`{"größe": "v"}`), "printable ASCII"},
		{"a name that breaks the line", headers(`{"a\r\nNats-Rollup": "all"}`), "printable ASCII"},
		{"a value that breaks the line", headers(`{"a": "v\r\nNats-Rollup: all"}`), "control character"},
		{"a value with LF", headers(`{"a": "v\nx"}`), "control character"},
		{"a value with DEL", headers(`{"a": "\u007f"}`), "control character"},
		{"a forged id", headers(`{"Nats-Msg-Id": "x"}`), "relay's own"},
		{"a forged id in other letters", headers(`{"nATS-mSG-iD": "x"}`), "relay's own"},
		{"a rollup", headers(`{"nats-rollup": "all"}`), "relay's own"},
		{"a forged position", headers(`{"OUTBOX-POSITION": "1/0/0/1"}`), "relay's own"},
		{"a forged attribute", headers(`{"Ce-Id": "x"}`), "relay's own"},
		{"another type", headers(`{"Content-Type": "text/plain"}`), "relay's own"},

		{"an empty id", id(""), "the id"},
		{"an id that breaks the line", id("a\r\nNats-Rollup: all"), "the id"},
		{"an id that ends in a space", id("a "), "the id"},
		{"an id that begins with a space", id(" a"), "the id"},
		{"an id that begins with a tab", id("\ta"), "the id"},
		{"an id that ends in a tab", id("a\t"), "the id"},
		{"an id that is a tab", id("\t"), "the id"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := sample()
			c.change(e)
			requireRejection(t, newBuilder(messageConfig).build(e, anyLimit), c.want)
		})
	}
}

func requireRejection(t *testing.T, err error, want string) {
	t.Helper()
	var rejection *RejectedError
	switch {
	case want == "" && err != nil:
		t.Errorf("refused: %v", err)
	case want != "" && (!errors.As(err, &rejection) || !strings.Contains(rejection.Reason, want)):
		t.Errorf("got %v, want a RejectedError with %q", err, want)
	}
}

// The sizes are exact: what is a byte under the limit arrives, what is a byte
// over is refused before it is sent.
func TestSizes(t *testing.T) {
	e := newEcho(t)
	whole := func(b *builder) int { return len(b.appendPublish(nil, nil, ^uint64(0))) }
	t.Run("headers", func(t *testing.T) {
		event := sample()
		pad := func(n int) { event.Headers = []byte(`{"pad": "` + strings.Repeat("p", n) + `"}`) }
		pad(0)
		b := newBuilder(messageConfig)
		if err := b.build(event, anyLimit); err != nil {
			t.Fatal(err)
		}
		room := maxHeaders - (len(headerLine) + len(sequenceName) + longest + len("\r\n") + len(b.headers) + len("\r\n"))
		pad(room)
		e.send(messageConfig, event)
		pad(room + 1)
		requireRejection(t, b.build(event, anyLimit), "65536 bytes: NATS takes 65535")
	})
	t.Run("message", func(t *testing.T) {
		limit := int(e.client.nc.MaxPayload())
		event := sample()
		b := newBuilder(messageConfig)
		event.Payload = nil
		if err := b.build(event, limit); err != nil {
			t.Fatal(err)
		}
		line, _, _ := bytes.Cut(b.appendPublish(nil, nil, ^uint64(0)), []byte("\r\n"))
		room := limit - (whole(b) - len(line) - len("\r\n\r\n")) // the control line and the end do not count
		event.Payload = bytes.Repeat([]byte("p"), room)
		e.send(messageConfig, event)
		event.Payload = append(event.Payload, 'p')
		requireRejection(t, b.build(event, limit), fmt.Sprintf("the server or the stream takes %d", limit))
	})
	t.Run("subject", func(t *testing.T) {
		config := MessageConfig{}
		var extra [][]byte
		for i := range 17 { // of at most 218 bytes each, and a dot
			name := fmt.Sprint("c", i)
			config.Columns.Extra = append(config.Columns.Extra, name)
			config.Subject = append(config.Subject, Token{Column: name})
			extra = append(extra, bytes.Repeat([]byte("x"), 1000))
		}
		event := sample()
		event.Extra = extra
		e.send(config, event) // 3,722 bytes
		config.Subject = append(config.Subject, Token{Literal: strings.Repeat("y", 200)})
		requireRejection(t, newBuilder(config).build(event, anyLimit), "the subject has 3923 bytes")
	})
	if got := e.client.Reconnects(); got != 0 {
		t.Errorf("the server closed the connection %d times", got)
	}
}

// A builder serves one event after the other: nothing of one is left in the next.
func TestBuilderForgets(t *testing.T) {
	config := messageConfig
	config.Subject = append(config.Subject[:1:1], Token{Column: "tenant"})
	config.Columns.Extra = []string{"tenant"}
	rich := sample()
	rich.Extra, rich.AggregateID, rich.Headers = [][]byte{[]byte(strings.Repeat("t", 500))}, []byte("a"), []byte(`{"k": "v"}`)
	poor := sample()
	poor.Extra = [][]byte{nil}
	b := newBuilder(config)
	if err := b.build(poor, anyLimit); err != nil {
		t.Fatal(err)
	}
	want := b.appendPublish(nil, []byte("r"), 1)
	for _, e := range []*event.Event{rich, poor} {
		if err := b.build(e, anyLimit); err != nil {
			t.Fatal(err)
		}
	}
	if got := b.appendPublish(nil, []byte("r"), 1); !bytes.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestBuildingAllocatesNothing(t *testing.T) {
	b := newBuilder(messageConfig)
	e := sample()
	e.AggregateID = []byte("order 7")
	var out []byte
	allocations := testing.AllocsPerRun(1000, func() {
		if err := b.build(e, anyLimit); err != nil {
			t.Fatal(err)
		}
		out = b.appendPublish(out[:0], []byte("_INBOX_outbox.x.1.2"), 1234567)
	})
	t.Logf("%v allocations a message", allocations)
	if allocations != 0 {
		t.Errorf("%v allocations a message, want none", allocations)
	}
}

// FuzzMessage: whatever stands in an event, its publish is one protocol message
// of the length that it says, whose headers come back as they were meant: the id,
// and the position by which consumers order.
func FuzzMessage(f *testing.F) {
	f.Add(int32(3), uint64(0x1_00ABCDE0), uint64(7), uint64(41), "event_01", "order.created", []byte(`{"n": 1}`))
	f.Add(int32(1), uint64(0), uint64(0), uint64(0), "a\r\nNats-Rollup: all", "\r\nPUB x 0\r\n", []byte(nil))
	f.Add(int32(-1), uint64(1)<<63, ^uint64(0), ^uint64(0), "größe \xff", "", []byte("\r\n\r\nPING\r\n"))
	f.Add(int32(1), uint64(0xF), uint64(10), uint64(9), " x", strings.Repeat(".", 100), []byte("1"))
	f.Fuzz(func(t *testing.T, timeline int32, commit, ordinal, sequence uint64, id, kind string, payload []byte) {
		config := messageConfig
		config.Timeline = timeline
		e := sample()
		e.Position = event.Position{Commit: pglogrepl.LSN(commit), Ordinal: ordinal}
		e.ID, e.EventType, e.Payload = []byte(id), []byte(kind), payload
		b := newBuilder(config)
		if err := b.build(e, anyLimit); err != nil {
			var rejection *RejectedError
			if !errors.As(err, &rejection) {
				t.Fatalf("%q: %v is no rejection", id, err)
			}
			return
		}
		subject, header, body := splitPublish(t, b.appendPublish(nil, []byte("_INBOX.1"), sequence))
		if strings.Count(subject, ".") != 2 || strings.Trim(subject, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-=~.") != "" {
			t.Fatalf("subject %q", subject)
		}
		if !bytes.Equal(body, payload) {
			t.Fatalf("body %q, want %q", body, payload)
		}
		for name, want := range map[string]string{"Nats-Msg-Id": id, "Nats-Expected-Last-Sequence": fmt.Sprint(sequence),
			"Outbox-Position": fmt.Sprintf("%d/%s", timeline, e.Position)} {
			if got := header[name]; len(got) != 1 || got[0] != want {
				t.Fatalf("%s is %q, want %q", name, got, want)
			}
		}
		delete(header, "Outbox-event_type") // there where the token is not whole
		if len(header) != 11 {              // these three, and eight of CloudEvents
			t.Fatalf("headers %q", header)
		}
		_, position, _ := strings.Cut(header["Outbox-Position"][0], "/")
		lsn, err := lsn.Parse(position[:strings.LastIndexByte(position, '/')])
		if err != nil || lsn != e.Position.Commit {
			t.Fatalf("the position %q has LSN %s, %v, want %s", position, lsn, err, e.Position.Commit)
		}
	})
}

// splitPublish reads a publish as a server does: by the lengths in its first line.
func splitPublish(t testing.TB, message []byte) (subject string, header nats.Header, body []byte) {
	t.Helper()
	line, rest, _ := bytes.Cut(message, []byte("\r\n"))
	fields := strings.Split(string(line), " ")
	if len(fields) != 5 || fields[0] != "HPUB" || fields[2] != "_INBOX.1" {
		t.Fatalf("first line %q", line)
	}
	headers, err := strconv.Atoi(fields[3])
	total, err2 := strconv.Atoi(fields[4])
	if err := errors.Join(err, err2); err != nil || len(rest) != total+2 || headers > total || !bytes.HasSuffix(rest, []byte("\r\n")) {
		t.Fatalf("first line %q before %d bytes, %v", line, len(rest), err)
	}
	header, err = nats.DecodeHeadersMsg(rest[:headers])
	if err != nil {
		t.Fatalf("headers %q: %v", rest[:headers], err)
	}
	return fields[1], header, rest[headers:total]
}
