package relay_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

// One outbox on several slots, as docs/scaling.md has it: each hash partition is an
// outbox of its own, with its own publication, slot, relay and stream. Whoever
// inserts names the whole. Each event is in one stream, in the order of its
// aggregate, also in a stream that takes them all together.
func TestOutboxInShards(t *testing.T) {
	const shards, aggregates, events = 2, 20, 400
	b := &bundle{TB: t, cluster: testenv.Postgres(t), nats: testenv.NATS(t, testenv.NATSOptions{})}
	b.url = testenv.InhabitedDatabase(t, b.cluster)
	b.sql = b.connect()
	b.dial()
	b.env = map[string]string{"OUTBOX_POSTGRES_URL": b.url, "OUTBOX_NATS_URL": b.nats.URL(), "OUTBOX_HTTP_ADDR": ""}
	shard := func(n int) []string {
		return []string{fmt.Sprint("TABLE=public.events_", n), fmt.Sprint("PUBLICATION=outbox_relay_", n), fmt.Sprint("SLOT=", b.slot(), "_", n),
			fmt.Sprint("STREAM=EVENTS_", n), fmt.Sprint("SUBJECT=events", n, ".{aggregate_type}.{aggregate_id}")}
	}
	for n := range shards {
		if code := testenv.StartRelay(t, b.with(shard(n)...), "migrate").Wait(time.Minute); code != 0 {
			t.Fatalf("migrate ends with %d", code)
		}
	}
	b.exec(`create table events (like events_0) partition by hash (aggregate_id)`)
	var sources []*jetstream.StreamSource
	var relays []*testenv.Relay
	for n := range shards {
		b.exec(fmt.Sprintf(`alter table events attach partition events_%d for values with (modulus %d, remainder %d)`, n, shards, n))
		r := b.start(append(shard(n), noWindow)...)
		r.WaitLog("msg=streaming")
		relays = append(relays, r)
		sources = append(sources, &jetstream.StreamSource{Name: fmt.Sprint("EVENTS_", n)})
	}
	all, err := b.js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "ALL", Sources: sources})
	b.must(err)
	insert := func(from, to int) {
		b.exec(`insert into events (aggregate_type, aggregate_id, event_type, payload)
			select 'order', 'o-' || n % $1, 'placed', to_jsonb(n) from generate_series($2::int, $3) as n`, aggregates, from, to)
	}
	insert(1, events/2)
	relays[0].Kill()
	insert(events/2+1, events)
	b.start(append(shard(0), noWindow)...)

	testenv.Eventually(t, "all events in one stream", func() bool {
		info, err := all.Info(t.Context())
		return err == nil && info.State.Msgs >= events
	})
	last, home, seen := map[string]int{}, map[string]string{}, 0
	for sequence := uint64(1); sequence <= events; sequence++ {
		msg, err := all.GetMsg(t.Context(), sequence)
		b.must(err)
		stream, aggregate, _ := strings.Cut(msg.Subject, ".order.")
		var n int
		_, err = fmt.Sscan(string(msg.Data), &n)
		b.must(err)
		if before, ok := home[aggregate]; ok && before != stream {
			t.Errorf("%s is in %s and %s", aggregate, before, stream)
		}
		if n <= last[aggregate] {
			t.Errorf("%s: event %d comes after %d", aggregate, n, last[aggregate])
		}
		home[aggregate], last[aggregate] = stream, n
		seen++
	}
	info, err := all.Info(t.Context())
	b.must(err)
	if seen != events || info.State.Msgs != events || len(home) != aggregates {
		t.Errorf("%d events of %d aggregates, %d in the stream", seen, len(home), info.State.Msgs)
	}
	testenv.Eventually(t, "every row's outcome", func() bool { return b.count(`select count(*) from events where status = 'pending'`) == 0 })
}
