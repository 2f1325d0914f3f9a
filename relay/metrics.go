package relay

import (
	"github.com/prometheus/client_golang/prometheus"

	"outbox-relay/checkpoint"
	"outbox-relay/sink"
)

const namespace = "outbox_relay"

// Metrics are what the relay counts.
type Metrics struct {
	registry prometheus.Registerer

	types                         *byType
	resyncs                       map[sink.Reason]prometheus.Counter
	replayed, unmatched, ignored  prometheus.Counter
	backfilled, healed            prometheus.Counter
	recorded, leftovers, sessions prometheus.Counter
	foreign, phantoms, forgotten  prometheus.Counter
	publishSeconds, commitSeconds prometheus.Histogram
	waiting                       prometheus.Gauge
	backlog, backlogLeft          prometheus.Gauge
	inflight, inflightLimit       prometheus.Gauge
	inflightBytes, bytesLimit     prometheus.Gauge
	unrecorded                    prometheus.Gauge
	received, confirmed           prometheus.Gauge
	housekeeping                  housekeepingMetrics
}

// NewMetrics registers the relay's metrics.
func NewMetrics(registry prometheus.Registerer) *Metrics {
	m := &Metrics{registry: registry, types: newByType(registry), resyncs: newResyncs(registry)}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help})
		registry.MustRegister(c)
		return c
	}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: namespace, Name: name, Help: help})
		registry.MustRegister(g)
		return g
	}
	histogram := func(name, help string) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: namespace, Name: name, Help: help,
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 16)})
		registry.MustRegister(h)
		return h
	}
	m.replayed = counter("events_replayed_total", "Events that are stored once more, for a replay.")
	m.backfilled = counter("events_backfilled_total", "Events that are stored from the table, since they do not come out of the slot.")
	m.unmatched = counter("requests_unmatched_total", "Rows of retries and replays that are gone or have another state, and requests that can't be read.")
	m.healed = counter("heals_total", "Times that what a slot had lost was published from the table.")
	m.ignored = counter("inserts_ignored_total", "Inserts whose status was not pending.")
	m.recorded = counter("events_recorded_total", "Events whose outcome is durable in Postgres.")
	m.leftovers = counter("rows_locked_total", "Rows that the application held locked when their outcome was recorded.")
	m.sessions = counter("sessions_lost_total", "Replication sessions that ended by an error.")
	m.foreign = counter("foreign_messages_total", "Messages in the stream that are not this relay's.")
	m.phantoms = counter("phantom_events_total", "Messages in the stream whose transactions a failover or a restore lost.")
	m.forgotten = counter("broker_forgot_total", "Times that the stream had lost messages which it had acknowledged.")
	m.publishSeconds = histogram("publish_duration_seconds", "From sending an event to its ack.")
	m.commitSeconds = histogram("commit_to_ack_seconds", "From an event's commit, by Postgres's clock, to its ack.")
	m.backlog = gauge("backfill_rows", "Rows that the last backfill had to publish when it began, or went on.")
	m.backlogLeft = gauge("backfill_rows_left", "Rows of these that it has still to publish.")
	m.waiting = gauge("rows_waiting", "Rows whose outcome waits for a lock of the application.")
	m.inflight = gauge("inflight_events", "Events sent and not acknowledged.")
	m.inflightLimit = gauge("inflight_events_limit", "How many may be, by OUTBOX_MAX_INFLIGHT.")
	m.inflightBytes = gauge("inflight_bytes", "Their bytes.")
	m.bytesLimit = gauge("inflight_bytes_limit", "How many these may be, by OUTBOX_MAX_INFLIGHT_BYTES.")
	m.unrecorded = gauge("unrecorded_events", "Events read whose outcome is not recorded.")
	m.received = gauge("received_lsn_bytes", "LSN up to which WAL was received, in bytes.")
	m.confirmed = gauge("confirmed_lsn_bytes", "LSN that was confirmed to the slot, in bytes.")
	m.housekeeping = newHousekeepingMetrics(counter)
	return m
}

// newResyncs returns a counter for each reason: one that never was counts 0.
func newResyncs(registry prometheus.Registerer) map[sink.Reason]prometheus.Counter {
	vector := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: "resyncs_total",
		Help: "Times that publishing was interrupted and matched with the stream."}, []string{"reason"})
	registry.MustRegister(vector)
	counters := map[sink.Reason]prometheus.Counter{}
	for _, reason := range sink.Reasons {
		counters[reason] = vector.WithLabelValues(string(reason))
	}
	return counters
}

// fromTable counts an event that stands in the stream and came from the table; the
// empty source is the slot.
func (m *Metrics) fromTable(source checkpoint.Source, c *typeCounters) {
	switch source {
	case checkpoint.Backfill:
		m.backfilled.Inc()
	case checkpoint.Retry:
		c.retried.Inc()
	case checkpoint.Replay:
		m.replayed.Inc()
	}
}

// observe exports the relay's state, 1 for the one that it is in, who it is, its
// reconnects, and what it sees of the slot.
func (m *Metrics) observe(r *Relay) {
	for _, state := range []State{Starting, Standby, Backfilling, Streaming, Stopping, Halted} {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: namespace, Name: "state", Help: "1 for the state that the relay is in.",
			ConstLabels: prometheus.Labels{"state": string(state)},
		}, func() float64 { return indicator(r.State() == state) }))
	}
	for _, reason := range Reasons {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: namespace, Name: "trouble", Help: "1 for what is in the relay's way; all are 0 where nothing is known to be.",
			ConstLabels: prometheus.Labels{"reason": string(reason)},
		}, func() float64 { return indicator(r.Trouble().Reason == reason) }))
	}
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: namespace, Name: "stalled", Help: "1 while the pipeline is stalled.",
	}, func() float64 { return indicator(r.Stalled() != "") }), prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: namespace, Name: "record_seconds", Help: "How long the recorder has waited for Postgres by now, or for the housekeeping; 0: it does not wait.",
	}, func() float64 {
		_, taken := r.recording.taken()
		return taken.Seconds()
	}))
	table := r.config.Table
	m.registry.MustRegister(&r.vitals,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: namespace, Name: "outbox_info", Help: "1, with the outbox that the relay publishes.",
			ConstLabels: prometheus.Labels{"table": table.Schema + "." + table.Name, "slot": table.Slot, "after_publish": string(table.Mode)},
		}, func() float64 { return 1 }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Namespace: namespace, Name: "nats_reconnects_total", Help: "Times that the connection to NATS was lost and regained.",
		}, r.reconnects))
}
