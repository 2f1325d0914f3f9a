// Package checkpoint decides which LSN may be confirmed to the slot, and keeps
// the durable record of how far the stream has followed the outbox.
//
// The Tracker is pure: it follows events from the moment they are read to the
// moment their outcome is recorded. The Store is the one row in Postgres.
package checkpoint

import (
	"context"
	"sync"

	"github.com/jackc/pglogrepl"

	"outbox-relay/outbox/event"
)

// Outcome is what became of an event.
type Outcome uint8

const (
	Pending Outcome = iota // read, and neither stored nor parked yet
	Stored                 // in the stream
	Parked                 // rejected for good; recorded in its row as failed
	Skipped                // asked for, and not to be published any more
)

// Item is one event between being read and being recorded.
type Item struct {
	Position event.Position
	XID      uint32 // its transaction, as pgoutput's Begin gives it; 0: it was read from the table, so it is visible
	ID       []byte // valid until the item's batch is recorded
	Outcome  Outcome
	Sequence uint64 // in the stream, of a stored event
	Detail   any    // what Park was given

	open bool          // the checkpoint can't stop here (see Tracker.Stored)
	safe pglogrepl.LSN // confirmable once this item and all before it are recorded; 0: none
}

// Tracker holds the events that are read and not yet recorded, in commit
// order, and derives from them what may be recorded and confirmed. It does no
// I/O. Safe for concurrent use.
//
// Invariants: only a contiguous prefix of events with an outcome is ever handed
// out for recording; an LSN becomes safe only when it was given to Cover and
// everything added before that call has been recorded; Safe never moves back.
type Tracker struct {
	mu      sync.Mutex
	changed sync.Cond // an item was recorded, or a waiter's context ended

	ring       []Item // capacity is a power of two; index i lives at i&mask
	head, tail uint64 // indexes of the first and one past the last item
	bound      int

	sequence uint64 // highest sequence of a recorded item
	safe     pglogrepl.LSN
	ready    chan struct{}
}

// NewTracker returns a tracker that holds at most bound events; sequence is the
// checkpoint's stream sequence and safe the slot's confirmed LSN.
func NewTracker(bound int, sequence uint64, safe pglogrepl.LSN) *Tracker {
	t := &Tracker{
		ring:     make([]Item, 1024),
		bound:    bound,
		sequence: sequence,
		safe:     safe,
		ready:    make(chan struct{}, 1),
	}
	t.changed.L = &t.mu
	return t
}

// Add appends an event and returns its index. It blocks while the tracker is
// full: what is stored and not recorded stays bounded, and with it what a crash
// leaves to be matched. id is copied.
func (t *Tracker) Add(ctx context.Context, pos event.Position, xid uint32, id []byte) (uint64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.len() >= t.bound {
		if err := t.wait(ctx, func() bool { return t.len() < t.bound }); err != nil {
			return 0, err
		}
	}
	if t.len() == len(t.ring) {
		t.grow()
	}
	it := t.at(t.tail)
	*it = Item{Position: pos, XID: xid, ID: append(it.ID[:0], id...)}
	t.tail++
	return t.tail - 1, nil
}

// Cover says that every event committed up to lsn has been added: lsn is the
// end of a Commit message, or a keepalive's WAL end that came outside a
// transaction. It is confirmable once all of them are recorded.
func (t *Tracker) Cover(lsn pglogrepl.LSN) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.len() > 0 {
		last := t.at(t.tail - 1)
		last.safe = max(last.safe, lsn)
		return
	}
	if lsn > t.safe {
		t.safe = lsn
		t.notify()
	}
}

// Stored says that the event stands in the stream at sequence. stop says that
// no event behind it stands before that sequence, or before that of an earlier
// one: only there the checkpoint can stop, since a sequence and a position then
// divide stream and outbox alike.
func (t *Tracker) Stored(index, sequence uint64, stop bool) {
	t.settle(index, func(it *Item) { it.Outcome, it.Sequence, it.open = Stored, sequence, !stop })
}

// Park says that the event was rejected for good. detail is handed back in the
// batch that records it.
func (t *Tracker) Park(index uint64, detail any) {
	t.settle(index, func(it *Item) { it.Outcome, it.Detail = Parked, detail })
}

// Skip says that nothing is to be done for the event.
func (t *Tracker) Skip(index uint64) {
	t.settle(index, func(it *Item) { it.Outcome = Skipped })
}

