package ops

import (
	"context"
	"fmt"

	"outbox-relay/checkpoint"
	"outbox-relay/internal/fault"
	"outbox-relay/relay"
	"outbox-relay/replication"
)

// Names of the checks of slot and checkpoint.
var slotChecks = []string{"slot", "slot_wal", "slot_reader", "slot_failover", "checkpoint", "publication_state"}

func (e *examination) checkSlots(ctx context.Context) {
	if !e.table {
		e.skip("the table is not as migrate makes it", slotChecks...)
		return
	}
	standing, err := e.Standing(ctx)
	if !e.judge("slot", err) {
		e.skip("slot and checkpoint could not be read", slotChecks[1:]...)
		return
	}
	e.standing = &standing
	if standing.Slot == nil {
		e.ok("slot", "%s is not there", e.Config.Table.Slot)
		e.skip("there is no slot", "slot_wal", "slot_reader", "slot_failover")
	} else {
		e.checkSlot(ctx, standing)
	}
	e.checkCheckpoint(ctx, standing)
}

func (e *examination) checkSlot(ctx context.Context, standing relay.Standing) {
	t := e.Config.Table
	if err := standing.Slot.Check(e.sql.Config().Database); !e.judge("slot", err) {
		e.standing = nil
		e.skip("the slot is not a relay's of this database", "slot_wal", "slot_reader", "slot_failover")
		return
	}
	details, err := t.ReadSlotDetails(ctx, e.sql)
	if !e.judge("slot", err) {
		e.skip("the slot could not be read", "slot_wal", "slot_reader", "slot_failover")
		return
	}
	e.slot = &details
	if standing.Slot.Lost() {
		e.warn("slot", &fault.Error{What: fmt.Sprintf("%s is invalidated: %s", t.Slot, replication.Why(details.Invalidation)),
			Remedy: "start the relay: it takes what was missed from the table, or says how to go on"})
	} else {
		e.ok("slot", "%s (%s), confirmed up to %s", t.Slot, details.Plugin, details.ConfirmedLSN)
	}
	e.checkSlotWAL()
	e.checkReader(ctx)
	e.checkFailover()
}

// checkSlotWAL looks whether the WAL that the slot needs is there, and stays.
func (e *examination) checkSlotWAL() {
	s := e.slot
	found := fmt.Sprintf("wal_status is %s, %s held", s.WALStatus, size(s.Held))
	if s.SafeWALSize != nil {
		found += ", " + size(*s.SafeWALSize) + " left until it is in danger"
	}
	switch {
	case s.WALStatus == "lost": // judged with the checkpoint
		if s.Invalidation != "" {
			found += " (invalidated: " + s.Invalidation + ")"
		}
		loosen, sql := loosened(s.Invalidation)
		e.warn("slot_wal", &fault.Error{What: found, Remedy: "start the relay; then " + loosen, SQL: sql})
	case s.WALStatus == "unreserved", s.SafeWALSize != nil && *s.SafeWALSize < s.Held:
		e.warn("slot_wal", &fault.Error{What: found, Remedy: "let the relay catch up now, and bound what a slot may hold less tightly",
			SQL: "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf()"})
	default:
		e.ok("slot_wal", "%s", found)
	}
}

// loosened says what keeps Postgres from invalidating the slot again for that reason.
func loosened(invalidation string) (remedy, sql string) {
	switch invalidation {
	case "idle_timeout":
		return "raise idle_replication_slot_timeout, or set it to 0", "ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf()"
	case "", "wal_removed":
		return "raise max_slot_wal_keep_size", "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf()"
	}
	return "see the log of Postgres", ""
}

func (e *examination) checkReader(ctx context.Context) {
	s := e.slot
	if s.Active {
		e.ok("slot_reader", "a relay reads from it (walsender %d), %s behind", s.PID, size(s.Lag))
		return
	}
	found := "nobody reads from it"
	if s.InactiveSince != nil {
		found += " since " + s.InactiveSince.UTC().Format("2006-01-02 15:04:05") + " UTC"
	}
	f := &fault.Error{What: fmt.Sprintf("%s: Postgres keeps ever more WAL for it, %s by now", found, size(s.Held)), Remedy: "start a relay"}
	if e.mayBeAbandoned(ctx) {
		f.Remedy, f.Shell = "start a relay; if none is to come back, take the slot away:", "outbox-relay drop "+e.Config.Table.Slot
	}
	e.warn("slot_reader", f)
}

// mayBeAbandoned is that of the slot's relay.
func (e *examination) mayBeAbandoned(ctx context.Context) bool {
	written, left := abandonedAfter, abandonedAfter
	vitals, err := e.Config.Table.Vitals(ctx, e.sql)
	if err == nil && vitals.Checkpoint != nil {
		written = vitals.At.Sub(*vitals.Checkpoint)
	}
	if err == nil && e.slot.InactiveSince != nil {
		left = vitals.At.Sub(*e.slot.InactiveSince)
	}
	return mayBeAbandoned(written, left)
}

func (e *examination) checkFailover() {
	c := e.sql.Config()
	switch s := e.slot; {
	case s.Failover == nil:
		e.ok("slot_failover", "this version of Postgres has none for slots: after a promotion what is pending comes from the table")
	case *s.Failover:
		e.ok("slot_failover", "a standby with sync_replication_slots has a copy")
	default:
		e.warn("slot_failover", &fault.Error{What: "no standby gets a copy of the slot: after a promotion what is pending comes from the table",
			Remedy: "stop the relay, and say it on a replication connection:",
			Shell: fmt.Sprintf(`psql "host=%s port=%d user=%s dbname=%s replication=database" -c 'ALTER_REPLICATION_SLOT %s (FAILOVER true)'`,
				c.Host, c.Port, c.User, c.Database, e.Config.Table.Slot)})
	}
}

func (e *examination) checkCheckpoint(ctx context.Context, standing relay.Standing) {
	if e.standing == nil || e.system.ID == "" {
		e.skip("slot or replication connection could not be had", "checkpoint", "publication_state")
		return
	}
	cp := standing.Checkpoint
	mends, err := e.CheckSlot(standing)
	switch {
	case !e.judgeMending("checkpoint", mends, err):
	case cp == nil:
		e.ok("checkpoint", "none: no relay has run yet; the first run makes it, and the slot")
	case cp.Foreign:
		e.warn("checkpoint", &fault.Error{What: "messages of others were seen in the stream: what the relay can do after an outage is less than it could",
			Remedy: "deny others to publish on its subjects"})
	default:
		e.ok("checkpoint", "%s, at %s/%d, sequence %d of stream %s", cp.Phase, cp.Position.Commit, cp.Position.Ordinal, cp.Sequence, cp.Stream)
	}
	if cp == nil || cp.Phase == checkpoint.Creating {
		e.ok("publication_state", "no checkpoint stands on it yet")
		return
	}
	if !e.publish {
		e.skip("the publication is at fault", "publication_state")
		return
	}
	mends, err = e.CheckPublication(ctx, *cp)
	if e.judgeMending("publication_state", mends, err) {
		e.ok("publication_state", "what it was when the checkpoint was written")
	}
}
