package relay

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/checkpoint"
	"outbox-relay/decoder"
	"outbox-relay/internal/fault"
	"outbox-relay/outbox"
	"outbox-relay/outbox/event"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// resume starts to stream and finds out where: it matches the messages that
// follow the checkpoint in the stream with the events that follow it in the
// slot, then records that publishing begins behind them.
func (s *session) resume(ctx context.Context) (origin, error) {
	var from origin
	var err error
	if from.reader, from.checkpoint, err = s.start(ctx); err != nil {
		return from, err
	}
	if from.batch, err = s.store.Batch(ctx); err != nil {
		return from, err
	}
	cp := &from.checkpoint
	if !s.relay.streamed {
		s.relay.unclean.Store(cp.Bound > 0)
	}
	if cp.Phase == checkpoint.Creating { // nothing was read from the slot yet
		cp.Position = event.Position{Commit: from.reader.Confirmed()}
		cp.Confirmed = from.reader.Confirmed()
		cp.Phase = checkpoint.Backfilling
		if !s.relay.config.Backfill {
			cp.Phase = checkpoint.Streaming
		}
	}
	if s.missed != "" {
		s.log.Warn("healing the outbox from its table", "reason", s.missed)
		s.relay.metrics.healed.Inc()
		if cp.Phase == checkpoint.Streaming {
			cp.Phase, cp.Backfilled = checkpoint.Backfilling, 0
		}
	}
	// The slot is ours: whoever had it can't have been sent anything beyond.
	now, err := s.table.State(ctx, s.sql)
	if err != nil {
		return from, err
	}
	from.heritage = sink.Heritage{Events: cp.Bound, End: now.WALEnd}
	if s.left != 0 {
		from.heritage.End = s.left
	}
	if err := s.match(ctx, &from, now.WALEnd); err != nil {
		return from, err
	}
	if err := s.lookBack(ctx, &from); err != nil {
		return from, err
	}
	cp.Timeline, cp.Bound = s.system.Timeline, unrecordedBound
	if cp.Publication == "" || s.missed != "" { // accepted as it is, or what it passed over is published now
		cp.Publication = now.Publication
	}
	cp.Confirmed = max(cp.Confirmed, from.reader.Confirmed())
	s.known = true
	return from, s.store.Begin(ctx, *cp)
}

// match finds out which of the next events stand in the stream already. These
// are of a batch, where one is not done: nothing else was sent then.
func (s *session) match(ctx context.Context, from *origin, end pglogrepl.LSN) error {
	cp := &from.checkpoint
	bound, read := cp.Bound, false
	events := func(limit int, enough func(string) bool) (sink.Events, error) {
		read = true
		collect := &collector{after: cp.Position, left: s.left, limit: limit, enough: enough}
		err := s.look(ctx, from.reader, &lookahead{end: end, take: collect.take})
		return collect.events, err
	}
	if left := from.batch.Left(); len(left) > 0 {
		bound = min(bound, len(left))
		events = func(int, func(string) bool) (sink.Events, error) { return batchEvents(from.batch), nil }
	}
	var err error
	from.found, err = s.relay.client.Load().Resume(ctx, s.stream, cp.Sequence, cp.Foreign, bound, func(limit int, enough func(string) bool) (sink.Events, error) {
		s.log.Info("matching the stream with the slot", "messages", s.stream.Last-cp.Sequence)
		return events(limit, enough)
	})
	if err == nil && cp.Phase == checkpoint.Backfilling {
		from.found.Strangers, err = s.settleStrangers(ctx, from.found.Strangers)
	}
	cp.Foreign = s.tellStrangers(from.found, cp.Phase == checkpoint.Backfilling) || cp.Foreign
	if err != nil {
		return s.explainResume(ctx, *cp, err)
	}
	if read {
		return s.readAgain(ctx, from)
	}
	return nil
}

// batchEvents are the messages of a batch that is not done.
func batchEvents(b checkpoint.TableBatch) sink.Events {
	events := sink.Events{Old: len(b.Left())}
	for _, id := range b.Left() {
		events.IDs = append(events.IDs, event.MessageID(id, b.Run))
	}
	return events
}

