package relay

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"

	"outbox-relay/checkpoint"
	"outbox-relay/decoder"
	"outbox-relay/internal/wait"
	"outbox-relay/outbox"
	"outbox-relay/outbox/event"
	"outbox-relay/replication"
)

const (
	recordLimit  = 4096                  // events recorded in one statement
	recordPause  = 50 * time.Millisecond // between two statements that are not full
	idleInterval = 5 * time.Second       // between two checkpoints that only confirm
	checkEvery   = time.Second           // between two looks at an idle Postgres
	// ownNoise is WAL that our own checkpoint draws after it: the background
	// writer logs running transactions, a server checkpoint itself. An idle
	// outbox is not confirmed again for that little, or an idle database would
	// never come to rest.
	ownNoise = 1 << 10
)

// recorder owns the SQL connection of a session, off the publishing path: it
// records outcomes together with the checkpoint, and confirms LSNs.
type recorder struct {
	*session
	tracker *checkpoint.Tracker
	reader  *replication.Session
	want    string // fingerprint of the publication

	position  event.Position        // of the checkpoint
	batch     checkpoint.TableBatch // what is published from the table at present, or was last
	confirm   pglogrepl.LSN         // C: the highest LSN that the checkpoint names
	ownEnd    pglogrepl.LSN         // where WAL ended after our last write; 0: not seen yet
	lastWrite time.Time
	pending   []confirmation
	leftovers leftovers
	refusals  refusals
	attached  attached

	inflight func() (events, bytes int) // of the chain

	working sync.Mutex // held while the connection is used: else it has no lock in Postgres

	walEnd atomic.Uint64 // at the last look
	rounds atomic.Uint64 // how often Postgres has answered
	barred atomic.Bool   // something has an outcome, and its transaction is not visible yet
	awaits atomic.Bool   // somebody waits for a transaction to be visible

	urgent   chan struct{}
	requests chan request
}

// confirmation is an LSN that is recorded and not confirmed yet.
type confirmation struct {
	lsn   pglogrepl.LSN
	after pglogrepl.LSN // the standbys must have passed this; 0: not seen yet
	began time.Time     // when it, or an LSN whose place it took, began to wait
	due   time.Time     // when the delay is over
}

// request is work for the recorder's connection.
type request struct {
	do   func(context.Context) error
	done chan error
}

func newRecorder(s *session, tracker *checkpoint.Tracker, from origin) *recorder {
	return &recorder{
		session: s, tracker: tracker, reader: from.reader, want: from.checkpoint.Publication,
		position: from.checkpoint.Position, confirm: from.checkpoint.Confirmed,
		leftovers: leftovers{waiting: 1}, // not known: look
		urgent:    make(chan struct{}, 1), requests: make(chan request),
	}
}

// run records until ctx ends. An error ends the session; the replication
// connection then closes unconfirmed, which a shutdown of Postgres waits for.
func (r *recorder) run(ctx context.Context) error {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case req := <-r.requests:
			r.serve(ctx, req)
			continue
		case <-r.urgent:
		case <-r.tracker.Ready():
		case <-tick.C:
		}
		full, err := r.attempt(ctx)
		if err != nil {
			return err
		}
		if err := r.rest(ctx, full); err != nil {
			return err
		}
	}
}

// rest waits a little before the next round, so that events gather; not when
// somebody waits for it, or when there is more than one statement's worth.
func (r *recorder) rest(ctx context.Context, full bool) error {
	if full {
		r.hurry()
		return nil
	}
	timer := time.NewTimer(recordPause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-r.urgent:
		r.hurry()
	case req := <-r.requests:
		r.serve(ctx, req)
	case <-timer.C:
		if r.mayConfirm() || r.barred.Load() {
			r.hurry()
		}
	}
	return nil
}

// serve does what was asked for.
func (r *recorder) serve(ctx context.Context, req request) {
	req.done <- r.use(func() error { return req.do(ctx) })
}

// use lends the connection to do, and has it known how long that takes.
func (r *recorder) use(do func() error) error {
	r.relay.recording.begin("recording")
	defer r.relay.recording.end()
	r.working.Lock()
	defer r.working.Unlock()
	err := do()
	r.rounds.Add(1)
	return err
}