func (t *Tracker) settle(index uint64, set func(*Item)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if index < t.head || index >= t.tail {
		return
	}
	set(t.at(index))
	if index == t.head {
		t.notify()
	}
}

// Ready receives after the head of the tracker, or the safe LSN of an empty
// one, has changed: there may be something to record or to confirm.
func (t *Tracker) Ready() <-chan struct{} { return t.ready }

// Batch is a prefix of events that may be recorded together.
type Batch struct {
	Items    []Item         // in commit order; empty where only Safe moved
	Position event.Position // of the last item
	Sequence uint64         // the stream's sequence at exactly Position
	Last     []byte         // id of the item at Sequence; nil where no item is stored
	Safe     pglogrepl.LSN  // confirmable once the batch is recorded
}

// Batch returns the longest recordable prefix of at most limit items (more
// only where events that overtook each other bar a stop, see Stored) whose
// transactions are visible. The items are valid until Recorded is called with
// the batch.
func (t *Tracker) Batch(limit int, visible func(xid uint32) bool) Batch {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.prefix(limit, visible)
	b := Batch{Items: make([]Item, 0, n), Sequence: t.sequence, Safe: t.safe}
	for i := t.head; i < t.head+uint64(n); i++ {
		it := t.at(i)
		b.Items = append(b.Items, *it)
		b.Position = it.Position
		b.Safe = max(b.Safe, it.safe)
		if it.Outcome == Stored && it.Sequence > b.Sequence {
			b.Sequence, b.Last = it.Sequence, it.ID
		}
	}
	return b
}

// prefix returns how many items may be recorded: it ends before the first one
// that is pending or invisible, and goes back from there to the last stop.
func (t *Tracker) prefix(limit int, visible func(uint32) bool) int {
	stop, open := 0, false
	var seen *Item
	for n := 0; n < t.len(); n++ {
		it := t.at(t.head + uint64(n))
		if it.Outcome == Pending || n >= limit && !open {
			break
		}
		if it.XID != 0 && (seen == nil || seen.XID != it.XID) && !visible(it.XID) {
			break
		}
		seen = it
		if it.Outcome == Stored {
			open = it.open
		}
		if !open {
			stop = n + 1
		}
	}
	return stop
}

// Recorded says that the batch is durable: its items leave the tracker. What they cover may
// have grown since Batch.
func (t *Tracker) Recorded(b Batch) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.safe = max(t.safe, b.Safe)
	for range b.Items {
		it := t.at(t.head)
		t.safe = max(t.safe, it.safe)
		it.Detail = nil
		t.head++
	}
	t.sequence = max(t.sequence, b.Sequence)
	t.changed.Broadcast()
	if t.safe > b.Safe || t.len() > 0 && t.at(t.head).Outcome != Pending {
		t.notify()
	}
}

// Safe returns the highest LSN up to which every event is recorded.
func (t *Tracker) Safe() pglogrepl.LSN {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.safe
}

// Settled reports whether the first event has an outcome.
func (t *Tracker) Settled() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.len() > 0 && t.at(t.head).Outcome != Pending
}

// Len returns how many events are read and not recorded.
func (t *Tracker) Len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.len()
}

// Progress counts the events that were added, and those of them that are
// recorded.
func (t *Tracker) Progress() (added, recorded uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.tail, t.head
}

// WaitRecorded blocks until the event at index, and all before it, are
// recorded.
func (t *Tracker) WaitRecorded(ctx context.Context, index uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.wait(ctx, func() bool { return index < t.head })
}

// WaitEmpty blocks until every event that was added is recorded.
func (t *Tracker) WaitEmpty(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.wait(ctx, func() bool { return t.len() == 0 })
}

// wait blocks until done holds or ctx ends. t.mu is held.
func (t *Tracker) wait(ctx context.Context, done func() bool) error {
	stop := context.AfterFunc(ctx, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.changed.Broadcast()
	})
	defer stop()
	for !done() {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		t.changed.Wait()
	}
	return nil
}

func (t *Tracker) len() int { return int(t.tail - t.head) }

func (t *Tracker) at(index uint64) *Item { return &t.ring[index&uint64(len(t.ring)-1)] }

func (t *Tracker) grow() {
	bigger := make([]Item, 2*len(t.ring))
	for i := t.head; i < t.tail; i++ {
		bigger[i&uint64(len(bigger)-1)] = *t.at(i)
	}
	t.ring = bigger
}

func (t *Tracker) notify() {
	select {
	case t.ready <- struct{}{}:
	default:
	}
}
