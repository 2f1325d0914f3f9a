package outbox

import (
	"fmt"
	"strconv"
	"strings"
)

// Snapshot is a pg_snapshot: which transactions were visible when it was taken.
// A walsender can send a transaction before anybody can see its rows: it waits
// for WAL to be flushed, a reader also for the synchronous standby.
type Snapshot struct {
	xmin, xmax uint64
	running    map[uint64]bool
}

// ParseSnapshot parses the text form, "xmin:xmax:xip,…".
// Source: https://www.postgresql.org/docs/current/functions-info.html
func ParseSnapshot(text string) (Snapshot, error) {
	var s Snapshot
	parts := strings.Split(text, ":")
	if len(parts) != 3 {
		return s, fmt.Errorf("parse snapshot %q: want xmin:xmax:xip", text)
	}
	var err error
	if s.xmin, err = strconv.ParseUint(parts[0], 10, 64); err != nil {
		return s, fmt.Errorf("parse snapshot %q: %w", text, err)
	}
	if s.xmax, err = strconv.ParseUint(parts[1], 10, 64); err != nil {
		return s, fmt.Errorf("parse snapshot %q: %w", text, err)
	}
	s.running = map[uint64]bool{}
	for _, xip := range strings.FieldsFunc(parts[2], func(r rune) bool { return r == ',' }) {
		xid, err := strconv.ParseUint(xip, 10, 64)
		if err != nil {
			return s, fmt.Errorf("parse snapshot %q: %w", text, err)
		}
		s.running[xid] = true
	}
	return s, nil
}

// Covers reports whether it sees every transaction that another one sees. A
// transaction that waits for its synchronous standby is seen by a slot's snapshot,
// and by nobody else yet.
func (s Snapshot) Covers(other Snapshot) bool {
	for xid := range s.running {
		if xid < other.xmin || xid < other.xmax && !other.running[xid] {
			return false
		}
	}
	return s.xmax >= other.xmax
}

// Visible reports whether the rows of a committed transaction can be seen. xid
// has 32 bits, as in pgoutput; it is taken as the one nearest to the snapshot.
func (s Snapshot) Visible(xid uint32) bool {
	full := s.xmax + uint64(int64(int32(xid-uint32(s.xmax))))
	return full < s.xmin || (full < s.xmax && !s.running[full])
}
