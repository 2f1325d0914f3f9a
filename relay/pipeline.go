package relay

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"

	"outbox-relay/checkpoint"
	"outbox-relay/decoder"
	"outbox-relay/outbox"
	"outbox-relay/outbox/event"
	"outbox-relay/sink"
)

// pipeline takes each message from the reader through the decoder into the
// chain, in the reader's goroutine: no channel and no goroutine for an event.
// It is also the chain's Outcomes.
type pipeline struct {
	*session
	ctx      context.Context         // of the reading
	stop     context.CancelCauseFunc // ends the reading
	decoder  *decoder.Decoder
	tracker  *checkpoint.Tracker
	recorder *recorder
	chain    *sink.Chain

	after       event.Position        // the checkpoint: events up to it are done
	at          event.Position        // of the last event that was added to the tracker
	batch       checkpoint.TableBatch // what an earlier session has left of one
	due         bool                  // the batch, or the backfill, comes before the next event
	backfilling bool                  // the backfill does
	source      checkpoint.Source     // of what is published from the table at present
	number      uint64                // of its rows so far
	found       sink.Found            // which of the next events stand in the stream
	blurred     int                   // the first of them that was overtaken; -1: none
	judged      int                   // how many of these have passed
	parked      uint64                // index of the last event parked by the reader
	barrier     bool                  // it may not be recorded yet: nothing is sent until it is

	halted atomic.Pointer[HaltError] // why the relay stops before an event: the reader or the chain finds it
}

func newPipeline(s *session, tracker *checkpoint.Tracker, recorder *recorder, from origin) *pipeline {
	p := &pipeline{
		session: s, tracker: tracker, recorder: recorder,
		decoder:     decoder.New(s.layout.OID, s.table.Columns, s.layout.Proof),
		after:       from.checkpoint.Position,
		at:          from.checkpoint.Position,
		batch:       from.batch,
		due:         len(from.batch.Left()) > 0 || from.checkpoint.Phase == checkpoint.Backfilling,
		backfilling: from.checkpoint.Phase == checkpoint.Backfilling,
		found:       from.found,
		blurred:     from.found.Overtaken(),
		number:      uint64(from.checkpoint.Backfilled),
	}
	p.chain = s.relay.client.Load().NewChain(sink.Origin{Stream: s.stream, Message: s.message, Foreign: from.checkpoint.Foreign, Heritage: from.heritage}, p)
	recorder.inflight = p.chain.InFlight
	return p
}

// streaming says that from here on events are taken as they come.
func (p *pipeline) streaming() {
	p.relay.state.Store(Streaming)
	p.log.Info("streaming", "slot", p.table.Slot, "stream", p.stream.Name, "position", p.at.String(), "sequence", p.stream.Last)
}

// Data implements replication.Handler.
func (p *pipeline) Data(start pglogrepl.LSN, data []byte) error {
	kind, err := decode(p.decoder, start, data)
	switch {
	case err != nil:
		return err
	case kind == decoder.Insert:
		return p.event(&p.decoder.Event)
	case kind == decoder.Request:
		return p.request(p.decoder.Event.Position, p.decoder.Event.XID, p.decoder.Request)
	case kind == decoder.Stray:
		p.stray(p.decoder.Stray)
	case kind == decoder.Commit:
		p.cover(p.decoder.End)
	}
	return nil
}

// decode decodes the message that stands at start. A Commit stands where its
// transaction ends: nothing else tells whether that LSN, which is confirmed,
// arrived as it was sent.
func decode(d *decoder.Decoder, start pglogrepl.LSN, data []byte) (decoder.Kind, error) {
	kind, err := d.Decode(data)
	if err == nil && kind == decoder.Commit && d.End != start {
		err = fmt.Errorf("%w: Commit of a transaction that ends at %s", decoder.ErrMalformed, d.End)
	}
	// A record begins at a multiple of MAXIMUM_ALIGNOF, at least 4. Another LSN would
	// be recorded before the Commit shows that it is wrong.
	if at := d.Event.Position.Commit; err == nil && kind == decoder.Insert && at%4 != 0 {
		err = fmt.Errorf("%w: Insert of a transaction that commits at %s, where no record begins", decoder.ErrMalformed, at)
	}
	if err != nil {
		return kind, fmt.Errorf("decode the message at %s: %w", start, err)
	}
	return kind, nil
}

