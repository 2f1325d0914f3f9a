package relay

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/checkpoint"
	"outbox-relay/decoder"
	"outbox-relay/outbox"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// openSlot makes sure that slot and checkpoint belong together, and makes both
// on the first run. A slot that is lost is made anew, with what it has lost from
// the table. Whatever else it finds, somebody has restored or replaced something:
// it says what, and never guesses.
func (s *session) openSlot(ctx context.Context) error {
	name := s.table.Slot
	// Another relay may be at its first run, which writes the checkpoint, makes the
	// slot, and only then streams. So whoever streams by this checkpoint has a slot
	// by now, and where there is a slot there is a checkpoint to be read again.
	cp, noCheckpoint := s.store.Read(ctx)
	slot, noSlot := replication.ReadSlot(ctx, s.sql, name)
	if noSlot != nil && !errors.Is(noSlot, replication.ErrNoSlot) {
		return noSlot
	}
	if noSlot == nil && errors.Is(noCheckpoint, checkpoint.ErrNone) {
		cp, noCheckpoint = s.store.Read(ctx)
	}
	if noCheckpoint != nil && !errors.Is(noCheckpoint, checkpoint.ErrNone) {
		return noCheckpoint
	}
	if noCheckpoint == nil {
		if err := s.verifySystem(cp); err != nil {
			return err
		}
	}
	switch why := s.slotLost(slot, noSlot, cp); {
	case noSlot == nil && noCheckpoint != nil:
		return fmt.Errorf("slot %[1]s exists and has no checkpoint: it was not made by this relay, or its row in outbox_relay_checkpoints was deleted, so what it has published is not known: "+
			"if nothing needs the slot, SELECT pg_drop_replication_slot('%[1]s') and start again: every row that is pending then is published, also those that the stream has already (OUTBOX_BACKFILL=false leaves them)", name)
	case why != "":
		return s.heal(ctx, noSlot == nil, why)
	case noSlot != nil:
		return s.createSlot(ctx)
	}
	return nil
}

// createSlot writes the checkpoint before it makes the slot, so that a slot
// without a checkpoint is never its own. What its snapshot sees is the backlog.
func (s *session) createSlot(ctx context.Context) error {
	state, err := s.table.State(ctx, s.sql)
	if err != nil {
		return err
	}
	err = s.store.Create(ctx, checkpoint.Checkpoint{SystemID: s.system.ID, Timeline: s.system.Timeline,
		Stream: s.stream.Name, StreamCreated: s.stream.Created, Sequence: s.stream.Last, Publication: state.Publication})
	if err != nil {
		return err
	}
	var version int
	if err := s.sql.QueryRow(ctx, `select current_setting('server_version_num')::int`).Scan(&version); err != nil {
		return fmt.Errorf("ask Postgres for its version: %w", err)
	}
	if s.relay.config.Backfill {
		if err := s.openBacklog(ctx); err != nil {
			return err
		}
	}
	s.log.Info("creating the slot: this waits for every transaction that is open in the cluster", "slot", s.table.Slot)
	telling, stop := context.WithCancel(ctx)
	var teller sync.WaitGroup
	teller.Go(func() { s.tellWaiting(telling) })
	created, err := s.conn.CreateSlot(ctx, s.table.Slot, version >= 170000)
	stop()
	teller.Wait()
	if err != nil {
		return err
	}
	s.log.Info("created the slot", "slot", s.table.Slot, "consistent_point", created.Point.String())
	if !s.relay.config.Backfill {
		return s.tellPending(ctx)
	}
	return s.backlog.Take(ctx, created.Snapshot)
}

// tellPending says that rows are left out, as OUTBOX_BACKFILL=false wants it.
func (s *session) tellPending(ctx context.Context) error {
	pending, err := s.table.HasPending(ctx, s.sql)
	if pending {
		s.log.Warn("the table has pending rows from before the slot: they are not published, and stay pending", "table", s.table.String(), "remedy", "OUTBOX_BACKFILL=true")
	}
	return err
}

// openBacklog prepares to read the backlog, on a connection of its own.
func (s *session) openBacklog(ctx context.Context) error {
	config := s.sqlConfig.Copy()
	config.RuntimeParams["application_name"] = "outbox-relay backfill"
	config.OnNotice = nil
	var err error
	if s.reading, err = pgx.ConnectConfig(ctx, config); err != nil {
		return explainConnect(err)
	}
	if err := s.checkSameServer(ctx, s.reading); err != nil {
		return err
	}
	s.backlog, err = s.table.OpenBacklog(ctx, s.reading, s.layout)
	return err
}

