package relay

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/jackc/pglogrepl"

	"outbox-relay/checkpoint"
	"outbox-relay/outbox"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// The outbox is a table: what a slot has lost, or never had, stands in it with
// status 'pending', and is published from there. That is exact where the rows,
// or the stream, tell what was published: not with AFTER_PUBLISH=keep, not where
// rows from before the first slot were to be left alone, and not where messages
// behind the checkpoint are gone.

// errMissed says that events came past the slot while the relay ran. The next
// session publishes them.
var errMissed = errors.New("events may have come past the slot: they are published from the table")

// errSlotLost says that nothing more comes out of the slot. The next session
// makes it anew.
var errSlotLost = errors.New("the slot is lost")

// unreadable is a slot behind whose confirmed LSN nothing can be read.
type unreadable struct {
	why       string
	confirmed pglogrepl.LSN
}

// is reports whether the slot is this one: another relay may have made it anew.
func (u *unreadable) is(slot replication.Slot) bool { return u != nil && slot.Confirmed == u.confirmed }

// cantHeal says why the rows don't tell what was published; empty: they do.
func (s *session) cantHeal() string {
	switch {
	case s.table.Mode == outbox.Keep:
		return "with OUTBOX_AFTER_PUBLISH=keep the rows do not tell which of them were published"
	case !s.relay.config.Backfill:
		return "with OUTBOX_BACKFILL=false the rows do not tell which of them were meant to be left alone"
	}
	return ""
}

// slotLost says what became of the slot that the checkpoint knows; empty: nothing.
func (s *session) slotLost(slot replication.Slot, noSlot error, cp checkpoint.Checkpoint) string {
	switch {
	case noSlot == nil && slot.Lost():
		return fmt.Sprintf("slot %s is invalidated (wal_status = lost): %s", slot.Name, replication.Why(slot.Invalidation))
	case noSlot == nil && s.relay.unreadable.Load().is(slot):
		return s.relay.unreadable.Load().why
	case noSlot != nil && cp.Phase != "" && cp.Phase != checkpoint.Creating:
		return fmt.Sprintf("slot %s is gone, and its checkpoint says that it was read up to %s%s", s.table.Slot, cp.Confirmed, s.sinceTimeline(cp))
	}
	return ""
}

// heal makes a lost slot anew: what stands in the stream behind the checkpoint
// is recorded first; then the rest of the pending rows is the new slot's backlog.
// A crash in between repeats what is not done.
func (s *session) heal(ctx context.Context, slotExists bool, why string) error {
	if err := s.mayHeal(why); err != nil {
		return err
	}
	cp, err := s.store.Claim(ctx)
	if err != nil {
		return err
	}
	if err := s.verifyLost(ctx, &cp); err != nil {
		return err
	}
	s.log.Warn("healing the outbox from its table", "reason", why, "position", cp.Position.String(),
		"loss", "rows that were inserted and deleted since then are lost")
	s.relay.metrics.healed.Inc()
	if err := s.settleTail(ctx, &cp); err != nil {
		return err
	}
	if slotExists {
		if err := s.dropSlot(ctx); err != nil {
			return err
		}
	}
	state, err := s.table.State(ctx, s.sql)
	if err != nil {
		return err
	}
	cp.Publication, cp.Timeline, cp.StreamCreated = state.Publication, s.system.Timeline, s.stream.Created
	if err := s.store.Renew(ctx, cp); err != nil {
		return err
	}
	s.relay.unreadable.Store(nil)
	return s.createSlot(ctx)
}

// mayHeal refuses to heal where the rows don't tell.
func (s *session) mayHeal(why string) error {
	reason := s.cantHeal()
	if reason == "" {
		return nil
	}
	return s.anew(why+": events committed since then came through no slot; they stand in the table with status 'pending', and "+reason, "")
}

// dropSlot drops the lost slot, unless another relay is at it.
func (s *session) dropSlot(ctx context.Context) error {
	dropped := 0
	err := s.store.Guarded(ctx, checkpoint.Effects{
		CTE: `, dropped as (select pg_catalog.pg_drop_replication_slot(slot_name) from pg_catalog.pg_replication_slots, advanced
			where slot_name = @slot and not active)`,
		Result: `, (select count(*) from dropped)`,
		Dest:   []any{&dropped},
	})
	if err == nil && dropped == 0 {
		err = replication.ErrSlotInUse
	}
	if err != nil {
		return fmt.Errorf("drop the lost slot %s: %w", s.table.Slot, err)
	}
	return nil
}

