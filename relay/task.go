package relay

import (
	"context"
	"time"

	"outbox-relay/internal/wait"
)

// Bar shows at a terminal how far something has come. One goroutine at a time
// uses it; a second End does nothing.
type Bar interface {
	Set(done int)
	End()
}

// taskTell is how often the log tells of a task, where there is no terminal.
const taskTell = 5 * time.Second

// task is something long that people wait for: a backfill, the draining.
type task struct {
	total, done int
	began, told time.Time
	bar         Bar // nil: the log tells
}

// begin begins to show the task.
func (s *session) begin(what string, total int) *task {
	now := time.Now()
	t := &task{total: total, began: now, told: now}
	if show := s.relay.config.Bar; show != nil && total > 0 {
		t.bar = show(what, total)
	}
	return t
}

// set says how far it is, and reports whether it is time for a line of the log.
func (t *task) set(done int) (tell bool) {
	t.done = done
	if t.bar != nil {
		t.bar.Set(done)
		return false
	}
	if tell = time.Since(t.told) >= taskTell; tell {
		t.told = time.Now()
	}
	return tell
}

// pace is how much is done in a second, and how long the rest will take.
func (t *task) pace() (each int, left time.Duration) {
	rate := float64(t.done) / time.Since(t.began).Seconds()
	return int(rate), time.Duration(float64(max(0, t.total-t.done)) / max(rate, 1) * float64(time.Second)).Round(time.Second)
}

// end takes the bar away.
func (t *task) end() {
	if t.bar != nil {
		t.bar.End()
	}
}

// drainLook is how often the draining is looked at.
const drainLook = 100 * time.Millisecond

// showDraining shows how the events that were read come to their end, until stop.
func (s *session) showDraining(ctx context.Context, p *pipeline) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	total, ended := p.tracker.Len(), make(chan struct{})
	go func() {
		defer close(ended)
		t := s.begin("stopping", total)
		defer t.end()
		for wait.For(ctx, drainLook) == nil {
			if left := p.tracker.Len(); t.set(max(0, total-left)) {
				s.log.Info("still stopping", "events", left)
			}
		}
	}()
	return func() { cancel(); <-ended }
}
