package relay

import (
	"context"
	"time"

	"github.com/jackc/pglogrepl"

	"outbox-relay/outbox"
)

// A table that becomes a partition of the outbox brings its rows along without an insert:
// those that are pending come through no slot. The relay can't tell whether they were
// published elsewhere; it reports them.

// attached are partitions that were attached while the session runs, or not long before it,
// and have not been searched yet. The zero value has looked at nothing.
type attached struct {
	known  map[uint32]bool // by their OIDs; nil: not looked at yet
	fresh  []partition
	looked time.Time
}

// partition is a new one. All that was inserted into it as a partition, and could be seen
// when it was found, is done once everything up to walEnd is.
type partition struct {
	outbox.Partition
	seen   outbox.Snapshot
	walEnd pglogrepl.LSN
}

// attachedRows is how many pending rows of a new partition are looked at.
const attachedRows = 1000

// inspect looks for new partitions now and then, and searches those for rows that the slot
// has not brought, once all is done that it has.
func (r *recorder) inspect(ctx context.Context, state outbox.State) error {
	a := &r.attached
	if r.table.Mode == outbox.Keep || time.Since(a.looked) < lookEvery {
		return nil
	}
	a.looked = time.Now()
	partitions, err := r.table.Partitions(ctx, r.sql)
	if err != nil {
		return err
	}
	first := a.known == nil
	if first {
		a.known = map[uint32]bool{}
	}
	for _, p := range partitions {
		if !p.Empty && (first && p.Recent || !first && !a.known[p.OID]) {
			a.fresh = append(a.fresh, partition{p, state.Snapshot, state.WALEnd})
		}
		a.known[p.OID] = true
	}
	for len(a.fresh) > 0 && r.tracker.Safe() >= a.fresh[0].walEnd {
		p := a.fresh[0]
		a.fresh = a.fresh[1:]
		ids, err := r.table.PendingSeen(ctx, r.sql, p.Partition, p.seen, attachedRows)
		if err != nil {
			return err
		}
		if len(ids) > 0 {
			r.relay.causes.attached.Again("a table with pending rows was attached as a partition: they come through no slot, and are not published",
				"partition", p.Name, "rows", len(ids), "first_id", ids[0], "remedy", "to publish them, set their status to failed, and retry them; to leave them, set it to published")
			r.relay.causes.attached.Lapse("no other table with pending rows was attached")
		}
	}
	return nil
}
