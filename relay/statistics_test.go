package relay_test

import (
	"testing"

	"outbox-relay/internal/testenv"
)

// An outbox that was analyzed while it was empty, as one whose rows are deleted often
// is: outcomes are recorded all the same, however many come then.
func TestAnalyzedWhileEmpty(t *testing.T) {
	t.Parallel()
	b := setupFresh(t) // which can be empty
	b.exec(`alter table events set (autovacuum_enabled = off)`)
	b.streaming("AFTER_PUBLISH=delete")
	fill := func() {
		b.exec(`insert into events (aggregate_type, aggregate_id, event_type, payload)
			select 'order', i, 'placed', '1' from generate_series(1, 60000) i`)
		testenv.Eventually(t, "all rows to be deleted", func() bool { return b.count(`select count(*) from events`) == 0 })
	}
	fill()
	b.exec(`analyze events`)
	fill()
}
