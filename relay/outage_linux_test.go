package relay_test

import (
	"os"
	"regexp"
	"testing"
	"time"

	"outbox-relay/internal/testenv"
)

// outage is how long NATS is down: longer than wal_sender_timeout (10 s), and
// than the duplicate window. OUTAGE sets it, for a long run by hand.
func outage(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv("OUTAGE")
	if text == "" {
		return 12 * time.Second
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("OUTAGE: %v", err)
	}
	return d
}

// An outage of NATS under load costs WAL, and nothing else: the walsender hears
// from the relay all the time, memory stays flat, and the log says once what is
// wrong and once that it is over.
func TestNATSDownUnderLoad(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming(noWindow)
	o := b.oracle()
	walsender := b.walsender()
	w := b.write(1)
	w.await(10_000) // the window was full once
	b.nats.Stop()
	down := b.now()
	lasted := outage(t)
	before := b.peakMemory(r)
	w.await(20_000)
	w.stop()
	testenv.EventuallyWithin(t, lasted+time.Minute, "the walsender to hear from the relay all through the outage", func() bool {
		return b.count(`select count(*) from pg_stat_replication where pid = $1 and reply_time > $2::timestamptz + make_interval(secs => $3)`,
			walsender, down, lasted.Seconds()) == 1
	})
	after := b.peakMemory(r)
	b.nats.Restart()
	ids := o.committed()
	b.requireStream(ids)
	b.requireStatus("published", ids)
	if pid := b.walsender(); pid != walsender {
		t.Errorf("the session was lost: walsender %d instead of %d", pid, walsender)
	}
	if after > before+(32<<20) {
		t.Errorf("memory grew from %d to %d bytes in the outage", before, after)
	}
	for said, most := range map[string]int{"publishing is interrupted": 1, "publishing goes on": 1, "level=(WARN|ERROR)": 3 + int(lasted.Minutes())} {
		if n := len(regexp.MustCompile(said).FindAllString(r.Logs(), -1)); n < 1 || n > most {
			t.Errorf("the log has %d times %q, want 1 to %d:\n%s", n, said, most, r.Logs())
		}
	}
	t.Logf("%d events, memory %d MiB before and %d MiB after an outage of %s", len(ids), before>>20, after>>20, lasted)
}

// walsender is the process that serves the relay.
func (b *bundle) walsender() int {
	b.Helper()
	return b.count(`select active_pid from pg_replication_slots where slot_name = $1`, b.slot())
}

// now is Postgres's clock.
func (b *bundle) now() (t time.Time) {
	b.Helper()
	b.must(b.sql.QueryRow(b.Context(), `select clock_timestamp()`).Scan(&t))
	return t
}