// Keepalive implements replication.Handler. Outside a transaction, a
// keepalive's WAL end is a marker without events.
func (p *pipeline) Keepalive(walEnd pglogrepl.LSN, urgent bool) error {
	if err := p.turn(); err != nil {
		return err
	}
	if !p.decoder.InTransaction() {
		p.cover(walEnd)
	}
	if urgent {
		p.recorder.hurry()
	}
	return nil
}

func (p *pipeline) cover(lsn pglogrepl.LSN) {
	p.tracker.Cover(lsn)
	p.relay.metrics.received.Set(float64(lsn))
}

// Notice implements replication.Handler.
func (p *pipeline) Notice(text string) {
	p.relay.causes.notice.Again("Postgres has a word about the slot", "slot", p.table.Slot, "notice", text)
	p.relay.causes.notice.Lapse("Postgres has no more to say about the slot")
}

// Idle implements replication.Handler: nothing published waits longer than the
// reader.
func (p *pipeline) Idle() { p.chain.Flush() }

// Lost implements replication.Handler: whatever the reader waits for is in vain.
func (p *pipeline) Lost(err error) { p.stop(err) }

// event takes one insert.
func (p *pipeline) event(e *event.Event) error {
	if err := p.turn(); err != nil {
		return err
	}
	if e.Position.Compare(p.after) <= 0 {
		return nil // done; a crash of Postgres sets the slot back
	}
	if !pending(e) {
		p.relay.metrics.ignored.Inc()
		p.relay.causes.ignored.Again("ignored an insert whose status is not pending", "id", string(e.ID), "status", string(e.Status), "position", e.Position.String())
		p.relay.causes.ignored.Lapse("no more inserts are ignored")
		return nil
	}
	index, err := p.tracker.Add(p.ctx, e.Position, e.XID, e.ID)
	if err != nil {
		return err
	}
	p.at = e.Position
	if p.known(index, e.AggregateType) {
		return nil
	}
	if p.decoder.Defect != "" { // no message has a place for such bytes
		return p.rejected(index, e, &sink.RejectedError{Reason: p.decoder.Defect})
	}
	if err := p.fill(e); err != nil {
		return p.rejected(index, e, err)
	}
	return p.send(index, e)
}

// send publishes the event, once the parked one before it is recorded.
func (p *pipeline) send(index uint64, e *event.Event) error {
	if err := p.awaitParked(); err != nil {
		return err
	}
	return p.rejected(index, e, p.chain.Publish(p.ctx, index, e))
}

// awaitParked waits until the parked event before this one is recorded.
func (p *pipeline) awaitParked() error {
	if !p.barrier {
		return nil
	}
	p.chain.Flush()
	p.recorder.hurry()
	if err := p.tracker.WaitRecorded(p.ctx, p.parked); err != nil {
		return err
	}
	p.barrier = false
	return nil
}

// pending reports whether the insert is an event. One whose status was not
// published, since the column had another name then, is.
func pending(e *event.Event) bool { return e.Status == nil || string(e.Status) == "pending" }

// known takes an event that was found in the stream. It returns false for others,
// also for one that was overtaken there, and is still to be sent.
func (p *pipeline) known(index uint64, aggregateType []byte) bool {
	if p.judged >= p.found.Proved {
		return false
	}
	i := p.judged
	p.judged++
	sequence, stored := p.found.Stored[i]
	if !stored {
		return false
	}
	p.tracker.Stored(index, sequence, !p.blurs(index))
	c := p.relay.metrics.types.of(aggregateType)
	c.alreadyStored.Inc()
	p.relay.metrics.fromTable(p.source, c)
	return true
}

// blurs reports whether the event is among those that overtook each other before
// this session: the first ones that it read. The checkpoint can stop only behind
// the last of them.
func (p *pipeline) blurs(index uint64) bool {
	return p.blurred >= 0 && index >= uint64(p.blurred) && index+1 < uint64(p.found.Proved)
}