// hurry asks for a round at once. Safe for concurrent use.
func (r *recorder) hurry() {
	select {
	case r.urgent <- struct{}{}:
	default:
	}
}

// do runs f with the recorder's connection. Safe for concurrent use.
func (r *recorder) do(ctx context.Context, f func(context.Context) error) error {
	req := request{do: f, done: make(chan error, 1)}
	select {
	case r.requests <- req:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case err := <-req.done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// waits reports whether events wait for a transaction that is committed and
// can't be seen yet. Safe for concurrent use.
func (r *recorder) waits() bool { return r.barred.Load() || r.awaits.Load() }

// visible runs f once the rows of that transaction can be seen.
func (r *recorder) visible(ctx context.Context, xid uint32, f func(context.Context) error) error {
	defer r.awaits.Store(false)
	for {
		seen := false
		err := r.do(ctx, func(ctx context.Context) error {
			state, err := r.table.State(ctx, r.sql)
			if seen = err == nil && state.Snapshot.Visible(xid); !seen {
				return err
			}
			return f(ctx)
		})
		if err != nil || seen {
			return err
		}
		r.awaits.Store(true)
		if err := wait.For(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
}

// attempt makes a round, and retries what can pass while the connection holds:
// a Postgres that refuses writes for a while holds back only the LSN.
func (r *recorder) attempt(ctx context.Context) (full bool, err error) {
	err = r.use(func() (err error) {
		full, err = r.round(ctx)
		return err
	})
	switch {
	case err == nil:
		r.relay.refused.Store(false)
		r.relay.causes.refused.Over("Postgres records outcomes again")
		return full, nil
	case ctx.Err() != nil:
		return false, context.Cause(ctx)
	case r.sql.IsClosed() || !passes(err) || errors.Is(err, checkpoint.ErrSuperseded) || errors.Is(err, checkpoint.ErrNotReplicated) || errors.Is(err, errMissed):
		return false, r.explainSchema(ctx, err)
	}
	r.relay.refused.Store(true)
	r.relay.causes.refused.Again("Postgres refuses to record outcomes: publishing goes on, and the slot waits", "error", err)
	return false, wait.For(ctx, checkEvery)
}

// round looks at the database in a fresh snapshot, confirms what the round
// before recorded, and records what can be.
//
// The order matters: an LSN is confirmed only after a look that began after
// the commit of its checkpoint and still found the publication as it was.
func (r *recorder) round(ctx context.Context) (full bool, err error) {
	state, err := r.table.State(ctx, r.sql)
	if err != nil {
		return false, err
	}
	r.walEnd.Store(uint64(state.WALEnd))
	if state.Publication != r.want {
		accepted, err := r.accepted(ctx, state)
		if err != nil {
			return false, err
		}
		if !accepted {
			return false, r.passedOver(ctx)
		}
	}
	if state.Unlogged {
		return false, r.table.CheckPublication(ctx, r.sql)
	}
	if err := r.confirmPending(state); err != nil {
		return false, err
	}
	if r.ownEnd == 0 {
		r.ownEnd = state.WALEnd
	}
	batch, full := r.nextBatch(state)
	if len(batch.Items) > 0 && batch.Position.Commit >= state.WALEnd {
		return false, fmt.Errorf("%w: a transaction that can be seen commits at %s, and WAL ends at %s", decoder.ErrMalformed, batch.Position.Commit, state.WALEnd)
	}
	if len(batch.Items) > 0 || r.worthConfirming(batch) {
		if err := r.record(ctx, batch); err != nil {
			return false, err
		}
	}
	r.barred.Store(len(batch.Items) == 0 && r.tracker.Settled())
	r.observe()
	r.relay.vitals.clock.note(time.Now(), state.WALEnd)
	if err := r.relay.vitals.look(ctx, r.table, r.sql, r.tracker.Safe); err != nil {
		return false, err
	}
	if err := r.inspect(ctx, state); err != nil {
		return false, err
	}
	return full, r.sweep(ctx)
}

// nextBatch is what can be recorded by one statement. full says that there may be more.
func (r *recorder) nextBatch(state outbox.State) (b checkpoint.Batch, full bool) {
	limit, _ := r.refusals.next(time.Now())
	b = r.tracker.Batch(limit, state.Snapshot.Visible)
	n := len(b.Items)
	if r.table.ByTime {
		ids := make([]string, n)
		for i, item := range b.Items {
			ids[i] = string(item.ID)
		}
		if near := r.table.Near(ids); near < n {
			return r.tracker.Batch(near, state.Snapshot.Visible), true
		}
	}
	return b, n >= limit
}

// passedOver ends the session: what the changed publication may have passed over
// the next one publishes from the table, if that can be told there.
func (r *recorder) passedOver(ctx context.Context) error {
	if err := r.checkPublication(ctx); err != nil {
		return err
	}
	if err := r.missPublication(); err != nil {
		return err
	}
	return errMissed
}

// accepted reports whether the change of the publication was made by migrate,
// which carries the fingerprint over in the same transaction: it extends the
// column list, and passes nothing over.
func (r *recorder) accepted(ctx context.Context, state outbox.State) (bool, error) {
	cp, err := r.store.Read(ctx)
	if err != nil {
		return false, err
	}
	if cp.Publication != state.Publication || state.Publication == "" {
		return false, nil
	}
	r.want = state.Publication
	return true, nil
}

// mayConfirm reports whether something recorded waits for a look only.
func (r *recorder) mayConfirm() bool {
	return len(r.pending) > 0 && !time.Now().Before(r.pending[0].due)
}

// heldParts is into how many parts the LSNs that wait divide the delay: as many are kept
// at most, and a few.
const heldParts = 256

// held adds an LSN that was recorded now to those that wait for the delay. It takes the
// place of the last one if that began to wait only a part of the delay ago.
func held(pending []confirmation, lsn pglogrepl.LSN, now time.Time, delay time.Duration) []confirmation {
	c := confirmation{lsn: lsn, began: now, due: now.Add(delay)}
	if last := len(pending) - 1; last >= 0 && now.Sub(pending[last].began) < delay/heldParts {
		c.began = pending[last].began
		pending = pending[:last]
	}
	return append(pending, c)
}

// confirmPending confirms what was recorded before the look. Where
// synchronized_standby_slots names standbys, these must have passed the
// checkpoint's own commit, or a promoted one has a slot ahead of it. WAL is never
// confirmed before it is written: the slot would pass over events that are to come.
func (r *recorder) confirmPending(state outbox.State) error {
	n := 0
	for i := range r.pending {
		c := &r.pending[i]
		if c.after == 0 {
			c.after = state.WALEnd
		}
		if c.lsn > state.WALEnd {
			return fmt.Errorf("%w: everything up to %s is done, and WAL ends at %s", replication.ErrMalformed, c.lsn, state.WALEnd)
		}
		if state.Standbys < c.after || time.Now().Before(c.due) {
			break
		}
		r.reader.Confirm(c.lsn)
		n++
	}
	r.pending = append(r.pending[:0], r.pending[n:]...)
	return nil
}

// worthConfirming reports whether an outbox without events is to be confirmed:
// rarely, and not for WAL that is our own.
func (r *recorder) worthConfirming(b checkpoint.Batch) bool {
	return b.Safe > r.confirm && b.Safe > r.ownEnd+ownNoise && time.Since(r.lastWrite) >= idleInterval
}

// record makes the batch durable.
func (r *recorder) record(ctx context.Context, b checkpoint.Batch) error {
	advance := checkpoint.Advance{Position: r.position, Sequence: b.Sequence, MessageID: string(b.Last), Confirm: b.Safe,
		Keep: r.relay.config.ConfirmDelay}
	items := b.Items
	if len(items) > 0 {
		advance.Position = b.Position
		advance.Batch = r.step(items)
	}
	if advance.Batch.Source == checkpoint.Replay {
		items = nil // their rows say what became of them
	}
	recorded, written, err := r.advance(ctx, advance, items)
	if err != nil || !written {
		return err
	}
	r.position, r.confirm = advance.Position, max(r.confirm, b.Safe)
	r.batch.Done += advance.Batch.Rows
	r.tracker.Recorded(b)
	r.pending = held(r.pending, b.Safe, time.Now(), r.relay.config.ConfirmDelay)
	r.lastWrite, r.ownEnd = time.Now(), 0
	r.tell(recorded, len(items))
	if len(b.Items) > 0 {
		r.relay.recorded.Store(true)
	}
	return nil
}

// advance moves the checkpoint and writes the outcomes, or keeps them where Postgres
// refuses to change a row. written is false where fewer of them are to be tried at once.
func (r *recorder) advance(ctx context.Context, a checkpoint.Advance, items []checkpoint.Item) (recorded outbox.Recorded, written bool, err error) {
	move := func(e checkpoint.Effects) error { return r.store.Advance(ctx, a, e) }
	_, keep := r.refusals.next(time.Now())
	if !keep {
		effects, err := r.table.Outcomes(items, &recorded)
		if err == nil {
			err = move(effects)
		}
		if !refuses(err) {
			if err == nil && len(items) > 0 {
				r.refusals.written()
			}
			return recorded, err == nil, err
		}
		r.tellRefusal(err)
		if !r.refusals.refused(len(items), time.Now()) {
			r.hurry()
			return recorded, false, nil
		}
	}
	err = r.hold(items, move)
	return outbox.Recorded{Held: len(items)}, err == nil, err
}

// step tells how far the items take the table's batch. Nothing else is read
// while there is one.
func (r *recorder) step(items []checkpoint.Item) checkpoint.BatchStep {
	if items[0].XID != 0 {
		return checkpoint.BatchStep{}
	}
	return checkpoint.BatchStep{Source: r.batch.Source, Rows: len(items), Last: r.batch.Done+len(items) == len(r.batch.IDs)}
}

func (r *recorder) tell(recorded outbox.Recorded, events int) {
	r.relay.metrics.recorded.Add(float64(events))
	if recorded.Unchanged > 0 {
		r.tellRefusal(errors.New(unchanged))
	}
	if n := recorded.Locked() + recorded.Astray + recorded.Unchanged + recorded.Held; n > 0 {
		r.leftovers.add(n)
		r.relay.metrics.leftovers.Add(float64(n))
	}
	if n := recorded.Locked(); n > 0 {
		r.log.Info("rows are locked by the application: their outcome is kept, and written when they are free", "rows", n)
	}
	if n := recorded.Answered(); n > 0 {
		r.log.Info("rows are gone or no longer pending: the application deleted or changed them, or their outcome was recorded before", "rows", n)
	}
	if n := recorded.Astray; n > 0 {
		r.log.Info("rows are not in the partition that their id tells: looking in all partitions", "rows", n)
	}
	if recorded.Kept > 0 {
		r.log.Warn("rejected events whose row is gone are kept whole in outbox_relay_leftovers", "events", recorded.Kept)
	}
}

// leftovers are the outcomes of rows that were locked. They are gone through in the
// order of their ids, again and again, so that none waits behind rows that stay locked.
type leftovers struct {
	waiting int       // how many wait; 0: none
	after   string    // this pass is done up to here
	left    int       // those of this pass that still wait
	added   int       // since this pass began
	swept   time.Time // when the last step was
}

// leftoversStep is how many outcomes one statement writes.
const leftoversStep = 1000

func (l *leftovers) add(n int) {
	l.waiting += n
	l.added += n
}

// step notes that done of these outcomes are written, and whether they were the last.
func (l *leftovers) step(batch []outbox.Leftover, done int, last bool) {
	l.left += len(batch) - done
	if !last {
		l.after = batch[len(batch)-1].ID
		return
	}
	l.waiting = l.left + l.added
	l.after, l.left, l.added = "", 0, 0
}

// sweep writes the outcomes of rows that were locked and are free by now.
func (r *recorder) sweep(ctx context.Context) error {
	l := &r.leftovers
	if l.waiting == 0 || time.Since(l.swept) < checkEvery {
		return nil
	}
	l.swept = time.Now()
	batch, last, err := r.table.NextLeftovers(ctx, r.sql, l.after, leftoversStep)
	if err != nil {
		return err
	}
	done, err := r.write(ctx, batch)
	if err == nil {
		l.step(batch, done, last)
	}
	return err
}

// refusedAlone is how many rows Postgres refuses to change, one after the other, before the
// others of a batch are left alone for a while, too.
const refusedAlone = 4

// write writes leftovers whose rows are free. Those that Postgres refuses to change are
// found by halves, and left alone for a while.
func (r *recorder) write(ctx context.Context, batch []outbox.Leftover) (done int, err error) {
	batch = slices.DeleteFunc(slices.Clone(batch), func(l outbox.Leftover) bool { return l.Refused })
	alone := 0
	for parts := [][]outbox.Leftover{batch}; len(parts) > 0; {
		part := parts[0]
		parts = parts[1:]
		n, err := r.writePart(ctx, part)
		done += n
		switch {
		case err == nil:
			alone = 0
			continue
		case !refuses(err):
			return done, err
		case len(part) > 1:
			half := len(part) / 2
			parts = slices.Insert(parts, 0, part[:half], part[half:])
			continue
		}
		r.tellRefusal(err)
		if alone++; alone == refusedAlone {
			part, parts = slices.Concat(append(parts, part)...), nil
		}
		if err := r.noteRefused(ctx, part, because(err)); err != nil {
			return done, err
		}
	}
	return done, nil
}

// noteRefused notes why the rows of these outcomes are left alone for a while.
func (r *recorder) noteRefused(ctx context.Context, part []outbox.Leftover, why string) error {
	ids := make([]string, len(part))
	for i, l := range part {
		ids[i] = l.ID
	}
	return r.store.Guarded(ctx, r.table.Refused(ids, why))
}

// writePart writes leftovers whose rows are free, wherever these are.
func (r *recorder) writePart(ctx context.Context, batch []outbox.Leftover) (done int, err error) {
	if len(batch) == 0 {
		return 0, nil
	}
	var found, anywhere outbox.LeftoversWritten
	err = r.store.Guarded(ctx, r.table.WriteLeftovers(batch, &found))
	if err == nil && len(found.Astray) > 0 {
		astray := slices.DeleteFunc(slices.Clone(batch), func(l outbox.Leftover) bool { return !slices.Contains(found.Astray, l.ID) })
		err = r.store.Guarded(ctx, r.table.WriteLeftoversAnywhere(astray, &anywhere))
	}
	if ids := slices.Concat(found.Unchanged, anywhere.Unchanged); err == nil && len(ids) > 0 {
		r.tellRefusal(errors.New(unchanged))
		err = r.store.Guarded(ctx, r.table.Refused(ids, unchanged))
	}
	return found.Done + anywhere.Done, err
}

func (r *recorder) observe() {
	m := r.relay.metrics
	events, bytes := r.inflight()
	m.inflight.Set(float64(events))
	m.inflightBytes.Set(float64(bytes))
	m.waiting.Set(float64(r.leftovers.waiting))
	m.unrecorded.Set(float64(r.tracker.Len()))
	m.confirmed.Set(float64(r.reader.Confirmed()))
}

// flush records and confirms all that has an outcome. settled says that nothing
// else is in flight, so that nothing can be stored beyond the checkpoint.
func (r *recorder) flush(ctx context.Context, settled bool) error {
	for {
		left := 0
		err := r.do(ctx, func(ctx context.Context) error {
			if _, err := r.round(ctx); err != nil {
				return err
			}
			left = len(r.tracker.Batch(1, func(uint32) bool { return true }).Items)
			if r.relay.config.ConfirmDelay == 0 { // else the slot stays back, also over a stop
				left += len(r.pending)
			}
			if left == 0 && settled {
				return r.store.Settle(ctx)
			}
			return nil
		})
		switch {
		case err != nil:
			return fmt.Errorf("record the last outcomes: %w", err)
		case left == 0:
			return nil
		}
		if err := wait.For(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
}
