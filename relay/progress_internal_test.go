package relay

import (
	"log/slog"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestBackfillProgress(t *testing.T) {
	registry := prometheus.NewRegistry()
	log := slog.New(slog.DiscardHandler)
	p := newProgress(&session{relay: New(Config{}, log, NewMetrics(registry)), log: log}, 5)
	require := func(wantLeft float64) {
		t.Helper()
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]float64{"outbox_relay_backfill_rows": 5, "outbox_relay_backfill_rows_left": wantLeft} {
			for _, family := range families {
				if got := family.GetMetric()[0].GetGauge().GetValue(); family.GetName() == name && got != want {
					t.Errorf("%s is %v, want %v", name, got, want)
				}
			}
		}
	}
	require(5)
	p.add(2)
	require(3)
	p.add(4) // rows that were inserted meanwhile
	require(0)
	p.end()
	require(0)
}
