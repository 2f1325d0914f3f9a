package relay_test

import (
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

// A backfill reads the table once, and holds no snapshot while it publishes, which can
// take as long as NATS is away: vacuum could clean up nothing in the whole database. A
// crash then loses nothing of it.
func TestBackfillHoldsNoSnapshot(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`alter table events set (autovacuum_enabled = off)`)
	b.exec(`insert into events (aggregate_type, event_type, payload) select 'order', 'old', '{}' from generate_series(1, 30000)`)
	b.exec(`update events set status = 'published', published_at = now() where status = 'pending'`)
	ids := b.insert(20_000)
	all := b.count(`select count(*) from events`)
	full := jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.>"}, MaxMsgs: 5000, Discard: jetstream.DiscardNew}
	_, err := b.js.CreateStream(t.Context(), full)
	b.must(err)
	b.exec(`select pg_stat_force_next_flush()`)
	b.exec(`select pg_stat_reset()`)
	readOnce := func() {
		t.Helper()
		testenv.Eventually(t, "each row of the table to be read once", func() bool {
			return b.count(`select seq_tup_read from pg_stat_user_tables where relname = 'events'`) == all
		})
	}
	r := b.start(noWindow)
	testenv.Eventually(t, "a full stream in the middle of the backfill", func() bool { return b.last() == 5000 })
	holding := `select count(*) from pg_stat_activity where application_name like 'outbox-relay%' and backend_type = 'client backend'
		and state <> 'idle' and backend_xmin is not null`
	testenv.Eventually(t, "no snapshot to be held", func() bool { return b.count(holding) == 0 })
	readOnce()
	r.Kill()
	full.MaxMsgs = -1
	_, err = b.js.UpdateStream(t.Context(), full)
	b.must(err)
	b.streaming(noWindow)
	b.requireStream(ids)
	readOnce()
	b.requireStatus("published", ids)
	if n := b.count(`select count(*) from outbox_relay_batches`); n != 0 {
		t.Errorf("%d batches are left", n)
	}
}