// readAgain begins to read anew where the slot was read from only to look.
func (s *session) readAgain(ctx context.Context, from *origin) (err error) {
	matched := s.stream // what has landed since is for the chain to find
	from.reader, err = s.restart(ctx, from.checkpoint)
	s.stream = matched
	return err
}

// lookBack opens the backlog where there is one to publish, and no list of it: the
// pending rows that the slot does not bring. Where the slot's own snapshot does not
// tell which these are, the slot does.
func (s *session) lookBack(ctx context.Context, from *origin) error {
	cp := &from.checkpoint
	switch {
	case cp.Phase != checkpoint.Backfilling || s.backlog != nil:
		return nil
	case !s.relay.config.Backfill:
		return fmt.Errorf("a backfill is not finished, and OUTBOX_BACKFILL is false: set it to true, or, to leave its rows as they are, UPDATE %s SET phase = 'streaming' WHERE slot = '%s'",
			s.table.Own("outbox_relay_checkpoints"), s.table.Slot)
	}
	if s.missed == "" {
		if _, listed, err := s.store.BacklogLeft(ctx); err != nil || listed {
			return err
		}
	}
	if err := s.openBacklog(ctx); err != nil {
		return err
	}
	if _, err := s.backlog.Snapshot(ctx); err != nil { // taken now: the end of WAL is past all that it sees
		return err
	}
	now, err := s.table.State(ctx, s.sql)
	if err != nil {
		return err
	}
	s.leaveOut(from.batch)
	brought := &brought{known: s.backlog.Known, retried: s.backlog.Retried}
	if err := s.look(ctx, from.reader, &lookahead{end: now.WALEnd, take: brought.take}); err != nil {
		return err
	}
	s.log.Info("looked which rows the slot brings", "rows", len(brought.known)+len(brought.retried), "lsn", now.WALEnd.String())
	return s.readAgain(ctx, from)
}

// leaveOut leaves to a batch what it has announced. With keep the rows don't tell
// what an earlier one has published.
func (s *session) leaveOut(b checkpoint.TableBatch) {
	if b.Source != checkpoint.Replay {
		for _, id := range b.Left() {
			s.backlog.Known[id] = true
		}
	}
	if s.table.Mode == outbox.Keep && b.Source == checkpoint.Backfill {
		s.backlog.After = b.IDs[len(b.IDs)-1]
	}
}

// tellStrangers reports messages that are none of the slot's events, nor of a row
// where rows are published from the table, and returns whether they are others'.
// Behind a failover these are events whose transactions it lost: nobody can take
// them back.
func (s *session) tellStrangers(found sink.Found, fromTable bool) bool {
	n := len(found.Strangers) + found.Lost
	if n == 0 {
		return false
	}
	if s.left == 0 && fromTable && s.table.Mode == outbox.Delete && found.Lost == 0 && identified(found.Strangers) {
		s.log.Info("the stream has messages without a row: their rows were deleted, by the application or since they were recorded", "messages", n)
		return false
	}
	if s.left == 0 {
		s.relay.metrics.foreign.Add(float64(n))
		s.relay.causes.foreign.Again("the stream has messages that are not this relay's", "messages", n, "remedy", "deny others to publish on the relay's subjects")
		s.relay.causes.foreign.Lapse("no more messages in the stream are others'")
		return true
	}
	s.relay.metrics.phantoms.Add(float64(n))
	for some := range slices.Chunk(found.Strangers, 100) {
		var ids []string
		for _, m := range some {
			ids = append(ids, m.ID)
		}
		s.log.Error("the stream has events whose transactions are lost: what they tell of did not happen",
			"messages", len(some), "first_sequence", some[0].Sequence, "last_sequence", some[len(some)-1].Sequence, "ids", ids,
			"remedy", "set synchronized_standby_slots, so that only what the standbys have is published; correct what consumers made of these")
	}
	return true
}

// identified reports whether all of the messages have an id.
func identified(messages []sink.Stranger) bool {
	return !slices.ContainsFunc(messages, func(m sink.Stranger) bool { return m.ID == "" })
}

