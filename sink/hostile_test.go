package sink

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"outbox-relay/outbox/event"
)

var plainByte = regexp.MustCompile(`^[A-Za-z0-9_-]$`)

// tokenOf says what a value is in a subject, as the documentation has it. Of one
// that is too long, it is how it begins.
func tokenOf(value string) (token string, whole bool) {
	if value == "" {
		return "=", true
	}
	var b strings.Builder
	for i := range len(value) {
		c := value[i : i+1]
		if !plainByte.MatchString(c) {
			c = fmt.Sprintf("=%02X", value[i])
		}
		if b.Len()+len(c) > 200 {
			return b.String() + "=~", false
		}
		b.WriteString(c)
	}
	return b.String(), true
}

// forRows reports whether a row's headers may be a message's, and returns them.
func forRows(headers string) (map[string]string, bool) {
	var object map[string]*string
	if headers == "" {
		return nil, true
	}
	if json.Unmarshal([]byte(headers), &object) != nil || object == nil {
		return nil, false
	}
	given := map[string]string{}
	for name, value := range object {
		lower := strings.ToLower(name)
		own := strings.HasPrefix(lower, "nats-") || strings.HasPrefix(lower, "outbox-") || strings.HasPrefix(lower, "ce-") || lower == "content-type"
		if value == nil || own || !regexp.MustCompile(`^[!-9;-~]+$`).MatchString(name) || regexp.MustCompile(`[\x00-\x08\x0A-\x1F\x7F]`).MatchString(*value) {
			return nil, false
		}
		given[name] = strings.TrimLeft(*value, " \t") // who reads a header trims it
	}
	return given, true
}

// FuzzHostileEvent: whatever stands in a row, it comes out of a real server as one
// message, on its own subject, with its own headers and those that its column
// headers names, and nothing else comes out. Or it is refused for a reason.
func FuzzHostileEvent(f *testing.F) {
	server := newEcho(f)
	for _, s := range []string{"order", "", ".", "*", ">", "events.>", "a b\t", "\r\nPUB events.x.y 0\r\n\r\n", "\x00\x7f\xff", "ü", "$JS.API.STREAM.DELETE.EVENTS",
		strings.Repeat("x", 201), strings.Repeat(".", 100), "\r\nNats-Rollup: all"} {
		f.Add(s, s, s, s, "", `{"n": 1}`)
		f.Add("order", "created", s, "0", fmt.Sprintf(`{"x": %q}`, s), "\r\nPUB events.x.y 0\r\n\r\n")
		f.Add("order", "created", "7", "0", fmt.Sprintf(`{%q: "x"}`, s), s)
	}
	f.Add("order", "created", "7", "0", "{\"!#$%&'*+-.^_`|~()<>@,;/[]?={}\\\"\\\\\": \"v\", \"A\": \" 1\", \"a\": \"\\t2 \"}", "")
	for _, headers := range []string{`{"a": {}}`, `{"nats-rollup": "all"}`, `{"Content-Type": "x"}`, `{"OUTBOX-Position": "x"}`, `{"Ce-Id": "x"}`, `[]`, `null`, `{`} {
		f.Add("order", "created", "7", "0", headers, "")
	}
	f.Fuzz(func(t *testing.T, aggregateType, eventType, aggregateID, version, headers, payload string) {
		e := sample()
		e.AggregateType, e.EventType, e.AggregateID, e.Version = []byte(aggregateType), []byte(eventType), []byte(aggregateID), []byte(version)
		e.Payload, e.Headers = []byte(payload), nil
		if headers != "" {
			e.Headers = []byte(headers)
		}
		given, legal := forRows(headers)
		err := newBuilder(messageConfig).build(e, 1<<20)
		var rejection *RejectedError
		switch size := len(aggregateType + eventType + aggregateID + version + headers); {
		case err != nil && !errors.As(err, &rejection):
			t.Fatal(err)
		case err != nil && legal && 6*size+len(payload) < maxHeaders-1000:
			t.Fatalf("refused: %v", err)
		case err == nil && !legal:
			t.Fatalf("the headers %q are accepted", headers)
		case err != nil:
			return
		}
		requireExactly(t, server, e, given)
	})
}

// requireExactly sends the event, and requires that nothing but its message arrives.
func requireExactly(t *testing.T, server *echo, e *event.Event, given map[string]string) {
	t.Helper()
	through := *server
	through.TB = t
	msg := through.send(messageConfig, e)
	if len(server.got) != 0 {
		t.Fatalf("another message arrived: %v", <-server.got)
	}
	want := map[string]string{
		"Nats-Msg-Id": "event_01", "Outbox-Position": "3/1/ABCDE0/7", "ce-specversion": "1.0", "ce-id": "event_01",
		"ce-source": "/shop/gr%C3%B6%C3%9Fe%20slot", "content-type": "application/json", "ce-time": "2026-01-02T03:04:05.6789Z",
		"ce-type": string(percent(nil, e.EventType)), "ce-aggregatetype": string(percent(nil, e.AggregateType)), "ce-eventversion": string(percent(nil, e.Version)),
	}
	if len(e.AggregateID) > 0 {
		want["ce-subject"] = string(percent(nil, e.AggregateID))
	}
	for name, value := range given {
		want[name] = value
	}
	subject := strings.Split(msg.Subject, ".")
	if len(subject) != 3 || subject[0] != "events" {
		t.Fatalf("subject %s", msg.Subject)
	}
	for i, column := range []struct{ name, value string }{{"aggregate_type", string(e.AggregateType)}, {"event_type", string(e.EventType)}} {
		token, whole := tokenOf(column.value)
		if whole && subject[i+1] != token || !whole && !strings.HasPrefix(subject[i+1], token) {
			t.Errorf("%q is %s in the subject, want %s", column.value, subject[i+1], token)
		}
		if !whole {
			want["Outbox-"+column.name] = string(percent(nil, []byte(column.value)))
		}
	}
	requireHeaders(t, msg.Header, want)
	if string(msg.Data) != string(e.Payload) {
		t.Errorf("body %q, want %q", msg.Data, e.Payload)
	}
}
