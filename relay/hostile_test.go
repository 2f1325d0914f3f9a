package relay_test

import (
	"context"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
)

// hostile is a row of one who means ill, or does not know.
type hostile struct {
	aggregateType, eventType, aggregateID, headers, payload string
	refused                                                 string // part of the reason; empty: it is published
}

func hostileRows() []hostile {
	usual := hostile{"order", "placed", "7", `{}`, `1`, ""}
	var rows []hostile
	for _, s := range []string{".", "..", "*", ">", "events.>", "$JS.API.STREAM.DELETE.EVENTS", "_INBOX_outbox.x", "a b", "\t", "\n", "\r\n",
		"x\r\nPUB events.forged.x 0\r\n\r\n", "x 1 1\r\n\r\nPING\r\n", "\x01\x1f\x7f", "=2E", "=", "ü\u202e\u2028", "😀", "'; drop table events; --", `{id}`, "%s%n",
		strings.Repeat(".", 1000), strings.Repeat("x", 5000)} {
		row := usual
		row.aggregateType, row.eventType, row.aggregateID = s, s, s
		rows = append(rows, row)
	}
	headers := func(object, refused string) {
		row := usual
		row.headers, row.refused = object, refused
		rows = append(rows, row)
	}
	headers(`{"a": "x", "A": "y", "Nats_Rollup": "all", "Status": "503", "Description": "x", "Reply": "events.x"}`, "")
	headers(`{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}`, "")
	for name, refused := range map[string]string{"Nats-Rollup": "relay's own", "nats-expected-stream": "relay's own", "NATS-TTL": "relay's own", "Nats-Msg-Id": "relay's own",
		"Outbox-Replay": "relay's own", "CE-ID": "relay's own", "content-TYPE": "relay's own", "": "cannot be a header's name", " Nats-Rollup": "cannot be a header's name",
		"x:": "cannot be a header's name", `x\r\nNats-Rollup`: "cannot be a header's name", `\t`: "cannot be a header's name", "ü": "cannot be a header's name",
		strings.Repeat("k", 70_000): "headers have"} {
		headers(`{"`+name+`": "all"}`, refused)
	}
	headers(`{"a": "x\r\nNats-Rollup: all"}`, "control character")
	headers(`{"a": "x\r\n\r\nbody"}`, "control character")
	headers(`{"a": "\u0001"}`, "control character")
	headers(`{"a": 1}`, "not a string")
	headers(`{"a": {"b": "c"}}`, "not a string")
	headers(`[{"a": "b"}]`, "not a JSON object")
	headers(`"Nats-Rollup: all"`, "not a JSON object")
	for _, payload := range []string{`"\r\n\r\nPUB events.forged.x 0\r\n\r\n"`, `{}`, `null`, `"` + strings.Repeat("x", 500_000) + `"`} {
		row := usual
		row.payload = payload
		rows = append(rows, row)
	}
	row := usual
	row.aggregateID, row.refused = strings.Repeat("\n", 30_000), "headers have" // three bytes each
	return append(rows, row)
}

// Rows that mean ill break out of no subject, add no header but what their column
// headers has, and stop nothing: those between them are published in their order,
// and nothing else is published by the relay's connection.
func TestHostileRows(t *testing.T) {
	t.Parallel()
	b := setup(t)
	published := make(chan *nats.Msg, 100_000)
	subscription, err := b.nc.ChanSubscribe(">", published)
	b.must(err)
	b.must(b.nc.Flush())
	r := b.streaming()
	rows := hostileRows()
	var want []string
	refused := map[string]string{}
	accepted := map[string]hostile{}
	for _, row := range rows {
		var id string
		b.must(b.sql.QueryRow(context.Background(), `insert into events (aggregate_type, event_type, aggregate_id, headers, payload) values ($1, $2, $3, $4, $5) returning id`,
			row.aggregateType, row.eventType, row.aggregateID, row.headers, row.payload).Scan(&id))
		if row.refused != "" {
			refused[id] = row.refused
		} else {
			want = append(want, id)
			accepted[id] = row
		}
		want = append(want, b.insert(1)...)
	}
	for id, reason := range refused {
		b.requireFailed(id, reason)
	}
	b.requireStatus("published", want)
	usual := []string{"Nats-Expected-Last-Sequence", "Nats-Msg-Id", "Outbox-Position", "ce-aggregatetype", "ce-eventversion", "ce-id", "ce-source", "ce-specversion",
		"ce-subject", "ce-time", "ce-type", "content-type"}
	named := regexp.MustCompile(`"([^"]+)": "`)
	subject := regexp.MustCompile(`^events\.[A-Za-z0-9_=~-]+\.[A-Za-z0-9_=~-]+$`)
	b.must(b.nc.Flush())
	b.must(subscription.Unsubscribe()) // before the test itself reads messages
	b.requireStream(want)
	arrived := 0
	for range len(published) {
		m := <-published
		if strings.HasPrefix(m.Subject, "$JS.") || strings.HasPrefix(m.Subject, "_INBOX") {
			if m.Header.Get("Nats-Msg-Id") != "" || strings.HasPrefix(m.Subject, "$JS.API.STREAM.DELETE") {
				t.Errorf("a message on subject %s: %q", m.Subject, m.Header)
			}
			continue
		}
		arrived++
		row, hostile := accepted[m.Header.Get("Nats-Msg-Id")]
		if !subject.MatchString(m.Subject) || !hostile && m.Subject != "events.order.created" {
			t.Errorf("%+.200v: a message on subject %s", row, m.Subject)
		}
		if !hostile {
			continue
		}
		expected := slices.Clone(usual)
		for _, name := range named.FindAllStringSubmatch(row.headers, -1) {
			expected = append(expected, name[1])
		}
		if len(row.aggregateType) > 66 { // its token is not whole
			expected = append(expected, "Outbox-aggregate_type", "Outbox-event_type")
		}
		slices.Sort(expected)
		if got := slices.Sorted(maps.Keys(m.Header)); !slices.Equal(got, expected) {
			t.Errorf("%+.200v: headers %q, want %q", row, got, expected)
		}
		if string(m.Data) != row.payload {
			t.Errorf("body %.200q, want %.200q", m.Data, row.payload)
		}
	}
	if arrived != len(want) {
		t.Errorf("%d messages, want %d", arrived, len(want))
	}
	requireLeaves(t, r)
}
