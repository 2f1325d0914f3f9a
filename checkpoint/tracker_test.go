package checkpoint_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"testing/synctest"

	"github.com/jackc/pglogrepl"

	"outbox-relay/checkpoint"
	"outbox-relay/outbox/event"
)

// model is the tracker as one would say it: all that ever happened, and sums
// over it.
type model struct {
	items    []modelItem // ever added
	recorded int         // so many of them
	covers   []cover
	sequence uint64 // of the start
	safe     pglogrepl.LSN
}

type modelItem struct {
	pos     event.Position
	xid     uint32
	id      string
	outcome checkpoint.Outcome
	seq     uint64
	stop    bool
	detail  any
}

// cover: the first n items are all that commit up to lsn.
type cover struct {
	n   int
	lsn pglogrepl.LSN
}

// safeAt is the highest LSN before which nothing but the first n items lies.
func (m *model) safeAt(n int) pglogrepl.LSN {
	safe := m.safe
	for _, c := range m.covers {
		if c.n <= n {
			safe = max(safe, c.lsn)
		}
	}
	return safe
}

// stops tells whether the checkpoint can stand behind the first n items.
func (m *model) stops(n int) bool {
	for i := n - 1; i >= m.recorded; i-- {
		if m.items[i].outcome == checkpoint.Stored {
			return m.items[i].stop
		}
	}
	return true
}

// recordable returns how many items have an outcome and can be seen, from the
// start.
func (m *model) recordable(visible func(uint32) bool) int {
	n := m.recorded
	for n < len(m.items) && m.items[n].outcome != checkpoint.Pending && visible(m.items[n].xid) {
		n++
	}
	return n
}

// batch returns where a batch ends: at the last stop within the limit, or, if
// the limit falls where none is, at the first one behind it.
func (m *model) batch(limit int, visible func(uint32) bool) int {
	most := m.recordable(visible)
	end := m.recorded
	for n := m.recorded; n <= most; n++ {
		within := n <= m.recorded+limit
		if m.stops(n) && (within || !m.stops(m.recorded+limit) && end <= m.recorded+limit) {
			end = n
		}
	}
	return end
}

func (m *model) sequenceAt(n int) (sequence uint64, id string) {
	sequence = m.sequence
	for i, it := range m.items[:n] {
		if it.outcome == checkpoint.Stored && it.seq > sequence {
			sequence, id = it.seq, ""
			if i >= m.recorded {
				id = it.id
			}
		}
	}
	return sequence, id
}

// history plays random steps on the tracker and the model.
type history struct {
	t       *testing.T
	rand    *rand.Rand
	tracker *checkpoint.Tracker
	model   model
	bound   int
	lsn     pglogrepl.LSN // of the last commit
	seq     uint64        // of the last message
	ready   bool          // the last step had to ring
}

func TestTrackerAgainstModel(t *testing.T) {
	for range 200 {
		play(t, rand.Uint64())
	}
}

func play(t *testing.T, seed uint64) {
	defer func() {
		if t.Failed() {
			t.Logf("the history's seed is %d", seed)
		}
	}()
	r := rand.New(rand.NewPCG(seed, 0))
	h := &history{t: t, rand: r, bound: []int{1, 2, 7, 100, 5000}[r.IntN(5)], lsn: 1000, seq: 50,
		model: model{sequence: 50, safe: 1000}}
	h.tracker = checkpoint.NewTracker(h.bound, 50, 1000)
	for range 3000 {
		h.step()
		h.check()
	}
}

func (h *history) step() {
	h.ready = false
	switch n := h.rand.IntN(100); {
	case n < 40:
		h.transaction()
	case n < 50:
		h.cover()
	case n < 92:
		h.settle()
	default:
		h.record()
	}
}

// transaction adds its events, as far as the bound lets it.
func (h *history) transaction() {
	h.lsn += pglogrepl.LSN(1 + h.rand.IntN(100))
	xid := 1 + h.rand.Uint32N(20) // a few, so that neighbours share one now and then
	for i := range 1 + h.rand.IntN(8) {
		if len(h.model.items)-h.model.recorded >= h.bound {
			return
		}
		pos := event.Position{Commit: h.lsn, Ordinal: uint64(i + 1)}
		id := []byte(fmt.Sprintf("e%d", len(h.model.items)))
		index, err := h.tracker.Add(h.t.Context(), pos, xid, id)
		if err != nil || index != uint64(len(h.model.items)) {
			h.t.Fatalf("Add: index %d, error %v, want index %d", index, err, len(h.model.items))
		}
		h.model.items = append(h.model.items, modelItem{pos: pos, xid: xid, id: string(id)})
		clear(id) // the tracker has its own
	}
}

