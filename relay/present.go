package relay

import (
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// Present is where the relay stands at one moment: what is drawn over time, and
// what health is judged by. Counts are since the relay was started.
type Present struct {
	At      time.Time
	State   State
	Trouble string // see Relay.Trouble
	Stalled string // see Relay.Stalled
	Restart bool   // where it is stalled: a restart is worth trying

	Published, Bytes       float64   // events, and their bytes, that the stream acknowledged
	Parked, Recorded       float64   // events
	Acked, CommitToAck     float64   // events of the slot that were acknowledged, and the sum of their seconds from commit to ack
	InFlight, InFlightSize int       // events, and their bytes, that were sent and have no outcome yet
	Unrecorded             int       // events that were read, those in flight among them, and are not recorded
	BackfillLeft           float64   // rows
	Oldest                 time.Time // commit of the first event in flight; zero: there is none

	// WALEnd is where Postgres's WAL ended at the recorder's last look, at most
	// about a second ago while it runs. Received is what the reader has got to,
	// Confirmed what the slot was told. All 0: no session streams.
	WALEnd, Received, Confirmed pglogrepl.LSN
}

// Unrecordable is the most that Present.Unrecorded can be: then nothing more is
// read.
const Unrecordable = unrecordedBound

// Present looks where the relay stands. Safe for concurrent use.
func (r *Relay) Present() Present {
	m := r.metrics
	s := Present{
		At: time.Now(), State: r.State(), Trouble: r.Trouble().Why, Stalled: r.Stalled(), Restart: r.restartHelps(),
		Published: total(m.types.published), Bytes: total(m.types.bytes), Parked: total(m.types.parked), Recorded: total(m.recorded),
		BackfillLeft: total(m.backlogLeft),
	}
	s.Acked, s.CommitToAck = observed(m.commitSeconds)
	if p := r.pipeline.Load(); p != nil {
		s.InFlight, s.InFlightSize = p.chain.InFlight()
		s.Oldest = p.chain.Oldest()
		s.Unrecorded = p.tracker.Len()
		s.WALEnd = pglogrepl.LSN(p.recorder.walEnd.Load())
		s.Received, s.Confirmed = max(p.received(), p.recorder.reader.Confirmed()), p.recorder.reader.Confirmed()
	}
	return s
}

// received is the LSN up to which WAL was read.
func (p *pipeline) received() pglogrepl.LSN { return pglogrepl.LSN(total(p.relay.metrics.received)) }

// total sums the counters and gauges of a collector.
func total(c prometheus.Collector) (sum float64) {
	each(c, func(m *dto.Metric) { sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() })
	return sum
}

// observed sums the histograms of a collector.
func observed(c prometheus.Collector) (count, sum float64) {
	each(c, func(m *dto.Metric) {
		count += float64(m.GetHistogram().GetSampleCount())
		sum += m.GetHistogram().GetSampleSum()
	})
	return count, sum
}

func each(c prometheus.Collector, do func(*dto.Metric)) {
	metrics := make(chan prometheus.Metric)
	go func() { c.Collect(metrics); close(metrics) }()
	for metric := range metrics {
		var m dto.Metric
		if metric.Write(&m) == nil { // a metric that was described can be written
			do(&m)
		}
	}
}
