package relay

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"outbox-relay/checkpoint"
	"outbox-relay/internal/wait"
	"outbox-relay/outbox"
)

// What is announced at a time: so many rows, or as many as have so many bytes, which
// are held beside the window.
const (
	backfillBatch = 8192
	backfillBytes = 16 << 20
)

// turn does, once, what comes before the first event that is not in the stream
// yet: the rest of a batch, and the backfill.
func (p *pipeline) turn() error {
	if !p.due || p.batch.Done == len(p.batch.IDs) && p.judged < p.found.Proved {
		return nil
	}
	p.due = false
	if p.batch.Done < len(p.batch.IDs) {
		if err := p.finish(p.batch); err != nil {
			return err
		}
	}
	if p.backlog != nil {
		if err := p.backfill(); err != nil {
			return fmt.Errorf("backfill: %w", err)
		}
	}
	p.streaming()
	return nil
}

// backfill publishes the rows that do not come out of the slot.
func (p *pipeline) backfill() error {
	if err := p.settle(); err != nil {
		return err
	}
	if err := p.awaitSeen(); err != nil {
		return err
	}
	total, err := p.backlog.Count(p.ctx)
	if err != nil {
		return err
	}
	progress := newProgress(p.session, total)
	defer progress.task.end()
	for {
		list, err := p.backlog.Next(p.ctx, backfillBatch, backfillBytes)
		if err != nil {
			return err
		}
		if len(list) == 0 {
			break
		}
		if err := p.backfillRows(list); err != nil {
			return err
		}
		progress.add(len(list))
	}
	closeSQL(p.reading) // and with it the snapshot, which keeps Postgres from cleaning up
	err = p.recorder.do(p.ctx, func(ctx context.Context) error { return p.store.Backfilled(ctx) })
	if err == nil {
		progress.end()
	}
	return err
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

func (p *pipeline) backfillRows(list []*outbox.Row) error {
	batch := checkpoint.TableBatch{Source: checkpoint.Backfill, End: p.at}
	rows := make(map[string]*outbox.Row, len(list))
	for _, row := range list {
		id := string(row.Event.ID)
		batch.IDs = append(batch.IDs, id)
		rows[id] = row
	}
	if err := p.announce(batch); err != nil {
		return err
	}
	return p.publishBatch(batch, rows)
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
