package chaos

import (
	"context"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/testenv"
)

// recovery is how long the relay may take to publish again after a fault: far
// more than it needs.
const recovery = 3 * time.Minute

// finish ends the load, lets the relays drain and stop, and judges the season.
// It returns the number of events that were committed.
func (s *season) finish() (events int, found findings) {
	s.Helper()
	s.writers.stop()
	s.awaitArrival(s.insertMarker(), false) // what is missing then is lost
	s.retryAll()
	s.stopRelays()
	s.awaitWitness()
	s.requireNoStrangers()
	s.sampleOnce()
	h := history{after: s.after, samples: s.sampler.all(), begins: s.sampler.begins(), gaps: s.gaps}
	var faults []string
	h.messages, faults = s.witness.statement()
	for _, fault := range faults {
		s.Errorf("the stream: %s", fault)
	}
	var confirmed pglogrepl.LSN
	s.query(func(ctx context.Context, conn *pgx.Conn) (err error) {
		if confirmed, err = confirmedLSN(ctx, conn, s.slot); err != nil {
			return err
		}
		if h.rows, err = readRows(ctx, conn); err != nil {
			return err
		}
		return s.oracle.read(ctx, conn)
	})
	h.events, h.wishes = s.oracle.decoded.events, s.oracle.decoded.wishes
	if last := h.events[len(h.events)-1].end; confirmed < last {
		s.Errorf("the slot is confirmed up to %s after a clean stop, and the last commit ends at %s", confirmed, last)
	}
	return len(h.events), check(h)
}

// requireNoStrangers fails the test where a relay takes messages for those of
// others: there are none.
func (s *season) requireNoStrangers() {
	s.Helper()
	for _, st := range s.seats {
		for _, r := range append(st.ended, st.relay) {
			for line := range strings.Lines(r.Logs()) {
				if strings.Contains(line, "not this relay's") {
					s.Errorf("nobody but relays publishes, and one says: %s", line)
				}
			}
		}
	}
}

// sampleOnce makes sure that the last slot was looked at.
func (s *season) sampleOnce() {
	s.Helper()
	s.query(s.sampler.look)
}

// awaitArrival waits until the event is in the stream. One that does not come
// fails the test where that is required.
func (s *season) awaitArrival(id string, required bool) {
	s.Helper()
	for deadline := time.Now().Add(recovery); !s.witness.has(id); time.Sleep(10 * time.Millisecond) {
		s.requireAlive()
		if !time.Now().After(deadline) {
			continue
		}
		if required {
			s.Fatalf("event %s is not stored %s after it was committed", id, recovery)
		}
		return
	}
}

// stopRelays ends the relays in order, the one that works last: then all that
// is stored is recorded and confirmed.
func (s *season) stopRelays() {
	s.Helper()
	worker := s.worker()
	for _, st := range s.seats {
		if st != worker {
			st.terminate()
		}
	}
	worker.terminate()
}

// terminate stops the relay in order. One that has said nothing yet may not hear
// signals yet.
func (st *seat) terminate() {
	st.season.Helper()
	st.season.await("the relay to run", func() bool { return st.relay.Logs() != "" })
	if code := st.relay.Terminate(); code != 0 {
		st.season.Fatalf("exit code %d after SIGTERM", code)
	}
}

// awaitWitness waits until the witness has seen the stream to its end. What was
// delivered to a consumer of a work queue that did not get it comes again later.
func (s *season) awaitWitness() {
	s.Helper()
	last := s.stream().State.LastSeq
	testenv.Eventually(s.T, "the witness to see the stream's end", func() bool {
		seen, _ := s.witness.progress()
		return seen >= last && (s.retention != consumed || s.stream().State.Msgs == 0)
	})
}

func readRows(ctx context.Context, conn *pgx.Conn) ([]row, error) {
	rows, err := conn.Query(ctx, `select id, status, published_at from events where `+notHistory)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(r pgx.CollectableRow) (one row, err error) {
		var published *time.Time
		err = r.Scan(&one.id, &one.status, &published)
		if published != nil {
			one.published = *published
		}
		return one, err
	})
}