// fill reads from its row what an event lacks that was written before the
// publication was extended. Columns that the table lacks too are NULL.
func (p *pipeline) fill(e *event.Event) error {
	if len(p.decoder.Missing) == 0 {
		return nil
	}
	var names []string
	for _, name := range p.decoder.Missing {
		if p.layout.Columns[name] {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	p.chain.Flush()
	err := p.recorder.visible(p.ctx, e.XID, func(ctx context.Context) error {
		return p.explainSchema(ctx, p.table.Fill(ctx, p.sql, e, names))
	})
	if outbox.Unprintable(err) {
		return &sink.RejectedError{Reason: fmt.Sprintf("its columns %v were not published when it was inserted, and Postgres can't send them: %s", names, err)}
	}
	if errors.Is(err, outbox.ErrNoRow) {
		return &sink.RejectedError{Reason: fmt.Sprintf("its columns %v were not published when it was inserted, and its row is gone", names)}
	}
	return err
}

// rejected parks the event if err says that it can never be stored. What
// follows it is sent only once that is recorded: no parked event ever lies
// between the checkpoint and what is stored.
func (p *pipeline) rejected(index uint64, e *event.Event, err error) error {
	if err == nil {
		return nil // here, since what errors.As is given is allocated for every event
	}
	var rejection *sink.RejectedError
	if !errors.As(err, &rejection) {
		return err
	}
	if err := p.awaitParked(); err != nil { // one parked event at a time is held whole, and recorded
		return err
	}
	if err := p.park(p.ctx, index, e, rejection.Reason); err != nil {
		return err
	}
	p.fence(index)
	return nil
}

// fence keeps what follows from being sent before the event at index, which is
// not in the stream, is recorded.
func (p *pipeline) fence(index uint64) { p.parked, p.barrier = index, true }

func (p *pipeline) park(ctx context.Context, index uint64, e *event.Event, reason string) error {
	if p.source == checkpoint.Replay {
		p.tracker.Skip(index)
		p.log.Warn("an event can't be published once more", "id", string(e.ID), "run", e.Run, "reason", reason)
		return nil
	}
	halt, err := p.halts(ctx, e)
	if err != nil {
		return err
	}
	if halt {
		halted := &HaltError{ID: string(e.ID), Reason: reason}
		p.halted.Store(halted)
		return halted
	}
	whole := &outbox.Rejected{Reason: reason}
	e.CopyTo(&whole.Event, nil)
	p.tracker.Park(index, whole)
	p.relay.metrics.types.of(e.AggregateType).parked.Inc()
	p.trace(e, 0, time.Time{}, time.Now(), reason)
	p.log.Warn("parked an event that can never be stored", "id", string(e.ID), "reason", reason, "position", e.Position.String())
	return nil
}

// halts reports whether the relay stops before the event. What was parked by hand
// is passed, and what failed before and was asked for again fails again.
func (p *pipeline) halts(ctx context.Context, e *event.Event) (halt bool, err error) {
	if !p.relay.config.Halt || p.source == checkpoint.Retry {
		return false, nil
	}
	err = p.recorder.do(ctx, func(ctx context.Context) error {
		failed, err := p.table.Failed(ctx, p.sql, string(e.ID))
		halt = !failed
		return err
	})
	return halt, err
}

// Stored implements sink.Outcomes.
func (p *pipeline) Stored(index, sequence uint64, stop bool, e *event.Event, sent, answered time.Time) {
	p.tracker.Stored(index, sequence, stop && !p.blurs(index))
	m := p.relay.metrics
	c := m.types.of(e.AggregateType)
	if e.Commit.IsZero() { // it came from the table: nothing else is under way then
		m.fromTable(p.source, c)
	}
	if sent.IsZero() {
		c.alreadyStored.Inc()
		return
	}
	p.trace(e, sequence, sent, answered, "")
	c.published.Inc()
	c.bytes.Add(float64(e.Size()))
	m.publishSeconds.Observe(answered.Sub(sent).Seconds())
	if !e.Commit.IsZero() { // it came out of the slot
		m.commitSeconds.Observe(answered.Sub(e.Commit).Seconds())
	}
}

// Rejected implements sink.Outcomes.
func (p *pipeline) Rejected(ctx context.Context, index uint64, e *event.Event, reason string) error {
	if err := p.park(ctx, index, e, reason); err != nil {
		return err
	}
	p.recorder.hurry()
	return p.tracker.WaitRecorded(ctx, index)
}

// Foreign implements sink.Outcomes.
func (p *pipeline) Foreign(ctx context.Context, messages int) error {
	p.relay.metrics.foreign.Add(float64(messages))
	p.relay.causes.foreign.Again("the stream has messages that are not this relay's", "messages", messages,
		"remedy", "deny others to publish on the relay's subjects")
	p.relay.causes.foreign.Lapse("no more messages in the stream are others'")
	return p.recorder.do(ctx, func(ctx context.Context) error { return p.store.NoteForeign(ctx) })
}

// Resync implements sink.Outcomes.
func (p *pipeline) Resync(reason sink.Reason) { p.relay.metrics.resyncs[reason].Inc() }