// explainResume keeps in mind that other messages were seen, so that the next
// start is no surer than this one, and adds the choice.
func (s *session) explainResume(ctx context.Context, cp checkpoint.Checkpoint, err error) error {
	var ambiguous *sink.AmbiguousError
	if !errors.As(err, &ambiguous) {
		return err
	}
	if noted := s.store.NoteForeign(ctx); noted != nil {
		return noted
	}
	return fmt.Errorf("%w: see which events after %s were delivered; then choose: to take all up to message %d as this relay's or others' and publish every event after the checkpoint again, "+
		"UPDATE %s SET stream_sequence = %d, message_id = NULL, foreign_seen = false, unrecorded_bound = 0 WHERE slot = '%s'",
		err, cp.Position, s.stream.Last, s.table.Own("outbox_relay_checkpoints"), s.stream.Last, s.table.Slot)
}

// startAnew is the last remedy.
func (s *session) startAnew() string {
	return fmt.Sprintf("to start anew, SELECT pg_drop_replication_slot('%s'); %s: %s", s.table.Slot, s.forgetSQL(), allPending)
}

// allPending is what starting anew means.
const allPending = "every row that is pending then is published, also those that the stream has already (OUTBOX_BACKFILL=false leaves them)"

func (s *session) forgetSQL() string {
	return fmt.Sprintf("DELETE FROM %s WHERE slot = '%s'", s.table.Own("outbox_relay_checkpoints"), s.table.Slot)
}

// anewSQL is what startAnew says, and does so also where the slot is gone.
func (s *session) anewSQL() string {
	return fmt.Sprintf("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '%s'; %s", s.table.Slot, s.forgetSQL())
}

// anew is a fault after which only starting anew helps, or what remedy says
// before.
func (s *session) anew(what, remedy string) error {
	return &fault.Error{What: what, Remedy: remedy + s.startAnew(), SQL: s.anewSQL()}
}

// explainReading adds what to do about WAL that the slot can never read past:
// Postgres looks the publication and the columns' names up as they were when
// the events were inserted.
func (s *session) explainReading(err error) error {
	var pgErr *pgconn.PgError
	noPublication := errors.Is(err, replication.ErrPublication) || errors.As(err, &pgErr) && pgErr.Code == "42704"
	switch {
	case noPublication:
		return s.giveUpSlot(err, "events that were committed while the publication was missing can't be read from the slot", "Make it with `outbox-relay migrate`, then")
	case errors.Is(err, replication.ErrWalsender) && outbox.Unprintable(err):
		return s.giveUpSlot(err, "Postgres can't send a row that was inserted there, so that it and what follows can't be read from the slot",
			"Set the status of those that were delivered to 'published', and that of the row which a SELECT of it fails for to 'failed'; then")
	case errors.Is(err, decoder.ErrNoID):
		return fmt.Errorf("%w in table %s when they were inserted, so they can't be told from others; they stand in the table with status 'pending'. "+
			"Give the column its name back, then, %s", err, s.table, s.startAnew())
	}
	return err
}

// giveUpSlot lets the next session publish from the table what the slot can't give; where
// that can't be, it says what to do before starting anew.
func (s *session) giveUpSlot(err error, what, before string) error {
	if reason := s.cantHeal(); reason != "" {
		return fmt.Errorf("%w: %s; they stand in the table with status 'pending', and %s. %s, %s", err, what, reason, before, s.startAnew())
	}
	why := fmt.Sprintf("%s: %s", err, what)
	s.relay.unreadable.Store(&unreadable{why: why, confirmed: s.confirmed})
	return fmt.Errorf("%w: %s", errSlotLost, why)
}

// explainSchema says what the table lacks, where that is why a statement failed.
func (s *session) explainSchema(ctx context.Context, err error) error {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && slices.Contains([]string{"42703", "42P01", "42501"}, pgErr.Code) { // undefined column, undefined table, insufficient privilege: of row level security, too
		if _, fault := s.table.Inspect(ctx, s.sql); fault != nil {
			return fault
		}
		if fault := s.table.CheckPublication(ctx, s.sql); fault != nil {
			return fault
		}
	}
	return err
}
