package relay_test

import (
	"testing"

	"outbox-relay/internal/testenv"
)

// What is published goes when it is old, what failed is published when the
// stream takes it by now, and the events go on coming.
func TestHousekeepingBesidePublishing(t *testing.T) {
	b := setupOn(t, testenv.OwnPostgres(t, nil), testenv.NATSOptions{})
	b.exec(`delete from events`) // which would be old enough, and is removed first
	requireLeaves(t, b.streaming())
	b.limitMessages(2000)
	r := b.streaming()
	var large string
	b.must(b.sql.QueryRow(t.Context(), `insert into events (aggregate_type, event_type, payload)
		values ('order', 'created', jsonb_build_object('text', repeat('x', 3000))) returning id`).Scan(&large))
	b.requireStatus("failed", []string{large})
	first := b.insert(3)
	b.requireStatus("published", first)
	requireLeaves(t, r)

	b.limitMessages(-1)
	b.exec(`update events set failed_at = now() - interval '1 h' where id = $1`, large)
	r = b.streaming("RETENTION=1s", "RETRY_ATTEMPTS=1", "RETRY_BACKOFF=1s")
	b.requireNoRows(append(first, large))
	more := b.insert(3)
	b.requireNoRows(more)
	b.requireStream(append(append(first, large), more...))

	// Its connection is lost, and nothing else.
	epoch := b.count(`select epoch from outbox_relay_checkpoints`)
	testenv.Eventually(t, "the housekeeper's connection to be ended", func() bool {
		return b.count(`select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = 'outbox-relay housekeeper'`) == 1
	})
	last := b.insert(3)
	b.requireNoRows(last)
	if now := b.count(`select epoch from outbox_relay_checkpoints`); now != epoch {
		t.Errorf("epoch %d, was %d: the session has ended", now, epoch)
	}
	requireLeaves(t, r)
}

// Nothing is opened where nothing is switched on.
func TestNoHousekeeping(t *testing.T) {
	b := setup(t)
	r := b.streaming()
	b.requireStatus("published", b.insert(1))
	if n := b.count(`select count(*) from pg_stat_activity where application_name = 'outbox-relay housekeeper' and datname = current_database()`); n != 0 {
		t.Errorf("%d connections", n)
	}
	requireLeaves(t, r)
}

// limitMessages sets the size above which the stream takes no message; -1: none.
func (b *bundle) limitMessages(size int32) {
	b.Helper()
	config := b.stream().CachedInfo().Config
	config.MaxMsgSize = size
	_, err := b.js.UpdateStream(b.Context(), config)
	b.must(err)
}
