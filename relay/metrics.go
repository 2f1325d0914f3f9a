package relay

import (
	"github.com/prometheus/client_golang/prometheus"

	"outbox-relay/checkpoint"
)

// Metrics are what the relay counts.
type Metrics struct {
	registry prometheus.Registerer

	published, publishedBytes      prometheus.Counter
	retried, replayed, unmatched   prometheus.Counter
	backfilled, healed             prometheus.Counter
	parked, alreadyStored, ignored prometheus.Counter
	recorded, leftovers            prometheus.Counter
	resyncs, sessions              prometheus.Counter
	foreign, phantoms, forgotten   prometheus.Counter
	publishSeconds, commitSeconds  prometheus.Histogram
	waiting, backlog               prometheus.Gauge
	inflight, inflightBytes        prometheus.Gauge
	unrecorded                     prometheus.Gauge
	received, confirmed            prometheus.Gauge
	housekeeping                   housekeepingMetrics
}

// NewMetrics registers the relay's metrics.
func NewMetrics(registry prometheus.Registerer) *Metrics {
	m := &Metrics{registry: registry}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "outbox_relay", Name: name, Help: help})
		registry.MustRegister(c)
		return c
	}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "outbox_relay", Name: name, Help: help})
		registry.MustRegister(g)
		return g
	}
	histogram := func(name, help string) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "outbox_relay", Name: name, Help: help,
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 16)})
		registry.MustRegister(h)
		return h
	}
	m.published = counter("events_published_total", "Events that the stream acknowledged.")
	m.publishedBytes = counter("events_published_bytes_total", "Bytes of these events, payload and columns.")
	m.parked = counter("events_parked_total", "Events that can never be stored, recorded as failed.")
	m.alreadyStored = counter("events_already_stored_total", "Events that were found in the stream and not sent again.")
	m.retried = counter("events_retried_total", "Events that failed, and were published when they were asked for again.")
	m.replayed = counter("events_replayed_total", "Events that were published once more, for a replay.")
	m.backfilled = counter("events_backfilled_total", "Events that were published from the table, since they do not come out of the slot.")
	m.unmatched = counter("requests_unmatched_total", "Rows of retries and replays that are gone or have another state, and requests that can't be read.")
	m.healed = counter("heals_total", "Times that what a slot had lost was published from the table.")
	m.ignored = counter("inserts_ignored_total", "Inserts whose status was not pending.")
	m.recorded = counter("events_recorded_total", "Events whose outcome is durable in Postgres.")
	m.leftovers = counter("rows_locked_total", "Rows that the application held locked when their outcome was recorded.")
	m.resyncs = counter("resyncs_total", "Times that publishing was interrupted and matched with the stream.")
	m.sessions = counter("sessions_lost_total", "Replication sessions that ended by an error.")
	m.foreign = counter("foreign_messages_total", "Messages in the stream that are not this relay's.")
	m.phantoms = counter("phantom_events_total", "Messages in the stream whose transactions a failover or a restore lost.")
	m.forgotten = counter("broker_forgot_total", "Times that the stream had lost messages which it had acknowledged.")
	m.publishSeconds = histogram("publish_duration_seconds", "From sending an event to its ack.")
	m.commitSeconds = histogram("commit_to_ack_seconds", "From an event's commit, by Postgres's clock, to its ack.")
	m.backlog = gauge("backfill_rows_left", "Rows that the backfill has still to publish.")
	m.waiting = gauge("rows_waiting", "Rows whose outcome waits for a lock of the application.")
	m.inflight = gauge("inflight_events", "Events sent and not acknowledged.")
	m.inflightBytes = gauge("inflight_bytes", "Their bytes.")
	m.unrecorded = gauge("unrecorded_events", "Events read whose outcome is not recorded.")
	m.received = gauge("received_lsn_bytes", "LSN up to which WAL was received, in bytes.")
	m.confirmed = gauge("confirmed_lsn_bytes", "LSN that was confirmed to the slot, in bytes.")
	m.housekeeping = newHousekeepingMetrics(counter)
	return m
}

// fromTable counts rows that were published from the table.
func (m *Metrics) fromTable(source checkpoint.Source, rows int) {
	switch source {
	case checkpoint.Backfill:
		m.backfilled.Add(float64(rows))
	case checkpoint.Retry:
		m.retried.Add(float64(rows))
	case checkpoint.Replay:
		m.replayed.Add(float64(rows))
	}
}

// observe exports the relay's state: 1 for the one that it is in.
func (m *Metrics) observe(r *Relay) {
	for _, state := range []State{Starting, Standby, Backfilling, Streaming, Stopping, Halted} {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "outbox_relay", Name: "state", Help: "1 for the state that the relay is in.",
			ConstLabels: prometheus.Labels{"state": string(state)},
		}, func() float64 {
			if r.State() == state {
				return 1
			}
			return 0
		}))
	}
}
