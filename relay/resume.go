package relay

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/checkpoint"
	"outbox-relay/decoder"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// openSlot makes sure that slot and checkpoint belong together, and makes both
// on the first run. Whatever else it finds, somebody has restored or replaced
// something: it says what, and never guesses.
func (s *session) openSlot(ctx context.Context) error {
	slot := s.table.Slot
	// Another relay may be at its first run, which writes the checkpoint, makes the
	// slot, and only then streams. So whoever streams by this checkpoint has a slot
	// by now, and where there is a slot there is a checkpoint to be read again.
	cp, noCheckpoint := s.store.Read(ctx)
	_, noSlot := replication.ReadSlot(ctx, s.sql, slot)
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
	switch {
	case noSlot == nil && noCheckpoint == nil:
		return nil
	case noSlot == nil:
		return fmt.Errorf("slot %[1]s exists and has no checkpoint: it was not made by this relay, or its row in outbox_relay_checkpoints was deleted, so what it has published is not known: "+
			"if nothing needs the slot, SELECT pg_drop_replication_slot('%[1]s') and start again: events that are committed until then stay pending in the table", slot)
	case noCheckpoint == nil && cp.Phase == checkpoint.Streaming:
		return fmt.Errorf("slot %[1]s is gone, and its checkpoint says that it was read up to %[2]s%[4]s: events committed since then came through no slot: "+
			"they stand in the table with status 'pending'. To go on with new events only, DELETE FROM %[3]s.outbox_relay_checkpoints WHERE slot = '%[1]s' and start again; "+
			"insert the pending rows anew to publish them", slot, cp.Confirmed, s.table.Schema, s.sinceTimeline(cp))
	default:
		return s.createSlot(ctx)
	}
}

// createSlot writes the checkpoint before it makes the slot, so that a slot
// without a checkpoint is never its own.
func (s *session) createSlot(ctx context.Context) error {
	pending, err := s.table.HasPending(ctx, s.sql)
	if err != nil {
		return err
	}
	if pending {
		s.log.Warn("the table has pending rows from before the slot: they are not published, and stay pending", "table", s.table.String())
	}
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
	s.log.Info("creating the slot: this waits for every transaction that is open in the cluster", "slot", s.table.Slot)
	telling, stop := context.WithCancel(ctx)
	var teller sync.WaitGroup
	teller.Go(func() { s.tellWaiting(telling) })
	point, err := s.conn.CreateSlot(ctx, s.table.Slot, version >= 170000)
	stop()
	teller.Wait()
	if err != nil {
		return err
	}
	s.log.Info("created the slot", "slot", s.table.Slot, "consistent_point", point.String())
	return nil
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
	cp := &from.checkpoint
	if cp.Phase == checkpoint.Creating { // nothing was read from the slot yet
		cp.Position = checkpoint.Position{Commit: from.reader.Confirmed()}
		cp.Confirmed = from.reader.Confirmed()
		cp.Phase = checkpoint.Streaming
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
	read := false
	from.found, err = s.relay.client.Resume(ctx, s.stream, cp.Sequence, cp.Foreign, cp.Bound, func(limit int, enough func(string) bool) (sink.Events, error) {
		read = true
		s.log.Info("matching the stream with the slot", "messages", s.stream.Last-cp.Sequence)
		return s.readIDs(ctx, from.reader, &collector{decoder: decoder.New(s.layout.OID, s.table.Columns),
			after: cp.Position, end: now.WALEnd, left: s.left, limit: limit, enough: enough})
	})
	cp.Foreign = s.tellStrangers(from.found) || cp.Foreign
	if err != nil {
		return from, s.explainResume(ctx, *cp, err)
	}
	if read {
		matched := s.stream // what has landed since is for the chain to find
		if from.reader, err = s.restart(ctx, *cp); err != nil {
			return from, err
		}
		s.stream = matched
	}
	cp.Timeline, cp.Bound = s.system.Timeline, unrecordedBound
	if cp.Publication == "" { // accepted as it is
		cp.Publication = now.Publication
	}
	cp.Confirmed = max(cp.Confirmed, from.reader.Confirmed())
	s.known = true
	return from, s.store.Begin(ctx, *cp)
}

// tellStrangers reports messages that are none of the slot's events, and
// returns whether there are any. Behind a failover these are events whose
// transactions it lost: nobody can take them back.
func (s *session) tellStrangers(found sink.Found) bool {
	n := len(found.Strangers) + found.Lost
	if n == 0 {
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

// startAnew is the last remedy: what the slot still had stays pending.
func (s *session) startAnew() string {
	return fmt.Sprintf("to start anew with new events only: SELECT pg_drop_replication_slot('%s'); DELETE FROM %s.outbox_relay_checkpoints WHERE slot = '%s'",
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
		return fmt.Errorf("%w: events that were committed while the publication was missing can't be read from the slot; they stand in the table with status 'pending'. "+
			"Make it with `outbox-relay migrate`, then, %s; insert the pending rows anew to publish them", err, s.startAnew())
	case errors.Is(err, decoder.ErrNoID):
		return fmt.Errorf("%w in table %s when they were inserted, so they can't be told from others; they stand in the table with status 'pending'. "+
			"Give the column its name back, then, %s; insert the pending rows anew to publish them", err, s.table, s.startAnew())
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

// readIDs lets a collector read until it has enough. The session has then been
// read from, and must be restarted.
func (s *session) readIDs(ctx context.Context, reader *replication.Session, collect *collector) (sink.Events, error) {
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
	err := reader.Run(reading, collect)
	cancel()
	<-asked
	if errors.Is(err, errEnough) {
		return collect.events, nil
	}
	return sink.Events{}, first(context.Cause(ctx), s.explainReading(err))
}

var errEnough = errors.New("enough")

// collector is a handler that collects the ids of the first events behind a
// position, up to an LSN.
type collector struct {
	decoder *decoder.Decoder
	after   checkpoint.Position
	end     pglogrepl.LSN
	left    pglogrepl.LSN // events from here on were not there to be published; 0: all were
	limit   int
	enough  func(id string) bool // all that is wanted is found
	events  sink.Events
}

func (c *collector) Data(start pglogrepl.LSN, data []byte) error {
	kind, err := decode(c.decoder, start, data)
	switch e := &c.decoder.Event; {
	case err != nil:
		return err
	case kind == decoder.Commit && c.decoder.End >= c.end:
		return errEnough
	case kind != decoder.Insert || e.Position.Compare(c.after) <= 0 || !pending(e):
		return nil
	default:
		return c.collect(string(e.ID), c.left == 0 || e.Position.Commit < c.left)
	}
}

func (c *collector) collect(id string, old bool) error {
	c.events.IDs = append(c.events.IDs, id)
	if old {
		c.events.Old = len(c.events.IDs)
	}
	if c.enough(id) || len(c.events.IDs) >= c.limit {
		return errEnough
	}
	return nil
}

func (c *collector) Idle() {}

func (c *collector) Notice(string) {}

func (c *collector) Keepalive(walEnd pglogrepl.LSN, _ bool) error {
	if walEnd >= c.end && !c.decoder.InTransaction() {
		return errEnough
	}
	return nil
}
