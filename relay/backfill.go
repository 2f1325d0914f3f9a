package relay

import (
	"context"
	"fmt"
	"time"

	"outbox-relay/checkpoint"
	"outbox-relay/outbox"
)

const (
	backfillBatch = 8192 // rows announced at a time
	progressEvery = 5 * time.Second
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
	for {
		list, err := p.backlog.Next(p.ctx, backfillBatch)
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
			if err := pause(p.ctx, 10*time.Millisecond); err != nil {
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
	*session
	total, done int
	began, told time.Time
}

func newProgress(s *session, total int) *progress {
	now := time.Now()
	if total > 0 {
		s.log.Info("publishing the rows that do not come out of the slot", "rows", total)
	}
	s.relay.metrics.backlog.Set(float64(total))
	s.relay.metrics.backlogLeft.Set(float64(total))
	return &progress{session: s, total: total, began: now, told: now}
}

func (p *progress) add(rows int) {
	p.done += rows
	p.relay.metrics.backlogLeft.Set(float64(max(0, p.total-p.done)))
	if time.Since(p.told) < progressEvery {
		return
	}
	p.told = time.Now()
	rate := float64(p.done) / time.Since(p.began).Seconds()
	left := time.Duration(float64(max(0, p.total-p.done)) / rate * float64(time.Second))
	p.log.Info("publishing the rows that do not come out of the slot", "done", p.done, "rows", p.total,
		"rows_per_second", int(rate), "left", left.Round(time.Second))
}

func (p *progress) end() {
	p.relay.metrics.backlogLeft.Set(0)
	if p.done > 0 {
		p.log.Info("published the rows that do not come out of the slot", "rows", p.done, "duration", time.Since(p.began).Round(time.Millisecond))
	}
}
