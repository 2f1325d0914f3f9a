package relay_test

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go/jetstream"
)

func TestEventsArriveInOrderAndAreMarked(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	ids := append(b.insert(3), b.insert(100)...)
	b.requireStream(ids)
	b.requireStatus("published", ids)
	if code := r.Terminate(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
}

// row is what a consumer is to see of an event.
type row struct {
	id, event, payload, at string
	aggregate              *string
}

// What a consumer gets is the contract to the letter: no header less, none more.
func TestMessageAsAConsumerSeesIt(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.streaming()
	b.exec(`insert into events (aggregate_type, aggregate_id, event_type, payload, headers) values
		('Order', 'o-1', 'placed', '{"b": 1, "a": [1.10, 9007199254740993, 1e2, "\u00e9\"\\/"], "a b": null, "b": 2}', '{"traceparent": "00-4bf9-00f0-01", "X-Tenant": "b\u00fccher"}'),
		('Order', null, 'order.paid', '"only text"', null)`)
	b.exec(`insert into events (aggregate_type, aggregate_id, event_type, payload) values ('Order', 'o-1', 'größe', '123456789012345678901234567890')`)
	rows, err := b.sql.Query(t.Context(), `select id, event_type, payload::text, to_json(created_at at time zone 'UTC') #>> '{}', aggregate_id
		from events where aggregate_type <> 'history' order by id`)
	b.must(err)
	want, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (w row, err error) {
		return w, r.Scan(&w.id, &w.event, &w.payload, &w.at, &w.aggregate)
	})
	b.must(err)

	consumer, err := b.js.CreateConsumer(t.Context(), "EVENTS", jetstream.ConsumerConfig{FilterSubject: "events.Order.>", AckPolicy: jetstream.AckExplicitPolicy})
	b.must(err)
	subjects := []string{"events.Order.placed", "events.Order.order=2Epaid", "events.Order.gr=C3=B6=C3=9Fe"}
	for i, w := range want {
		m, err := consumer.Next(jetstream.FetchMaxWait(30 * time.Second))
		b.must(err)
		b.must(m.Ack())
		if string(m.Data()) != w.payload {
			t.Errorf("body %s, want %s", m.Data(), w.payload)
		}
		if m.Subject() != subjects[i] {
			t.Errorf("subject %s, want %s", m.Subject(), subjects[i])
		}
		b.requireHeaders(m.Headers(), w, uint64(i))
	}
}

func (b *bundle) requireHeaders(got map[string][]string, w row, sequence uint64) {
	b.Helper()
	position := got["Outbox-Position"]
	want := map[string][]string{
		"Nats-Msg-Id": {w.id}, "Nats-Expected-Last-Sequence": {fmt.Sprint(sequence)}, "Outbox-Position": position,
		"ce-specversion": {"1.0"}, "ce-id": {w.id}, "ce-source": {b.source()}, "ce-type": {percentEncoded[w.event]},
		"ce-time": {w.at + "Z"}, "ce-aggregatetype": {"Order"}, "ce-eventversion": {"0"}, "content-type": {"application/json"},
	}
	if w.aggregate != nil {
		want["ce-subject"] = []string{*w.aggregate}
	}
	if sequence == 0 {
		want["traceparent"], want["X-Tenant"] = []string{"00-4bf9-00f0-01"}, []string{"bücher"}
	}
	if !maps.EqualFunc(got, want, slices.Equal) {
		b.Errorf("headers %v\nwant %v", got, want)
	}
	if len(position) != 1 || !positionForm.MatchString(position[0]) {
		b.Errorf("Outbox-Position %q", position)
	}
}

// percentEncoded is how the CloudEvents binding for NATS wants other than
// printable ASCII.
var percentEncoded = map[string]string{"placed": "placed", "order.paid": "order.paid", "größe": "gr%C3%B6%C3%9Fe"}
