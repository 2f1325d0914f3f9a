package relay

import (
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
)

// What waits for OUTBOX_CONFIRM_DELAY is bounded, however long that is and however often
// something is recorded; each LSN waits for all of it, and for little longer.
func TestConfirmationsHeldAreBounded(t *testing.T) {
	for _, delay := range []time.Duration{0, time.Second, 3 * time.Minute, time.Hour} {
		const each = 50 * time.Millisecond
		var pending []confirmation
		most := 0
		recorded := map[pglogrepl.LSN]time.Time{}
		now := time.Now()
		for n := range 3*int(delay/each) + 10 {
			now = now.Add(each)
			lsn := pglogrepl.LSN(100 + n)
			recorded[lsn] = now
			pending = held(pending, lsn, now, delay)
			most = max(most, len(pending))
			if last := pending[len(pending)-1]; last.lsn != lsn || last.after != 0 {
				t.Fatalf("delay %s: LSN %s is recorded, and %+v is held last", delay, lsn, last)
			}
			for len(pending) > 0 && !now.Before(pending[0].due) {
				if waited := now.Sub(recorded[pending[0].lsn]); waited < delay {
					t.Fatalf("delay %s: an LSN waits for %s", delay, waited)
				}
				pending = pending[1:]
			}
			if oldest := now.Add(-delay - delay/100 - 2*each); len(pending) > 0 && recorded[pending[0].lsn].Before(oldest) {
				t.Fatalf("delay %s: an LSN waits for %s", delay, now.Sub(recorded[pending[0].lsn]))
			}
		}
		if most > 1000 {
			t.Errorf("delay %s: %d LSNs are held", delay, most)
		}
	}
}
