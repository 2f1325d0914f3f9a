package relay

import (
	"strings"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/prometheus/client_golang/prometheus"

	"outbox-relay/internal/testenv"
)

// watched is a slot without a relay, and what vitals export of it.
type watched struct {
	*house
	*vitals
	registry *prometheus.Registry
}

func newWatched(t *testing.T) *watched {
	t.Helper()
	w := &watched{house: newHouse(t, Housekeeping{}), vitals: &vitals{}, registry: prometheus.NewRegistry()}
	w.registry.MustRegister(w.vitals)
	w.housekeeper.table.Slot = testenv.SlotName(t, w.url)
	return w
}

// see takes a look at once.
func (w *watched) see(done pglogrepl.LSN) {
	w.Helper()
	w.age(lookEvery)
	w.must(w.look(w.Context(), w.housekeeper.table, w.sql, func() pglogrepl.LSN { return done }))
}

// age makes the last look older.
func (w *watched) age(by time.Duration) {
	if last := w.last.Load(); last != nil {
		older := *last
		older.at = older.at.Add(-by)
		w.last.Store(&older)
	}
}

// exported has each value by its name, with the status of those that have one.
func (w *watched) exported() map[string]float64 {
	w.Helper()
	families, err := w.registry.Gather()
	w.must(err)
	values := map[string]float64{}
	for _, family := range families {
		for _, metric := range family.GetMetric() {
			name := strings.TrimPrefix(family.GetName(), "outbox_relay_")
			for _, label := range metric.GetLabel() {
				name += " " + label.GetValue()
			}
			values[name] = metric.GetGauge().GetValue()
		}
	}
	return values
}

// What is seen of a slot that nobody reads, whose checkpoint is an hour old.
func TestVitals(t *testing.T) {
	w := newWatched(t)
	if got := w.exported(); len(got) != 0 {
		t.Errorf("before the first look: %v", got)
	}
	w.see(0)
	if got := w.exported(); len(got) != 0 {
		t.Errorf("without a slot and a checkpoint: %v", got)
	}
	w.exec(`insert into outbox_relay_checkpoints (slot, system_identifier, timeline, commit_lsn, ordinal, confirmed_lsn,
			stream, stream_created_at, stream_sequence, unrecorded_bound, updated_at)
		values ($1, '7', 1, '0/0', 0, '0/0', 'EVENTS', now(), 0, 0, now() - interval '1 h')`, w.housekeeper.table.Slot)
	w.exec(`select pg_create_logical_replication_slot($1, 'pgoutput')`, w.housekeeper.table.Slot)
	var confirmed string
	w.must(w.sql.QueryRow(t.Context(), `select confirmed_flush_lsn::text from pg_replication_slots where slot_name = $1`, w.housekeeper.table.Slot).Scan(&confirmed))
	done, err := pglogrepl.ParseLSN(confirmed)
	w.must(err)
	w.insert(100)
	w.see(done)
	got := w.exported()
	for name, between := range map[string][2]float64{
		"slot_lag_seconds": {3600, 3700}, "slot_lag_bytes": {1e4, 1e9}, "slot_retained_bytes": {1e4, 1e9},
		"slot_wal_status reserved": {1, 1}, "slot_wal_status extended": {0, 0}, "slot_wal_status unreserved": {0, 0}, "slot_wal_status lost": {0, 0},
		"checkpoint_timestamp_seconds": {float64(time.Now().Unix() - 3700), float64(time.Now().Unix() - 3599)},
	} {
		if value, ok := got[name]; !ok || value < between[0] || value > between[1] {
			t.Errorf("%s is %v (%t), want it in %v", name, value, ok, between)
		}
	}
	if _, limited := got["slot_safe_wal_bytes"]; limited {
		t.Error("slot_safe_wal_bytes is there without a limit")
	}
	w.see(w.clock.notes[len(w.clock.notes)-1].end + 1e6)
	if lag := w.exported()["slot_lag_seconds"]; lag != 0 {
		t.Errorf("the lag is %v with all done", lag)
	}
	w.age(lookValid)
	if got := w.exported(); len(got) != 0 {
		t.Errorf("of an old look: %v", got)
	}
}

// Looks are rare: but a relay that takes over looks at once, since it knows more.
func TestLooksAreRare(t *testing.T) {
	w := newWatched(t)
	looks := 0
	look := func(done func() pglogrepl.LSN) {
		before := w.last.Load()
		w.must(w.look(t.Context(), w.housekeeper.table, w.sql, done))
		if w.last.Load() != before {
			looks++
		}
	}
	w.exec(`select pg_create_logical_replication_slot($1, 'pgoutput')`, w.housekeeper.table.Slot)
	look(nil)
	look(nil)
	nothing := func() pglogrepl.LSN { return 0 }
	look(nothing)
	look(nothing)
	look(nil)
	if looks != 2 {
		t.Errorf("%d looks, want 2", looks)
	}
}