// cover gives the end of the last commit, or a keepalive's, sometimes an old one.
func (h *history) cover() {
	lsn := h.lsn + pglogrepl.LSN(h.rand.IntN(10)) - pglogrepl.LSN(h.rand.IntN(5))
	before := h.model.safeAt(h.model.recorded)
	h.tracker.Cover(lsn)
	h.model.covers = append(h.model.covers, cover{len(h.model.items), lsn})
	h.ready = h.model.safeAt(h.model.recorded) > before
}

// settle gives one event an outcome: mostly the next in turn, sometimes any,
// also one that is long recorded or was never added.
func (h *history) settle() {
	m := &h.model
	i := m.recorded
	for i < len(m.items) && m.items[i].outcome != checkpoint.Pending {
		i++
	}
	if h.rand.IntN(5) == 0 {
		i = max(0, m.recorded-5) + h.rand.IntN(12)
	}
	known := i >= m.recorded && i < len(m.items)
	if h.rand.IntN(10) == 0 {
		detail := &struct{ i int }{i}
		h.tracker.Park(uint64(i), detail)
		if known {
			m.items[i].outcome, m.items[i].detail = checkpoint.Parked, detail
		}
	} else {
		h.seq += uint64(1 + h.rand.IntN(3)/2)
		seq, stop := h.seq, h.rand.IntN(4) > 0
		if !stop && h.rand.IntN(2) == 0 {
			seq -= uint64(h.rand.IntN(3)) // it was overtaken
		}
		h.tracker.Stored(uint64(i), seq, stop)
		if known {
			m.items[i].outcome, m.items[i].seq, m.items[i].stop = checkpoint.Stored, seq, stop
		}
	}
	h.ready = known && i == m.recorded
}

// record takes a batch, and says that it is durable, or fails to make it so. Meanwhile
// the reader goes on.
func (h *history) record() {
	m := &h.model
	limit := 1 + h.rand.IntN(12)
	unseen := h.rand.Uint32N(80)
	visible := func(xid uint32) bool { return xid != unseen }
	b := h.tracker.Batch(limit, visible)
	end := m.batch(limit, visible)
	h.compare(b, end)
	if h.rand.IntN(4) == 0 {
		return
	}
	rang := false
	for range h.rand.IntN(3) {
		if h.rand.IntN(2) == 0 {
			h.transaction()
		}
		h.cover()
		rang = rang || h.ready
	}
	h.tracker.Recorded(b)
	m.recorded = end
	h.ready = rang || m.safeAt(end) > b.Safe || end < len(m.items) && m.items[end].outcome != checkpoint.Pending
}

func (h *history) compare(b checkpoint.Batch, end int) {
	h.t.Helper()
	m := &h.model
	if len(b.Items) != end-m.recorded {
		h.t.Fatalf("a batch of %d items, want %d", len(b.Items), end-m.recorded)
	}
	for i, got := range b.Items {
		want := m.items[m.recorded+i]
		if got.Position != want.pos || got.XID != want.xid || string(got.ID) != want.id || got.Outcome != want.outcome {
			h.t.Fatalf("item %d is %+v, want %+v", m.recorded+i, got, want)
		}
		if want.outcome == checkpoint.Parked && got.Detail != want.detail || want.outcome == checkpoint.Stored && got.Sequence != want.seq {
			h.t.Fatalf("item %d is %+v, want %+v", m.recorded+i, got, want)
		}
	}
	if end > m.recorded && b.Position != m.items[end-1].pos {
		h.t.Fatalf("position %s, want %s", b.Position, m.items[end-1].pos)
	}
	sequence, id := m.sequenceAt(end)
	if b.Sequence != sequence || !bytes.Equal(b.Last, []byte(id)) || (b.Last == nil) != (id == "") {
		h.t.Fatalf("sequence %d of %q, want %d of %q", b.Sequence, b.Last, sequence, id)
	}
	if want := m.safeAt(end); b.Safe != want {
		h.t.Fatalf("safe %s once recorded, want %s", b.Safe, want)
	}
}

func (h *history) check() {
	h.t.Helper()
	m := &h.model
	left := len(m.items) - m.recorded
	settled := left > 0 && m.items[m.recorded].outcome != checkpoint.Pending
	if got, want := h.tracker.Safe(), m.safeAt(m.recorded); got != want {
		h.t.Fatalf("safe %s, want %s", got, want)
	}
	if h.tracker.Len() != left || h.tracker.Settled() != settled {
		h.t.Fatalf("%d left, settled %v; want %d, %v", h.tracker.Len(), h.tracker.Settled(), left, settled)
	}
	select {
	case <-h.tracker.Ready():
		if !h.ready {
			h.t.Fatal("rings for nothing")
		}
	default:
		if h.ready {
			h.t.Fatal("does not ring")
		}
	}
}

