package checkpoint_test

import (
	"testing"

	"github.com/jackc/pglogrepl"

	"outbox-relay/checkpoint"
	"outbox-relay/outbox/event"
)

// While a snapshot is held, by a backup, a prepared transaction or a standby's query, no
// version of the checkpoint's row goes away. An advance does not look at them all.
func TestAdvanceWhileASnapshotIsHeld(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, conn := b.begun("relay")
	_, err := b.connect("backup").Exec(t.Context(), `begin isolation level repeatable read; select from outbox_relay_checkpoints`)
	b.must(err)
	fetched := func() (pages int) {
		_, err := conn.Exec(t.Context(), `select pg_stat_force_next_flush()`)
		b.must(err)
		_, err = conn.Exec(t.Context(), `select`) // figures are flushed behind a transaction
		b.must(err)
		b.must(b.sql.QueryRow(t.Context(), `select heap_blks_read + heap_blks_hit + idx_blks_read + idx_blks_hit
			from pg_statio_user_tables where relname = 'outbox_relay_checkpoints'`).Scan(&pages))
		return pages
	}
	position := pglogrepl.LSN(100)
	advance := func(times int) (pages float64) {
		before := fetched()
		for range times {
			position += 8
			b.must(s.Advance(t.Context(), checkpoint.Advance{Position: event.Position{Commit: position}, Sequence: uint64(position)}, checkpoint.Effects{}))
		}
		return float64(fetched()-before) / float64(times)
	}
	first := advance(100)
	advance(8000)
	last := advance(100)
	t.Logf("%.1f pages an advance at first, %.1f after 8000", first, last)
	if last > 3*first+10 {
		t.Errorf("an advance reads %.1f pages after 8000 while a snapshot is held, and %.1f before", last, first)
	}
}
