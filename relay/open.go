package relay

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/checkpoint"
	"outbox-relay/internal/fault"
	"outbox-relay/internal/wait"
	"outbox-relay/replication"
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
		return noCheckpointFault(name)
	case why != "":
		return s.heal(ctx, noSlot == nil, why)
	case noSlot != nil:
		return s.createSlot(ctx)
	}
	return nil
}

// noCheckpointFault says that nobody knows what was published of a slot's events.
func noCheckpointFault(slot string) error {
	sql := fmt.Sprintf("SELECT pg_drop_replication_slot('%s')", slot)
	return &fault.Error{What: fmt.Sprintf("slot %s exists and has no checkpoint: it was not made by this relay, or its row in outbox_relay_checkpoints was deleted, so what it has published is not known", slot),
		Remedy: "if nothing needs the slot, " + sql + " and start again: " + allPending, SQL: sql}
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
	s.relay.causes.open.Over("no transaction holds the slot up any more")
	if err != nil {
		return err
	}
	s.log.Info("created the slot", "slot", s.table.Slot, "lsn", created.Point.String())
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
	config, err := s.relay.sqlConfig("outbox-relay backfill", map[string]string{"row_security": "off"})
	if err != nil {
		return err
	}
	if s.reading, err = pgx.ConnectConfig(ctx, config); err != nil {
		return ExplainConnect(err)
	}
	if err := s.checkSameServer(ctx, s.reading); err != nil {
		return err
	}
	s.backlog, err = s.table.OpenBacklog(ctx, s.reading)
	return err
}

// tellWaiting names, from time to time, the transaction that the slot waits for. It
// has the SQL connection until ctx ends.
func (s *session) tellWaiting(ctx context.Context) {
	for wait.For(ctx, 5*time.Second) == nil {
		var pid int
		var since, gid, database string
		// pg_locks shows to everybody who has a transaction id; since when, only to some.
		// A prepared transaction has no backend, and pg_locks no pid for it.
		err := s.sql.QueryRow(context.WithoutCancel(ctx), `select coalesce(l.pid, 0), coalesce(p.prepared::text, a.xact_start::text, 'not shown to this role'),
				coalesce(pg_catalog.quote_literal(p.gid), ''), coalesce(p.database, '')
			from pg_catalog.pg_locks l left join pg_catalog.pg_stat_activity a on a.pid = l.pid
				left join pg_catalog.pg_prepared_xacts p on l.pid is null and p.transaction = l.transactionid
			where l.locktype = 'transactionid' and l.mode = 'ExclusiveLock' and l.granted and (l.pid <> pg_catalog.pg_backend_pid() or p.gid is not null)
			order by l.transactionid::text::bigint limit 1`).Scan(&pid, &since, &gid, &database)
		switch {
		case err != nil:
			continue // none, or the connection is broken, which its next user finds
		case gid != "":
			s.relay.causes.open.Again("the slot still waits for a prepared transaction", "slot", s.table.Slot, "gid", gid, "database", database, "since", since,
				"remedy", fmt.Sprintf("in that database, COMMIT PREPARED %s or ROLLBACK PREPARED %[1]s", gid))
		default:
			s.relay.causes.open.Again("the slot still waits for an open transaction", "slot", s.table.Slot, "pid", pid, "since", since,
				"remedy", fmt.Sprintf("end it, or SELECT pg_terminate_backend(%d)", pid))
		}
	}
}
