package relay_test

import (
	"context"
	"log/slog"
	"math"
	"runtime"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"outbox-relay/internal/testenv"
	"outbox-relay/outbox"
	"outbox-relay/relay"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// inProcess runs a relay within the test, on the bundle's database and a
// nats-server process, so that the heap is the relay's alone, but for what the test
// does itself. It ends with the test.
func (b *bundle) inProcess(mode outbox.Mode) {
	b.Helper()
	r := relay.New(relay.Config{
		Postgres: func() (string, error) { return b.url, nil },
		Table:    outbox.Table{Schema: "public", Name: "events", Publication: "outbox_relay", Slot: b.slot(), Mode: mode},
		Sink: func(system replication.System) sink.Config {
			return sink.Config{
				Servers: []string{b.env["OUTBOX_NATS_URL"]}, InboxPrefix: "_INBOX_outbox", MaxInflight: 8192, MaxBytes: 64 << 20,
				Stream: sink.StreamConfig{Name: "EVENTS", Create: true, Subjects: "events.*.*", Replicas: 1,
					DuplicateWindow: 2 * time.Minute, SystemID: system.ID, Slot: b.slot()},
				Message: sink.MessageConfig{CloudEvents: true, Source: "/test", Timeline: system.Timeline,
					Subject: []sink.Token{{Literal: "events"}, {Column: "aggregate_type"}, {Column: "event_type"}}},
			}
		},
		Grace: 10 * time.Second,
	}, slog.New(slog.DiscardHandler), relay.NewMetrics(prometheus.NewRegistry()))
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	b.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			b.Errorf("the relay ended: %v", err)
		}
	})
	testenv.Eventually(b, "the relay to stream", func() bool { return r.State() == relay.Streaming })
}

// onProcess gives the bundle a nats-server process instead of the embedded one.
func (b *bundle) onProcess() {
	b.Helper()
	b.nats.Stop()
	server := testenv.NATSProcesses(b, testenv.NATSBinary(b, ""), 1)[0]
	b.env["OUTBOX_NATS_URL"] = server.URL()
	nc, err := nats.Connect(server.URL())
	b.must(err)
	b.Cleanup(nc.Close)
	b.js, err = jetstream.New(nc)
	b.must(err)
}

// relayed inserts so many events, 100 a transaction, and waits until the last of
// all that there ever were is recorded.
func (b *bundle) relayed(events, all int) {
	b.Helper()
	b.exec(`create or replace procedure fill(transactions int) language plpgsql as $$
		begin
			for t in 1..transactions loop
				insert into events (aggregate_type, aggregate_id, event_type, payload)
				select 'order', 'order-' || t, 'created', jsonb_build_object('line', i, 'text', repeat('x', 150)) from generate_series(1, 100) i;
				commit;
			end loop;
		end $$`)
	b.exec(`call fill($1)`, events/100)
	testenv.Eventually(b, "the last event to be recorded", func() bool {
		return b.count(`select stream_sequence from outbox_relay_checkpoints`) == all
	})
}

// The whole way of an event, from the slot to its recorded outcome, in allocations:
// they tell of a change where times do not, as a busy machine has as many. Of those
// that are left, three are the NATS client's, which makes a message of each ack, its
// subject and its data, and marking takes two for the id in the statement's array.
// The bounds leave room for what
// depends on time instead, such as the recorder's batches, where a machine is slow,
// and none for one more an event.
func TestAllocationsAnEvent(t *testing.T) {
	for _, c := range []struct {
		mode outbox.Mode
		most float64
	}{{outbox.Keep, 3.9}, {outbox.Mark, 5.9}} {
		t.Run(string(c.mode), func(t *testing.T) {
			b := setup(t)
			b.onProcess()
			b.inProcess(c.mode)
			// Rings and buffers grow to what they need, once, whenever that is: it
			// falls into some of the parts, and the least has none of it.
			const part = 20_000
			least := math.Inf(1)
			for all := part; all <= 3*part; all += part {
				least = min(least, b.allocations(part, func() { b.relayed(part, all) }))
			}
			t.Logf("%.2f allocations an event", least)
			if least > c.most {
				t.Errorf("%.2f allocations an event, want at most %.1f", least, c.most)
			}
		})
	}
}

// allocations is how many the process makes while do runs, for each of n events.
func (b *bundle) allocations(n int, do func()) float64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	do()
	runtime.ReadMemStats(&after)
	return float64(after.Mallocs-before.Mallocs) / float64(n)
}
