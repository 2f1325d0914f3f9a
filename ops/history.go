package ops

import (
	"context"
	"sync"
	"time"

	"outbox-relay/relay"
)

// The history: a point a second, ten minutes of them, in about 50 KiB.
const (
	historyStep   = time.Second
	historyPoints = 600
)

// point is what the page draws of one second. What is null is not known: there
// was nothing to measure.
type point struct {
	At         int64    `json:"at"` // Unix time in milliseconds
	Events     float64  `json:"events"`
	Bytes      float64  `json:"bytes"` // both a second, acknowledged by the stream
	Lag        *float64 `json:"lag"`   // seconds from commit to ack; where nothing is acknowledged, the age of what waits
	Behind     *uint64  `json:"behind"`
	InFlight   int      `json:"in_flight"`
	Unrecorded int      `json:"unrecorded"`
	Well       bool     `json:"well"` // nothing was known to be in the way
}

// history is what happened last. Safe for concurrent use.
type history struct {
	mu     sync.Mutex
	points []point // a ring once it is full
	next   int
}

// keep adds points until ctx ends.
func (h *history) keep(ctx context.Context, r *relay.Relay) {
	tick := time.NewTicker(historyStep)
	defer tick.Stop()
	before := r.Present()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			now := r.Present()
			h.add(between(before, now))
			before = now
		}
	}
}

// between is what happened from one look to the next.
func between(before, now relay.Present) point {
	seconds := now.At.Sub(before.At).Seconds()
	p := point{
		At:     now.At.UnixMilli(),
		Events: (now.Published - before.Published) / seconds, Bytes: (now.Bytes - before.Bytes) / seconds,
		InFlight: now.InFlight, Unrecorded: now.Unrecorded,
		Well: now.Trouble == "" && now.Stalled == "",
	}
	switch acked := now.Acked - before.Acked; {
	case acked > 0:
		lag := max(0, (now.CommitToAck-before.CommitToAck)/acked) // two clocks
		p.Lag = &lag
	case !now.Oldest.IsZero():
		lag := max(0, now.At.Sub(now.Oldest).Seconds())
		p.Lag = &lag
	}
	p.Behind = behind(now)
	return p
}

// behind is how many bytes of WAL are not confirmed; nil: not known.
func behind(at relay.Present) *uint64 {
	if at.WALEnd == 0 {
		return nil
	}
	bytes := uint64(max(at.WALEnd, at.Confirmed) - at.Confirmed)
	return &bytes
}

func (h *history) add(p point) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.points) < historyPoints {
		h.points = append(h.points, p)
		return
	}
	h.points[h.next] = p
	h.next = (h.next + 1) % historyPoints
}

// after returns the points after that time, oldest first.
func (h *history) after(at int64) []point {
	h.mu.Lock()
	defer h.mu.Unlock()
	later := []point{}
	for i := range h.points {
		if p := h.points[(h.next+i)%len(h.points)]; p.At > at {
			later = append(later, p)
		}
	}
	return later
}
