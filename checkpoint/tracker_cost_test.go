package checkpoint_test

import (
	"fmt"
	"testing"

	"github.com/jackc/pglogrepl"

	"outbox-relay/checkpoint"
	"outbox-relay/outbox/event"
)

// tracked is a tracker on the way of so many events at once: added, stored, and
// recorded in one batch.
type tracked struct {
	*checkpoint.Tracker
	tb       testing.TB
	ids      [][]byte
	next     uint64 // sequence
	position event.Position
}

func newTracked(tb testing.TB, events int) *tracked {
	t := &tracked{Tracker: checkpoint.NewTracker(1<<16, 0, 1), tb: tb, position: event.Position{Commit: 1000}}
	for i := range events {
		t.ids = append(t.ids, fmt.Appendf(nil, "event_01M84GZK0V5X0J%012d", i))
	}
	return t
}

func (t *tracked) round() {
	t.position.Commit += 1000
	var first uint64
	for i, id := range t.ids {
		t.position.Ordinal = uint64(i + 1)
		index, err := t.Add(t.tb.Context(), t.position, uint32(t.position.Commit), id)
		if err != nil {
			t.tb.Fatal(err)
		}
		if i == 0 {
			first = index
		}
	}
	t.Cover(t.position.Commit + 500)
	for i := range t.ids {
		t.next++
		t.Stored(first+uint64(i), t.next, true)
	}
	batch := t.Batch(len(t.ids), func(uint32) bool { return true })
	if len(batch.Items) != len(t.ids) {
		t.tb.Fatalf("a batch of %d, want %d", len(batch.Items), len(t.ids))
	}
	t.Recorded(batch)
}

// A batch has a copy of its items; beyond that, no event has a part in the heap.
func TestTrackingAllocatesOnceABatch(t *testing.T) {
	tracker := newTracked(t, 1000)
	for range 70 { // ids get their room once for each place in the ring
		tracker.round()
	}
	allocations := testing.AllocsPerRun(100, tracker.round)
	t.Logf("%v allocations in a batch of %d", allocations, len(tracker.ids))
	if allocations > 1 {
		t.Errorf("%v allocations in a batch of %d, want 1", allocations, len(tracker.ids))
	}
	if want := pglogrepl.LSN(tracker.position.Commit + 500); tracker.Safe() != want {
		t.Errorf("safe is %s, want %s", tracker.Safe(), want)
	}
}

// Of an event: added, stored, and recorded among a thousand.
func BenchmarkTracker(b *testing.B) {
	const batch = 1000
	tracker := newTracked(b, batch)
	b.ReportAllocs()
	for b.Loop() {
		tracker.round()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/batch, "ns/event")
}