func add(t *testing.T, tracker *checkpoint.Tracker, commit pglogrepl.LSN) uint64 {
	t.Helper()
	index, err := tracker.Add(t.Context(), event.Position{Commit: commit, Ordinal: 1}, 1, []byte("e"))
	if err != nil {
		t.Fatal(err)
	}
	return index
}

func seen(uint32) bool { return true }

// waiting runs f and returns where its result will be. The test fails if f does
// not block.
func waiting(t *testing.T, f func() error) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	synctest.Wait()
	select {
	case err := <-done:
		t.Fatalf("did not wait, and returned %v", err)
	default:
	}
	return done
}

// What is stored and not recorded is bounded: the event that would be one too
// many waits for a record, not for an outcome.
func TestAddWaitsAtTheBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracker := checkpoint.NewTracker(2, 0, 1)
		add(t, tracker, 10)
		add(t, tracker, 20)
		var third uint64
		done := waiting(t, func() (err error) {
			third, err = tracker.Add(t.Context(), event.Position{Commit: 30, Ordinal: 1}, 1, []byte("e"))
			return err
		})
		tracker.Stored(0, 1, true)
		synctest.Wait()
		if tracker.Len() != 2 {
			t.Fatalf("%d events, beyond the bound", tracker.Len())
		}
		tracker.Recorded(tracker.Batch(10, seen))
		if err := <-done; err != nil || third != 2 {
			t.Fatalf("index %d, error %v", third, err)
		}
	})
}

func TestWaitsEndWithTheirContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cause := errors.New("the session is over")
		ctx, cancel := context.WithCancelCause(t.Context())
		tracker := checkpoint.NewTracker(1, 0, 1)
		first := add(t, tracker, 10)
		adding := waiting(t, func() error {
			_, err := tracker.Add(ctx, event.Position{Commit: 20, Ordinal: 1}, 1, []byte("e"))
			return err
		})
		recording := waiting(t, func() error { return tracker.WaitRecorded(ctx, first) })
		cancel(cause)
		for _, done := range []<-chan error{adding, recording} {
			if err := <-done; !errors.Is(err, cause) {
				t.Errorf("got %v, want the cause", err)
			}
		}
		if tracker.Len() != 1 {
			t.Errorf("%d events: one was added all the same", tracker.Len())
		}
	})
}

func TestWaitRecorded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracker := checkpoint.NewTracker(10, 0, 1)
		add(t, tracker, 10)
		second := add(t, tracker, 20)
		third := add(t, tracker, 30)
		done := waiting(t, func() error { return tracker.WaitRecorded(t.Context(), second) })
		later := waiting(t, func() error { return tracker.WaitRecorded(t.Context(), third) })
		tracker.Park(second, nil)
		tracker.Stored(0, 1, true)
		tracker.Recorded(tracker.Batch(1, seen))
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("the one before is recorded, and it returned %v", err)
		default:
		}
		tracker.Recorded(tracker.Batch(1, seen))
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if err := tracker.WaitRecorded(t.Context(), second); err != nil {
			t.Fatal(err)
		}
		tracker.Stored(third, 2, true)
		tracker.Recorded(tracker.Batch(math.MaxInt, seen))
		if err := <-later; err != nil {
			t.Fatal(err)
		}
	})
}

// An answer can come twice, the second time when its event is recorded and
// another one lives in its place.
func TestOutcomeOfARecordedEventIsIgnored(t *testing.T) {
	tracker := checkpoint.NewTracker(math.MaxInt, 0, 1)
	for n := range 1 << 12 { // each power of two on the way is a full ring
		add(t, tracker, pglogrepl.LSN(10+n))
		if n == 0 {
			tracker.Stored(0, 1, true)
			tracker.Recorded(tracker.Batch(1, seen))
		}
		tracker.Stored(0, 1, true)
	}
	for i := range 1<<12 - 1 {
		tracker.Stored(uint64(1+i), uint64(2+i), true)
		if b := tracker.Batch(math.MaxInt, seen); len(b.Items) != 1 || b.Sequence != uint64(2+i) {
			t.Fatalf("event %d: %d have an outcome, up to sequence %d", 1+i, len(b.Items), b.Sequence)
		}
		tracker.Recorded(tracker.Batch(math.MaxInt, seen))
	}
}
