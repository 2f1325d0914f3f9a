package relay

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func labels(t *testing.T, registry *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]float64{}
	for _, family := range families {
		if family.GetName() == "outbox_relay_events_parked_total" {
			for _, m := range family.GetMetric() {
				counts[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
			}
		}
	}
	return counts
}

// The first types are counted each, and all others together.
func TestTypesAreBounded(t *testing.T) {
	registry := prometheus.NewRegistry()
	types := newByType(registry)
	for range 2 {
		for i := range maxTypes + 50 {
			types.of(fmt.Appendf(nil, "type%d", i)).parked.Inc()
		}
		types.of(nil).parked.Inc()
	}
	counts := labels(t, registry)
	if n := len(counts); n != maxTypes+1 {
		t.Errorf("%d label values", n)
	}
	if n := counts["type99"]; n != 2 {
		t.Errorf("type99 was counted %v times", n)
	}
	if n := counts["other"]; n != 102 {
		t.Errorf("others were counted %v times", n)
	}
}

// Whatever stands in a row, its type is a label.
func TestTypesOfAllKinds(t *testing.T) {
	registry := prometheus.NewRegistry()
	types := newByType(registry)
	for _, aggregateType := range []string{"a\xffb", "a\n\"b", strings.Repeat("x", 1<<20), strings.Repeat("x", 99) + "ü", "other"} {
		types.of([]byte(aggregateType)).parked.Inc()
	}
	counts := labels(t, registry)
	for _, want := range []string{"a\uFFFDb", "a\n\"b", strings.Repeat("x", 100) + "…", strings.Repeat("x", 99) + "…", "other"} {
		if counts[want] != 1 {
			t.Errorf("%q was counted %v times", want, counts[want])
		}
	}
}

func TestTypesAllocateNothing(t *testing.T) {
	types := newByType(prometheus.NewRegistry())
	order, late := bytes.Repeat([]byte("o"), 20), []byte("late")
	for i := range maxTypes {
		types.of(fmt.Appendf(nil, "type%d", i))
	}
	n := testing.AllocsPerRun(100, func() {
		types.of([]byte("type1")).published.Inc()
		types.of(order).published.Inc()
		types.of(late).published.Inc()
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkTypes(b *testing.B) {
	types := newByType(prometheus.NewRegistry())
	names := [][]byte{[]byte("order"), []byte("invoice"), []byte("customer")}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		types.of(names[i%3])
	}
}
