package relay

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"outbox-relay/checkpoint"
	"outbox-relay/internal/wait"
)

// backfillPart is how many rows a part of a backfill's list has. They are announced together.
const backfillPart = 8192

// turn does, once, what comes before the first event that is not in the stream
// yet: the rest of a batch, and the backfill.
func (p *pipeline) turn() error {
	if !p.due || p.batch.Done == len(p.batch.IDs) && p.judged < p.found.Proved {
		return nil
	}
	p.due = false
	if p.backlog != nil { // its snapshot is not to be held for as long as a batch takes
		if err := p.listBacklog(); err != nil {
			return fmt.Errorf("list the backlog: %w", err)
		}
	}
	if p.batch.Done < len(p.batch.IDs) {
		if err := p.finish(p.batch); err != nil {
			return err
		}
	}
	if p.backfilling {
		if err := p.backfill(); err != nil {
			return fmt.Errorf("backfill: %w", err)
		}
	}
	p.streaming()
	return nil
}

// backfill publishes the rows of the backlog.
func (p *pipeline) backfill() error {
	if err := p.settle(); err != nil {
		return err
	}
	var total int
	err := p.recorder.do(p.ctx, func(ctx context.Context) (err error) {
		total, _, err = p.store.BacklogLeft(ctx)
		return err
	})
	if err != nil {
		return err
	}
	progress := newProgress(p.session, total)
	defer progress.task.end()
	for more := true; more; {
		if more, err = p.backfillRows(progress.add); err != nil {
			return err
		}
	}
	err = p.recorder.do(p.ctx, func(ctx context.Context) error { return p.store.Backfilled(ctx) })
	if err == nil {
		progress.end()
	}
	return err
}

// listBacklog records which rows the backfill publishes, and ends the snapshot that
// tells. What it records follows from the snapshot alone: a crash before it has
// recorded all leaves nothing that counts.
func (p *pipeline) listBacklog() error {
	if err := p.awaitSeen(); err != nil {
		return err
	}
	do := func(record func(context.Context) error) error { return p.recorder.do(p.ctx, record) }
	if err := do(p.store.BeginBacklog); err != nil {
		return err
	}
	rows := 0
	for number := 1; ; number++ {
		ids, err := p.backlog.Next(p.ctx, backfillPart)
		if err != nil {
			return err
		}
		if len(ids) == 0 {
			break
		}
		part := checkpoint.BacklogPart{Number: number, IDs: ids}
		if err := do(func(ctx context.Context) error { return p.store.AddBacklog(ctx, part) }); err != nil {
			return err
		}
		rows += len(ids)
	}
	closeSQL(p.reading)
	p.backlog = nil
	return do(func(ctx context.Context) error { return p.store.EndBacklog(ctx, rows) })
}

// awaitSeen waits until the recorder can see every row of the backlog.
func (p *pipeline) awaitSeen() error {
	snapshot, err := p.backlog.Snapshot(p.ctx)
	if err != nil {
		return err
	}
	for seen := false; !seen; {
		err := p.recorder.do(p.ctx, func(ctx context.Context) error {
			state, err := p.table.State(ctx, p.sql)
			seen = err == nil && state.Snapshot.Covers(snapshot)
			return err
		})
		if err != nil {
			return err
		}
		if !seen {
			if err := wait.For(p.ctx, 10*time.Millisecond); err != nil {
				return err
			}
		}
	}
	return nil
}

// backfillRows publishes the next rows of the list; more is false where there are none.
func (p *pipeline) backfillRows(sent func(rows int)) (more bool, err error) {
	batch := checkpoint.TableBatch{Source: checkpoint.Backfill, End: p.at}
	err = p.recorder.do(p.ctx, func(ctx context.Context) error {
		part, err := p.store.NextBacklog(ctx)
		batch.Part, batch.IDs = part.Number, part.IDs
		return err
	})
	if err != nil || len(batch.IDs) == 0 {
		return false, err
	}
	if err := p.announce(batch); err != nil {
		return false, err
	}
	return true, p.publishBatch(batch, sent)
}

// progress tells how a backfill gets on.
type progress struct {
	*task
	log  *slog.Logger
	left prometheus.Gauge
}

func newProgress(s *session, total int) *progress {
	m := s.relay.metrics
	m.backlog.Set(float64(total))
	m.backlogLeft.Set(float64(total))
	if total > 0 {
		s.log.Info("publishing the rows that do not come out of the slot", "rows", total)
	}
	return &progress{task: s.begin("publishing the rows that do not come out of the slot", total), log: s.log, left: m.backlogLeft}
}

func (p *progress) add(rows int) {
	tell := p.set(p.done + rows)
	p.left.Set(float64(max(0, p.total-p.done)))
	if each, left := p.pace(); tell {
		p.log.Info("publishing the rows that do not come out of the slot", "done", p.done, "rows", p.total, "rows_per_second", each, "left", left)
	}
}

func (p *progress) end() {
	p.task.end()
	p.left.Set(0)
	if p.done > 0 {
		p.log.Info("published the rows that do not come out of the slot", "rows", p.done, "duration", time.Since(p.began).Round(time.Millisecond))
	}
}
