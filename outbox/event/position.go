// Package event is an outbox event: the row as Postgres sent it, its place in the order of
// commits, which of a table's columns make it, and requests to publish some again. It does
// no I/O and keeps no state; whoever hands an event on says how long it is valid.
package event

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