// verifyLost holds the checkpoint of a lost slot against server and stream.
func (s *session) verifyLost(ctx context.Context, cp *checkpoint.Checkpoint) error {
	if cp.Stream != s.stream.Name {
		return s.otherStream(*cp)
	}
	if err := s.verifyIdentity(ctx, cp, replication.Slot{Confirmed: math.MaxUint64}); err != nil { // it has nothing any more
		return err
	}
	if err := s.verifyTimeline(*cp); err != nil {
		return err
	}
	what, err := s.forgotten(ctx, *cp)
	if err == nil && what != "" {
		err = s.forgot(what)
	}
	return err
}

// tailPart is how many messages are read from the stream at a time.
const tailPart = 8192

// settleTail records as published what stands in the stream behind the
// checkpoint, which moves along.
func (s *session) settleTail(ctx context.Context, cp *checkpoint.Checkpoint) error {
	for cp.Sequence < s.stream.Last {
		tail, err := s.relay.client.Load().Tail(ctx, s.stream, cp.Sequence, tailPart)
		if err != nil {
			return err
		}
		if err := s.settlePart(ctx, cp, tail); err != nil {
			return err
		}
		s.log.Info("looked which pending rows stand in the stream", "sequence", cp.Sequence, "last_sequence", s.stream.Last)
	}
	return nil
}

func (s *session) settlePart(ctx context.Context, cp *checkpoint.Checkpoint, tail []sink.Message) error {
	var present []sink.Stranger
	advance := checkpoint.Advance{Position: cp.Position, Sequence: min(cp.Sequence+tailPart, s.stream.Last), Confirm: cp.Confirmed}
	for _, m := range tail {
		if m.Gone && cp.Bound > 0 {
			return s.ambiguousTail(*cp, m.Sequence)
		}
		if !m.Gone {
			present = append(present, sink.Stranger{Sequence: m.Sequence, ID: m.ID})
			advance.MessageID = m.ID
		}
	}
	without, items, err := s.settling(ctx, present)
	if err != nil {
		return err
	}
	if err := s.keeping(items, func(e checkpoint.Effects) error { return s.store.Advance(ctx, advance, e) }); err != nil {
		return err
	}
	cp.Sequence, cp.MessageID = advance.Sequence, advance.MessageID
	cp.Foreign = s.tellStrangers(sink.Found{Strangers: without}, true) || cp.Foreign
	return nil
}

func (s *session) ambiguousTail(cp checkpoint.Checkpoint, sequence uint64) error {
	return fmt.Errorf("message %d of stream %s, behind the checkpoint at %d, is gone, and the slot with which it could be matched, too: it cannot be told which events are stored. "+
		"See which of the pending rows were delivered, and set their status to 'published'; then, to publish the other ones, UPDATE %s SET stream_sequence = %d, message_id = NULL, unrecorded_bound = 0 WHERE slot = '%s'",
		sequence, s.stream.Name, cp.Sequence, s.table.Own("outbox_relay_checkpoints"), s.stream.Last, s.table.Slot)
}

// settleStrangers records as published the pending rows whose ids messages bear
// that were matched with no event of the slot, and returns the messages that have
// no row at all.
func (s *session) settleStrangers(ctx context.Context, messages []sink.Stranger) ([]sink.Stranger, error) {
	if len(messages) == 0 || s.table.Mode == outbox.Keep {
		return messages, nil
	}
	without, items, err := s.settling(ctx, messages)
	if err != nil {
		return nil, err
	}
	if s.backlog != nil { // whose snapshot is from before
		for _, m := range messages {
			s.backlog.Known[m.ID] = true
		}
	}
	return without, s.keeping(items, func(e checkpoint.Effects) error { return s.store.Guarded(ctx, e) })
}

// settling returns the outcomes of the rows of these messages, which are published, and
// the messages that have none.
func (s *session) settling(ctx context.Context, messages []sink.Stranger) (without []sink.Stranger, items []checkpoint.Item, err error) {
	ids := []string{}
	for _, m := range messages {
		items = append(items, checkpoint.Item{ID: []byte(m.ID), Outcome: checkpoint.Stored, Sequence: m.Sequence})
		ids = append(ids, m.ID)
	}
	rowless, err := s.table.WithoutRow(ctx, s.sql, ids) // before rows are deleted
	if err != nil {
		return nil, nil, err
	}
	gone := make(map[string]bool, len(rowless))
	for _, id := range rowless {
		gone[id] = true
	}
	for _, m := range messages {
		if gone[m.ID] {
			without = append(without, m)
		}
	}
	return without, items, nil
}