// tellWaiting names, from time to time, the backend whose transaction the slot
// waits for. It has the SQL connection until ctx ends.
func (s *session) tellWaiting(ctx context.Context) {
	for pause(ctx, 5*time.Second) == nil {
		var pid int
		var since *time.Time
		// pg_locks shows to everybody who has a transaction id.
		err := s.sql.QueryRow(context.WithoutCancel(ctx), `select l.pid, a.xact_start
			from pg_catalog.pg_locks l left join pg_catalog.pg_stat_activity a on a.pid = l.pid
			where l.locktype = 'transactionid' and l.mode = 'ExclusiveLock' and l.granted and l.pid <> pg_catalog.pg_backend_pid()
			order by l.transactionid::text::bigint limit 1`).Scan(&pid, &since)
		if err != nil {
			continue // none, or the connection is broken, which its next user finds
		}
		args := []any{"slot", s.table.Slot, "pid", pid, "remedy", fmt.Sprintf("end it, or SELECT pg_terminate_backend(%d)", pid)}
		if since != nil {
			args = append(args, "since", since.UTC())
		}
		s.log.Warn("the slot still waits for an open transaction", args...)
	}
}

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
	if cp.Phase == checkpoint.Creating { // nothing was read from the slot yet
		cp.Position = checkpoint.Position{Commit: from.reader.Confirmed()}
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
	from.found, err = s.relay.client.Resume(ctx, s.stream, cp.Sequence, cp.Foreign, bound, func(limit int, enough func(string) bool) (sink.Events, error) {
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
		events.IDs = append(events.IDs, outbox.MessageID(id, b.Run))
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

// lookBack opens the backlog where there is one to publish: the pending rows that
// the slot does not bring. Where the slot's own snapshot does not tell which these
// are, the slot does.
func (s *session) lookBack(ctx context.Context, from *origin) error {
	cp := &from.checkpoint
	switch {
	case cp.Phase != checkpoint.Backfilling || s.backlog != nil:
		return nil
	case !s.relay.config.Backfill:
		return fmt.Errorf("a backfill is not finished, and OUTBOX_BACKFILL is false: set it to true, or, to leave its rows as they are, UPDATE %s.outbox_relay_checkpoints SET phase = 'streaming' WHERE slot = '%s'",
			s.table.Schema, s.table.Slot)
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
	s.log.Info("looked which rows the slot brings", "rows", len(brought.known)+len(brought.retried), "up_to", now.WALEnd.String())
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
		s.log.Warn("the stream has messages that are not this relay's", "messages", n, "remedy", "deny others to publish on the relay's subjects")
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
		"UPDATE %s.outbox_relay_checkpoints SET stream_sequence = %d, message_id = NULL, foreign_seen = false, unrecorded_bound = 0 WHERE slot = '%s'",
		err, cp.Position, s.stream.Last, s.table.Schema, s.stream.Last, s.table.Slot)
}

// startAnew is the last remedy.
func (s *session) startAnew() string {
	return fmt.Sprintf("to start anew, SELECT pg_drop_replication_slot('%s'); DELETE FROM %s.outbox_relay_checkpoints WHERE slot = '%s': "+
		"every row that is pending then is published, also those that the stream has already (OUTBOX_BACKFILL=false leaves them)",
		s.table.Slot, s.table.Schema, s.table.Slot)
}

// explainReading adds what to do about WAL that the slot can never read past:
// Postgres looks the publication and the columns' names up as they were when
// the events were inserted.
func (s *session) explainReading(err error) error {
	var pgErr *pgconn.PgError
	noPublication := errors.Is(err, replication.ErrPublication) || errors.As(err, &pgErr) && pgErr.Code == "42704"
	switch {
	case noPublication:
		why := fmt.Sprintf("%s: events that were committed while the publication was missing can't be read from the slot", err)
		if reason := s.cantHeal(); reason != "" {
			return fmt.Errorf("%w: %s; they stand in the table with status 'pending', and %s. Make it with `outbox-relay migrate`, then, %s", err, why, reason, s.startAnew())
		}
		s.relay.unreadable.Store(&unreadable{why: why, confirmed: s.confirmed})
		return fmt.Errorf("%w: %s", errSlotLost, why)
	case errors.Is(err, decoder.ErrNoID):
		return fmt.Errorf("%w in table %s when they were inserted, so they can't be told from others; they stand in the table with status 'pending'. "+
			"Give the column its name back, then, %s", err, s.table, s.startAnew())
	}
	return err
}

// explainSchema says what the table lacks, where that is why a statement failed.
func (s *session) explainSchema(ctx context.Context, err error) error {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && (pgErr.Code == "42703" || pgErr.Code == "42P01") { // undefined column, undefined table
		if _, fault := s.table.Inspect(ctx, s.sql); fault != nil {
			return fault
		}
		if fault := s.table.CheckPublication(ctx, s.sql); fault != nil {
			return fault
		}
	}
	return err
}

// look lets a lookahead read until it has enough. The session has then been read
// from, and must be restarted.
func (s *session) look(ctx context.Context, reader *replication.Session, ahead *lookahead) error {
	ahead.decoder = decoder.New(s.layout.OID, s.table.Columns)
	// The walsender sends what is flushed; the last records before the end may not be,
	// and where nothing commits they would not for a quarter of a minute. A commit
	// of our own flushes them.
	if _, err := s.sql.Exec(ctx, `select pg_catalog.pg_logical_emit_message(true, 'outbox_relay', '')`); err != nil {
		return fmt.Errorf("flush WAL: %w", err)
	}
	reading, cancel := context.WithCancel(ctx)
	defer cancel()
	asking := time.NewTicker(100 * time.Millisecond)
	defer asking.Stop()
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		for {
			select {
			case <-reading.Done():
				return
			case <-asking.C:
				reader.Ask()
			}
		}
	}()
	err := reader.Run(reading, ahead)
	cancel()
	<-asked
	if errors.Is(err, errEnough) {
		return nil
	}
	return first(context.Cause(ctx), s.explainReading(err))
}

var errEnough = errors.New("enough")

// lookahead is a handler that looks at what the slot has up to an LSN, or until
// take returns errEnough.
type lookahead struct {
	decoder *decoder.Decoder
	end     pglogrepl.LSN
	take    func(decoder.Kind, *decoder.Decoder) error
}

func (l *lookahead) Data(start pglogrepl.LSN, data []byte) error {
	kind, err := decode(l.decoder, start, data)
	switch {
	case err != nil:
		return err
	case kind == decoder.Commit && l.decoder.End >= l.end:
		return errEnough
	}
	return l.take(kind, l.decoder)
}

func (l *lookahead) Idle() {}

func (l *lookahead) Notice(string) {}

func (l *lookahead) Keepalive(walEnd pglogrepl.LSN, _ bool) error {
	if walEnd >= l.end && !l.decoder.InTransaction() {
		return errEnough
	}
	return nil
}

// collector collects the ids of the first events behind a position.
type collector struct {
	after  checkpoint.Position
	left   pglogrepl.LSN // events from here on were not there to be published; 0: all were
	limit  int
	enough func(id string) bool // all that is wanted is found
	events sink.Events
}

func (c *collector) take(kind decoder.Kind, d *decoder.Decoder) error {
	e := &d.Event
	switch {
	case kind != decoder.Insert && kind != decoder.Request || e.Position.Compare(c.after) <= 0:
		return nil
	case kind == decoder.Request:
		return errEnough // what it asks for is announced before anything of it, or behind it, is sent
	case !pending(e):
		return nil
	}
	c.events.IDs = append(c.events.IDs, string(e.ID))
	if c.left == 0 || e.Position.Commit < c.left {
		c.events.Old = len(c.events.IDs)
	}
	if c.enough(string(e.ID)) || len(c.events.IDs) >= c.limit {
		return errEnough
	}
	return nil
}

// brought collects which rows come out of the slot: inserted, or to be tried again.
type brought struct {
	known   map[string]bool
	retried map[string]int // and as what attempt
}

func (b *brought) take(kind decoder.Kind, d *decoder.Decoder) error {
	switch {
	case kind == decoder.Insert && pending(&d.Event):
		b.known[string(d.Event.ID)] = true
	case kind == decoder.Request && d.Request.Run == "":
		for i, id := range d.Request.IDs {
			b.retried[id] = d.Request.Attempts[i]
		}
	}
	return nil
}
