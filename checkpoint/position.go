// Package checkpoint decides which LSN may be confirmed to the slot, and keeps
// the durable record of how far the stream has followed the outbox.
//
// The Tracker is pure: it follows events from the moment they are read to the
// moment their outcome is recorded. The Store is the one row in Postgres.
package checkpoint

import (
	"cmp"
	"fmt"

	"github.com/jackc/pglogrepl"
)

// Position is an event's place in the order of commits: the LSN of its
// transaction's commit record (final_lsn of pgoutput's Begin) and its ordinal
// in that transaction, from 1. LSNs of single changes are no order, since
// transactions interleave in WAL; commit records never do.
type Position struct {
	Commit  pglogrepl.LSN
	Ordinal uint64
}

// Compare returns -1, 0 or 1 as p was committed before, is, or was committed
// after q.
func (p Position) Compare(q Position) int {
	return cmp.Or(cmp.Compare(p.Commit, q.Commit), cmp.Compare(p.Ordinal, q.Ordinal))
}

// String is "<commit LSN>/<ordinal>", such as "0/16B3748/2".
func (p Position) String() string {
	return fmt.Sprintf("%s/%d", p.Commit, p.Ordinal)
}
