package relay

import (
	"testing"
	"time"

	"outbox-relay/outbox/event"
)

// Without a tracer an event costs nothing more, whatever headers it has.
func TestNoTracerCostsNothing(t *testing.T) {
	p := &pipeline{session: &session{relay: &Relay{}}}
	e := &event.Event{Headers: []byte(`{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}`)}
	now := time.Now()
	if n := testing.AllocsPerRun(1000, func() { p.trace(e, 1, now, now, "") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// counting is a tracer that only counts.
type counting int

func (c *counting) Done(Done) { *c++ }

// With one, an event without traceparent costs nothing more either.
func TestNoTraceparentCostsNothing(t *testing.T) {
	var told counting
	p := &pipeline{session: &session{relay: &Relay{config: Config{Tracer: &told}}}}
	e := &event.Event{Headers: []byte(`{"tracestate": "x"}`)}
	now := time.Now()
	if n := testing.AllocsPerRun(1000, func() { p.trace(e, 1, now, now, "") }); n != 0 || told != 0 {
		t.Errorf("%v allocations, %d told", n, told)
	}
	e.Headers = []byte(`{"traceparent": "x"}`)
	if p.trace(e, 1, now, now, ""); told != 1 {
		t.Errorf("%d told, want 1", told)
	}
}

func BenchmarkTraceOff(b *testing.B) {
	p := &pipeline{session: &session{relay: &Relay{}}}
	e := &event.Event{Headers: []byte(`{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}`)}
	b.ReportAllocs()
	for b.Loop() {
		p.trace(e, 1, time.Time{}, time.Time{}, "")
	}
}
