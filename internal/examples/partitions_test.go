package examples

import (
	"fmt"
	"strings"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

// A stream whose subjects are partitioned by aggregate, as docs/consuming.md has
// it, gives each partition all events of its aggregates, in commit order.
func TestPartitionsByAggregate(t *testing.T) {
	const partitions, aggregates, events = 4, 20, 200
	s := setupNoStream(t)
	js, ctx := s.js, t.Context()
	stream, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.*.*.*"},
		SubjectTransform: &jetstream.SubjectTransformConfig{Source: "events.*.*.*",
			Destination: "events.{{partition(4,2)}}.{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}"}})
	s.must(err)
	s.exec(`insert into events (aggregate_type, aggregate_id, event_type, payload)
		select 'order', 'o-' || n % $1, 'placed', to_jsonb(n) from generate_series(1, $2::int) as n`, aggregates, events)
	testenv.StartRelay(t, map[string]string{"OUTBOX_POSTGRES_URL": s.url, "OUTBOX_NATS_URL": s.nats.URL(), "OUTBOX_HTTP_ADDR": "",
		"OUTBOX_SUBJECT": "events.{aggregate_type}.{aggregate_id}.{event_type}"})

	total, used, home := 0, 0, map[string]int{}
	for partition := range partitions {
		consumer, err := stream.CreateConsumer(t.Context(), jetstream.ConsumerConfig{
			Name: fmt.Sprintf("part-%d", partition), FilterSubject: fmt.Sprintf("events.%d.>", partition), MaxAckPending: 1})
		s.must(err)
		testenv.Eventually(t, "all events", func() bool {
			info, err := stream.Info(t.Context())
			return err == nil && info.State.Msgs == events
		})
		info, err := consumer.Info(t.Context())
		s.must(err)
		last := map[string]int{}
		for range info.NumPending {
			msg, err := consumer.Next()
			s.must(err)
			aggregate, n := strings.Split(msg.Subject(), ".")[3], 0
			_, err = fmt.Sscan(string(msg.Data()), &n)
			s.must(err)
			if before, ok := home[aggregate]; ok && before != partition {
				t.Errorf("%s is in partitions %d and %d", aggregate, before, partition)
			}
			if n <= last[aggregate] {
				t.Errorf("%s: event %d comes after %d", aggregate, n, last[aggregate])
			}
			home[aggregate], last[aggregate] = partition, n
			total++
			s.must(msg.Ack())
		}
		if len(last) > 0 {
			used++
		}
	}
	if total != events || len(home) != aggregates || used < 2 {
		t.Errorf("%d events of %d aggregates in %d partitions", total, len(home), used)
	}
}
