package relay

import (
	"time"

	"github.com/jackc/pglogrepl"
)

const (
	noteEvery = time.Second // between two notes
	maxNotes  = 4096        // then every other one is dropped
)

// lagClock tells how old WAL is: it notes where WAL ended when.
type lagClock struct {
	notes []note // both rise
}

type note struct {
	at  time.Time
	end pglogrepl.LSN
}

// note says that WAL ended there.
func (c *lagClock) note(at time.Time, end pglogrepl.LSN) {
	if n := len(c.notes); n > 0 {
		switch last := c.notes[n-1]; {
		case end < last.end: // another timeline, which says nothing of this one
			c.notes = c.notes[:0]
		case end == last.end:
			c.notes[n-1].at = at
			return
		case at.Sub(last.at) < noteEvery:
			return
		case n == maxNotes:
			c.thin()
		}
	}
	c.notes = append(c.notes, note{at, end})
}

// thin keeps the first note, which the oldest WAL is dated by.
func (c *lagClock) thin() {
	kept := c.notes[:0]
	for i := 0; i < len(c.notes); i += 2 {
		kept = append(kept, c.notes[i])
	}
	c.notes = kept
}

// age is how old the oldest WAL behind done is, at most, up to the distance of two
// notes; 0 where WAL ended at done when that was last noted.
func (c *lagClock) age(now time.Time, done pglogrepl.LSN) time.Duration {
	for len(c.notes) > 1 && c.notes[1].end <= done {
		c.notes = c.notes[1:]
	}
	if len(c.notes) == 0 || c.notes[len(c.notes)-1].end <= done {
		return 0
	}
	return now.Sub(c.notes[0].at)
}
