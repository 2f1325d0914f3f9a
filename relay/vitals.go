package relay

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"

	"outbox-relay/outbox"
)

const (
	lookEvery = 10 * time.Second // between two looks at the slot
	lookValid = time.Minute      // after which nobody knows how the slot stands
)

// vitals looks at the slot now and then, on the connection of the session, and
// exports what it saw. It collects in any goroutine, all else is for one at a
// time: who has the connection.
type vitals struct {
	clock lagClock
	last  atomic.Pointer[look] // nil: none yet
}

// look is what was seen at a time, by the relay's clock.
type look struct {
	outbox.Vitals
	at  time.Time
	lag time.Duration // -1: not known
}

// look looks at the slot, if it is time to. done is up to where all is read and
// recorded; nil where another relay does that.
func (v *vitals) look(ctx context.Context, table outbox.Table, conn *pgx.Conn, done func() pglogrepl.LSN) error {
	now := time.Now()
	if last := v.last.Load(); last != nil && now.Sub(last.at) < lookEvery && (last.lag >= 0 || done == nil) {
		return nil
	}
	seen, err := table.Vitals(ctx, conn)
	if err != nil {
		return err
	}
	l := &look{Vitals: seen, at: now, lag: -1}
	if err := v.date(l); err != nil {
		return err
	}
	if done != nil && l.Slot != nil {
		l.lag = v.clock.age(now, done())
	}
	v.last.Store(l)
	return nil
}

// date notes where WAL ends. The first time, all behind the slot was written since
// the checkpoint was.
func (v *vitals) date(l *look) error {
	if l.Slot == nil {
		return nil
	}
	confirmed, err := pglogrepl.ParseLSN(l.Slot.ConfirmedLSN)
	if err != nil {
		return err
	}
	if len(v.clock.notes) == 0 && l.Checkpoint != nil {
		v.clock.note(l.at.Add(l.Checkpoint.Sub(l.At)), confirmed)
	}
	v.clock.note(l.at, confirmed+pglogrepl.LSN(l.Slot.Lag))
	return nil
}

var (
	slotLagBytes   = describe("slot_lag_bytes", "WAL that was written since the LSN that is confirmed to the slot, of whatever table.")
	slotLagSeconds = describe("slot_lag_seconds", "Age of the oldest WAL that is not read, or whose outcomes are not recorded, within about 10 seconds; 0: there is none.")
	slotRetained   = describe("slot_retained_bytes", "WAL that Postgres keeps for the slot.")
	slotSafe       = describe("slot_safe_wal_bytes", "WAL that can be written before the slot is in danger of being lost (safe_wal_size); absent without a limit.")
	slotStatus     = describe("slot_wal_status", "1 for the wal_status that Postgres gives the slot.", "status")
	checkpointTime = describe("checkpoint_timestamp_seconds", "When the checkpoint was last written, since 1970; an idle relay writes none.")
)

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(namespace, "", name), help, labels, nil)
}

// Describe implements prometheus.Collector.
func (v *vitals) Describe(to chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{slotLagBytes, slotLagSeconds, slotRetained, slotSafe, slotStatus, checkpointTime} {
		to <- desc
	}
}

// Collect implements prometheus.Collector.
func (v *vitals) Collect(to chan<- prometheus.Metric) {
	l := v.last.Load()
	if l == nil || time.Since(l.at) > lookValid {
		return
	}
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	if l.Checkpoint != nil {
		gauge(checkpointTime, float64(l.at.Add(l.Checkpoint.Sub(l.At)).UnixMilli())/1000)
	}
	if l.lag >= 0 {
		gauge(slotLagSeconds, l.lag.Seconds())
	}
	slot := l.Slot
	if slot == nil {
		return
	}
	gauge(slotLagBytes, float64(slot.Lag))
	gauge(slotRetained, float64(slot.Held))
	if slot.SafeWALSize != nil {
		gauge(slotSafe, float64(*slot.SafeWALSize))
	}
	for _, status := range []string{"reserved", "extended", "unreserved", "lost"} {
		gauge(slotStatus, indicator(slot.WALStatus == status), status)
	}
}

// indicator is 1 for true.
func indicator(holds bool) float64 {
	if holds {
		return 1
	}
	return 0
}
