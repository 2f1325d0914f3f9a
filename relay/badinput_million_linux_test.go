package relay_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

// A transaction of a million events is streamed as it comes: what the relay
// needs for it is bounded by its window.
func TestTransactionOfAMillionEvents(t *testing.T) {
	const events = 1_000_000
	b := setupOn(t, testenv.OwnPostgres(t, map[string]string{"max_wal_size": "4GB"}), testenv.NATSOptions{})
	b.nats.Stop()
	server := testenv.NATSProcesses(t, testenv.NATSBinary(t, ""), 1)[0] // not slowed by the race detector
	nc, err := nats.Connect(server.URL())
	b.must(err)
	t.Cleanup(nc.Close)
	b.js, err = jetstream.New(nc)
	b.must(err)
	r := b.streaming("NATS_URL="+server.URL(), "AFTER_PUBLISH=keep", "HEADERS=minimal")
	b.exec(`alter table events disable trigger on_events_create`)
	b.exec(`insert into events (id, aggregate_type, event_type, payload, status, created_at)
		select i::text, 'order', 'created', to_jsonb(i), 'pending', now() from generate_series(1, $1) i`, events)
	for n := uint64(events / 10); n <= events; n += events / 10 {
		testenv.Eventually(t, fmt.Sprintf("%d events in the stream", n), func() bool { return b.last() >= n })
	}
	testenv.Eventually(t, "all of it confirmed", func() bool {
		return b.count(`select count(*) from outbox_relay_checkpoints where stream_sequence = $1`, events) == 1
	})
	stream := b.stream()
	if n := stream.CachedInfo().State.Msgs; n != events {
		t.Fatalf("%d messages", n)
	}
	for range 1000 {
		sequence := 1 + rand.Uint64N(events)
		m, err := stream.GetMsg(t.Context(), sequence)
		b.must(err)
		if want := fmt.Sprint(sequence); m.Header.Get("Nats-Msg-Id") != want || string(m.Data) != want {
			t.Fatalf("message %d has id %s", sequence, m.Header.Get("Nats-Msg-Id"))
		}
	}
	peak := b.peakMemory(r)
	t.Logf("the relay took at most %d MiB", peak>>20)
	if peak > 100<<20 {
		t.Fatalf("the relay took %d MiB", peak>>20)
	}
	requireLeaves(t, r)
}

// peakMemory is the relay's largest resident set, in bytes. That of getrusage
// would count what the test had when it started the relay.
func (b *bundle) peakMemory(r *testenv.Relay) (bytes int) {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", r.Pid()))
	b.must(err)
	_, line, _ := strings.Cut(string(status), "VmHWM:")
	if _, err := fmt.Sscanf(line, "%d kB", &bytes); err != nil {
		b.Fatalf("VmHWM: %v", err)
	}
	return bytes << 10
}
