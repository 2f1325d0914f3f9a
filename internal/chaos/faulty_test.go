package chaos

import (
	"cmp"
	"math/rand/v2"
	"testing"

	"outbox-relay/internal/testenv"
)

// A relay that breaks the promise in one way, once, is caught at exactly that;
// one that does not is not.
func TestBrokenRelaysAreCaught(t *testing.T) {
	shared := servers{cluster: testenv.Postgres(t), natsBinary: testenv.NATSBinary(t, "")}
	const backlog = 50
	for fault, want := range map[string]findings{
		"":              {},
		"lose":          count(lost, 1),
		"repeat":        count(duplicate, 1),
		"reorder":       count(disorder, 1),
		"invent":        count(phantom, 1),
		"alter":         count(altered, 1),
		"confirm-early": count(early, 5),
		"mark-unstored": count(wrongRow, 5),

		"backfill-nothing":   count(lost, backlog),
		"backfill-short":     count(lost, 1),
		"backfill-twice":     count(duplicate, 1),
		"backfill-by-chance": count(disorder, 1),
		"heal-unlost":        count(disorder, 1),
	} {
		t.Run(cmp.Or(fault, "unbroken"), func(t *testing.T) {
			p := plan{after: "mark", nodes: 1, relays: 1, retention: kept, backlog: backlog}
			s := newSeason(t, shared, p, rand.New(rand.NewPCG(1, 1)), "./internal/chaos/faulty", map[string]string{"OUTBOX_FAULT": fault})
			s.begin()
			s.seats[0].relay.WaitLog("msg=streaming")
			s.await("a look at where the slot begins", func() bool { return len(s.sampler.all()) > 0 })
			for range 20 {
				s.insert(5)
			}
			s.write(500)
			s.await("some events of all kinds", func() bool { return s.writers.rows.Load() > 300 })
			_, got := s.finish()
			for k := range got {
				if got[k].count != want[k].count {
					t.Errorf("%s: %d, want %d (%q)", kind(k), got[k].count, want[k].count, got[k].examples)
				}
			}
		})
	}
}
