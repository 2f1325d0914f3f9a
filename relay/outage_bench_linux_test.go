package relay_test

import (
	"testing"
	"time"

	"outbox-relay/internal/testenv"
)

// BenchmarkAfterAnOutage measures how soon what has piled up flows when NATS is back, by
// the stream's own times: from the server's first accepted connection to the first event
// and to the last one. Nothing is inserted any more by then. OUTAGE sets how long NATS is
// down.
func BenchmarkAfterAnOutage(b *testing.B) {
	for name, l := range map[string]load{"trickle": trickle, "flood": flood} {
		b.Run(name, func(b *testing.B) {
			var first, last time.Duration
			var events int
			for range b.N {
				f, l, n := afterAnOutage(b, l)
				first, last, events = first+f, last+l, events+n
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(first.Seconds()/float64(b.N), "s-to-first")
			b.ReportMetric(last.Seconds()/float64(b.N), "s-to-last")
			b.ReportMetric(float64(events)/float64(b.N), "events")
		})
	}
}

func afterAnOutage(tb testing.TB, l load) (first, last time.Duration, events int) {
	b := setup(tb)
	o := b.oracle()
	b.streaming(noWindow)
	b.requireStream(b.insert(1000))
	h := b.listen(tb.Name())
	b.nats.Stop()
	stop := b.apply(l)
	through(outage(tb), h)
	stop()
	b.nats.Restart()
	back := time.Now()
	want := len(o.committed())
	testenv.Eventually(b, "the backlog in the stream", func() bool { return b.last() == uint64(want) })
	for _, m := range b.messages() {
		after := m.Time.Sub(back)
		if after < 0 {
			continue
		}
		if events++; events == 1 {
			first = after
		}
		last = after
	}
	return first, last, events
}
