package relay

import (
	"context"
	"fmt"
	"time"

	"outbox-relay/checkpoint"
	"outbox-relay/internal/fault"
	"outbox-relay/internal/wait"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// verify holds the checkpoint against slot, server, stream and publication, and
// moves it back where the broker has forgotten what it stands on.
func (s *session) verify(ctx context.Context, cp *checkpoint.Checkpoint, slot replication.Slot) error {
	s.missed = ""
	if err := s.verifySystem(*cp); err != nil {
		return err
	}
	if cp.Stream != s.stream.Name {
		return s.otherStream(*cp)
	}
	if err := s.verifyConfirmed(cp, slot); err != nil {
		return err
	}
	if err := s.verifyIdentity(ctx, cp, slot); err != nil {
		return err
	}
	if err := s.verifyTimeline(*cp); err != nil {
		return err
	}
	if err := s.verifyPublication(ctx, *cp); err != nil {
		return err
	}
	return s.verifyStream(ctx, cp, slot)
}

func (s *session) otherStream(cp checkpoint.Checkpoint) error {
	return s.anew(fmt.Sprintf("the checkpoint belongs to stream %s and OUTBOX_STREAM is %s: one slot has one stream", cp.Stream, s.stream.Name),
		"choose another OUTBOX_SLOT for another stream, or ")
}

// verifyConfirmed makes sure that the slot has all that is behind the checkpoint.
func (s *session) verifyConfirmed(cp *checkpoint.Checkpoint, slot replication.Slot) error {
	if cp.Phase != checkpoint.Streaming || slot.Confirmed <= cp.Confirmed {
		return nil
	}
	cp.Foreign = true // what the slot does not bring may stand in the stream, like others' messages
	return s.miss(fmt.Sprintf("slot %s is confirmed up to %s, and this relay never confirmed more than %s: it was dropped and made again, or advanced by hand, or copied to a standby that had not all of its WAL (set synchronized_standby_slots): events between are not in it",
		slot.Name, slot.Confirmed, cp.Confirmed), s.startAnew(), s.anewSQL())
}

// miss notes that events came past the slot, which the table then gives, or
// returns an error where it can't.
func (s *session) miss(why, remedy, sql string) error {
	if reason := s.cantHeal(); reason != "" {
		return &fault.Error{What: why + ". They stand in the table with status 'pending', and " + reason, Remedy: remedy, SQL: sql}
	}
	s.missed = why
	return nil
}

// verifyIdentity makes sure that the stream is the one that the checkpoint
// knows. Another creation time alone does not say that it was made again:
// nats-server before August 2026 changes that of a stream with one replica when
// it starts again after the stream was updated. Then the stream's messages decide.
// Source: nats-server issue 8470; seen on 2.10.27, 2.11.17, 2.12.15 and 2.14.0.
func (s *session) verifyIdentity(ctx context.Context, cp *checkpoint.Checkpoint, slot replication.Slot) error {
	if cp.StreamCreated.Equal(s.stream.Created) {
		return nil
	}
	what, err := s.forgotten(ctx, *cp)
	if err != nil {
		return err
	}
	var known *checkpoint.Earlier
	if what != "" {
		if known, err = s.earlier(ctx, slot); err != nil {
			return err
		}
	}
	if s.stream.Begin > cp.Sequence || what != "" && known == nil {
		return s.anew(fmt.Sprintf("stream %s was made at %s, and the checkpoint knows one made at %s with more messages of this relay: it was deleted and made again",
			cp.Stream, s.stream.Created, cp.StreamCreated.UTC()), "")
	}
	s.log.Info("the stream says another creation time than before, and has the checkpoint's message: its server was started again",
		"stream", cp.Stream, "created_at", s.stream.Created, "checkpoint_created_at", cp.StreamCreated.UTC())
	cp.StreamCreated = s.stream.Created
	return nil
}

// verifySystem makes sure that the checkpoint was written by this cluster, or
// by one that it descends from.
func (s *session) verifySystem(cp checkpoint.Checkpoint) error {
	switch {
	case cp.SystemID != s.system.ID:
		sql := fmt.Sprintf("UPDATE %s SET system_identifier = '%s', timeline = %d WHERE slot = '%s'",
			s.table.Own("outbox_relay_checkpoints"), s.system.ID, s.system.Timeline, s.table.Slot)
		return &fault.Error{
			What: fmt.Sprintf("the checkpoint was written by Postgres cluster %s and this is %s: the database was restored from a dump or copied", cp.SystemID, s.system.ID),
			Remedy: "if the other one is gone for good, let this one go on behind it, with its pending rows that the stream does not have: " +
				sql + "; else " + s.startAnew(),
			SQL: sql,
		}
	case cp.Timeline > s.system.Timeline:
		return &fault.Error{What: fmt.Sprintf("the checkpoint was written on timeline %d and this server is on %d: it is an old primary", cp.Timeline, s.system.Timeline),
			Remedy: "connect to the current one"}
	}
	return nil
}

// sinceTimeline says that the server is on another timeline than the checkpoint.
func (s *session) sinceTimeline(cp checkpoint.Checkpoint) string {
	if cp.Timeline == s.system.Timeline {
		return ""
	}
	return fmt.Sprintf(" on timeline %d (this is %d: a standby was promoted that had no copy of the slot, or a backup restored)", cp.Timeline, s.system.Timeline)
}

// verifyTimeline finds out where the server left the checkpoint's timeline: by a
// standby's promotion, or a restore. The checkpoint went along, so it stands on
// WAL that both have; the stream can hold events that only the other had.
func (s *session) verifyTimeline(cp checkpoint.Checkpoint) error {
	s.left = 0
	if cp.Timeline == s.system.Timeline {
		return nil
	}
	left, err := s.system.Left(cp.Timeline)
	if err != nil {
		return s.anew(fmt.Sprintf("the checkpoint was written on timeline %d: %s", cp.Timeline, err), "")
	}
	s.left = left
	s.log.Warn("the server is on another timeline than the checkpoint: a standby was promoted, or a backup restored",
		"timeline", s.system.Timeline, "checkpoint_timeline", cp.Timeline, "left_lsn", left.String())
	return nil
}

func (s *session) verifyPublication(ctx context.Context, cp checkpoint.Checkpoint) error {
	state, err := s.table.State(ctx, s.sql)
	if err != nil {
		return err
	}
	if cp.Publication == "" || cp.Publication == state.Publication {
		return nil
	}
	if err := s.checkPublication(ctx); err != nil {
		return err
	}
	return s.missPublication()
}

// checkPublication says what is wrong with table or publication now.
func (s *session) checkPublication(ctx context.Context) error {
	if _, err := s.table.Inspect(ctx, s.sql); err != nil {
		return err
	}
	return s.table.CheckPublication(ctx, s.sql)
}

// missPublication notes that the publication is not what it was.
func (s *session) missPublication() error {
	sql := fmt.Sprintf("UPDATE %s SET publication_state = NULL WHERE slot = '%s'", s.table.Own("outbox_relay_checkpoints"), s.table.Slot)
	return s.miss(fmt.Sprintf("publication %s, or the membership of table %s in it, was changed or made again: events inserted meanwhile may have been passed over", s.table.Publication, s.table),
		"see to those rows, then accept the publication as it is: "+sql, sql)
}

// verifyStream makes sure that the stream still holds, or held, the message
// that the checkpoint stands on. A broker that forgot it had acknowledged more
// than it had made durable: the checkpoint then goes back to where the stream
// still bears it out, if the slot does too.
func (s *session) verifyStream(ctx context.Context, cp *checkpoint.Checkpoint, slot replication.Slot) error {
	what, err := s.forgotten(ctx, *cp)
	if err != nil || what == "" {
		return err
	}
	s.relay.metrics.forgotten.Inc()
	earlier, err := s.earlier(ctx, slot)
	switch {
	case err != nil:
		return err
	case earlier == nil:
		return s.forgot(what)
	}
	s.log.Error("the broker forgot messages that it had acknowledged", "reason", what, "remedy", "none needed: the lost events are read again from the slot and sent again",
		"from_position", earlier.Position.String(), "from_sequence", earlier.Sequence)
	return s.store.GoBack(ctx, cp, *earlier)
}

// forgot is the choice where nothing tells what the broker forgot.
func (s *session) forgot(what string) error {
	sql := fmt.Sprintf("UPDATE %s SET stream_sequence = %d, message_id = NULL, unrecorded_bound = 0 WHERE slot = '%s'",
		s.table.Own("outbox_relay_checkpoints"), s.stream.Last, s.table.Slot)
	return &fault.Error{What: what, SQL: sql, Remedy: "go on behind the stream's end: " + sql +
		", and publish the lost events again from their rows: `outbox-relay replay`. With OUTBOX_CONFIRM_DELAY longer than the broker's sync interval the relay sends them again by itself"}
}

// forgotten says what the broker forgot; empty: nothing.
func (s *session) forgotten(ctx context.Context, cp checkpoint.Checkpoint) (string, error) {
	behind, err := s.awaitSequence(ctx, cp.Sequence)
	switch {
	case err != nil:
		return "", err
	case behind:
		return fmt.Sprintf("stream %s ends at sequence %d, and the checkpoint stands at %d: the broker forgot messages %d to %d, which it had acknowledged",
			s.stream.Name, s.stream.Last, cp.Sequence, s.stream.Last+1, cp.Sequence), nil
	case cp.MessageID == "" || cp.Sequence == 0:
		return "", nil
	}
	id, err := s.relay.client.Load().MessageID(ctx, s.stream.Name, cp.Sequence)
	switch {
	case sink.Gone(err), err == nil && id == cp.MessageID:
		return "", nil
	case err != nil:
		return "", err
	}
	return fmt.Sprintf("message %d of stream %s has id %q, and the checkpoint knows it as %q: the broker forgot messages that it had acknowledged, and stored others since",
		cp.Sequence, s.stream.Name, id, cp.MessageID), nil
}

// awaitSequence gives a leader that is behind a moment to catch up.
func (s *session) awaitSequence(ctx context.Context, sequence uint64) (behind bool, err error) {
	for deadline := time.Now().Add(10 * time.Second); s.stream.Last < sequence; {
		if !s.stream.Replicated || time.Now().After(deadline) {
			return true, nil
		}
		if err := wait.For(ctx, 250*time.Millisecond); err != nil {
			return false, err
		}
		if err := s.connectStream(ctx); err != nil {
			return false, err
		}
	}
	return false, nil
}

// earlier finds the newest older checkpoint whose message still stands in the
// stream, and whose events the slot still has; nil: there is none.
func (s *session) earlier(ctx context.Context, slot replication.Slot) (*checkpoint.Earlier, error) {
	kept, err := s.store.Earlier(ctx)
	if err != nil {
		return nil, err
	}
	for _, e := range kept {
		switch {
		case e.Sequence > s.stream.Last || slot.Confirmed > e.Confirmed:
			continue
		case e.Sequence == 0:
			return &e, nil // nothing was stored yet
		}
		id, err := s.relay.client.Load().MessageID(ctx, s.stream.Name, e.Sequence)
		switch {
		case err == nil && id == e.MessageID:
			return &e, nil
		case err != nil && !sink.Gone(err):
			return nil, err
		}
	}
	return nil, nil
}
