package relay

import (
	"context"

	"outbox-relay/checkpoint"
	"outbox-relay/outbox"
	"outbox-relay/outbox/event"
	"outbox-relay/sink"
)

// batchBytes is how many bytes of rows are read from the table at a time.
const batchBytes = 16 << 20

// request takes a request to publish rows from the table. In the order of
// commits it is one event: all before it is recorded first, and it before all
// that follows.
func (p *pipeline) request(end event.Position, xid uint32, r event.Request) error {
	if err := p.turn(); err != nil {
		return err
	}
	if end.Compare(p.after) <= 0 {
		return nil // done
	}
	if err := p.settle(); err != nil {
		return err
	}
	var states map[string]outbox.RowState
	err := p.recorder.visible(p.ctx, xid, func(ctx context.Context) (err error) {
		states, err = p.table.RowStates(ctx, p.sql, r.IDs)
		return err
	})
	if outbox.Unprintable(err) { // what was asked for can't be text of this database, and so no row's id
		p.stray(err)
		return p.pass(end, xid)
	}
	if err != nil {
		return err
	}
	batch := checkpoint.TableBatch{Source: checkpoint.Retry, Run: r.Run, End: end}
	if r.Run != "" {
		batch.Source = checkpoint.Replay
	}
	for i, id := range r.IDs {
		if state, ok := states[id]; ok && (r.Run != "" || state.Pending && state.Attempts == r.Attempts[i]) {
			batch.IDs = append(batch.IDs, id)
		}
	}
	p.tellRequest(batch, len(r.IDs)-len(batch.IDs))
	if len(batch.IDs) == 0 {
		return p.pass(end, xid)
	}
	if err := p.chain.Refresh(p.ctx); err != nil { // what did not fit may fit now
		return err
	}
	if err := p.announce(batch); err != nil {
		return err
	}
	return p.publishBatch(batch, func(int) {})
}

func (p *pipeline) tellRequest(b checkpoint.TableBatch, leftOut int) {
	if len(b.IDs) > 0 {
		p.log.Info("publishing from the table", "source", string(b.Source), "events", len(b.IDs), "position", b.End.String(), "run", b.Run)
	}
	if leftOut > 0 {
		p.relay.metrics.unmatched.Add(float64(leftOut))
		p.log.Warn("rows that were asked for are gone, or have another state by now: they are left out",
			"source", string(b.Source), "left_out", leftOut, "position", b.End.String(), "run", b.Run)
	}
}

// stray passes over a request that nobody can read.
func (p *pipeline) stray(err error) {
	p.relay.metrics.unmatched.Inc()
	p.log.Warn("ignored a request to publish rows", "error", err, "commit_lsn", p.decoder.Event.Position.Commit.String())
}

// pass lets the checkpoint move past a request that has nothing to publish.
func (p *pipeline) pass(end event.Position, xid uint32) error {
	index, err := p.tracker.Add(p.ctx, end, xid, nil)
	if err != nil {
		return err
	}
	p.tracker.Skip(index)
	p.at = end
	p.fence(index)
	return nil
}

// settle waits until all that was read is stored or parked, and recorded.
func (p *pipeline) settle() error {
	if err := p.chain.Drain(p.ctx); err != nil {
		return err
	}
	p.recorder.hurry()
	return p.tracker.WaitEmpty(p.ctx)
}

// announce records which rows are published next.
func (p *pipeline) announce(b checkpoint.TableBatch) error {
	return p.recorder.do(p.ctx, func(ctx context.Context) error {
		p.recorder.batch = b
		return p.store.Announce(ctx, b)
	})
}

// finish publishes the rest of a batch that an earlier session announced.
func (p *pipeline) finish(b checkpoint.TableBatch) error {
	err := p.recorder.do(p.ctx, func(context.Context) error {
		p.recorder.batch = b
		return nil
	})
	if err != nil {
		return err
	}
	p.log.Info("publishing the rest of what an earlier session began to publish from the table", "source", string(b.Source), "events", len(b.Left()))
	p.after = b.End // the slot gives its request once more
	return p.publishBatch(b, func(int) {})
}

// publishBatch publishes what is left of an announced batch, and returns when all of it
// is recorded. It holds batchBytes of rows at a time, beside the window, and tells of how
// many are sent.
func (p *pipeline) publishBatch(b checkpoint.TableBatch, sent func(rows int)) error {
	p.source = b.Source
	for place := b.Done; place < len(b.IDs); {
		rows, n, err := p.nextRows(b.IDs[place:])
		if err != nil {
			return err
		}
		for end := place + n; place < end; place++ {
			if place == len(b.IDs)-1 {
				p.at = b.End
			}
			if err := p.row(b, place, rows[b.IDs[place]]); err != nil {
				return err
			}
		}
		sent(n)
	}
	if err := p.settle(); err != nil {
		return err
	}
	p.source = "" // nothing of it is under way any more
	return nil
}

// nextRows reads the rows of the first of these ids, and returns of how many.
func (p *pipeline) nextRows(ids []string) (rows map[string]*outbox.Row, n int, err error) {
	p.chain.Flush() // what is published does not wait for Postgres
	err = p.recorder.do(p.ctx, func(ctx context.Context) (err error) {
		rows, n, err = p.table.FirstRows(ctx, p.sql, p.layout, ids, batchBytes)
		return err
	})
	return rows, n, err
}

// row publishes the row at one place of a batch. One that has gone, or changed its state, since
// it was announced is passed over, like a parked event.
func (p *pipeline) row(b checkpoint.TableBatch, place int, row *outbox.Row) error {
	index, err := p.tracker.Add(p.ctx, p.at, 0, []byte(event.MessageID(b.IDs[place], b.Run)))
	if err != nil {
		return err
	}
	var aggregateType []byte // of a row that is gone nobody knows it
	if row != nil {
		aggregateType = row.Event.AggregateType
	}
	if p.known(index, aggregateType) {
		return nil
	}
	if row == nil || b.Run == "" && !row.Pending() {
		p.tracker.Skip(index)
		p.fence(index)
		return nil
	}
	e := &row.Event
	e.Run, e.Position = b.Run, p.position(b, place)
	if row.Unprintable != "" {
		return p.rejected(index, e, &sink.RejectedError{Reason: row.Unprintable})
	}
	return p.send(index, e)
}

// position is what the message says. A row that does not come out of the slot has
// no LSN.
func (p *pipeline) position(b checkpoint.TableBatch, place int) event.Position {
	if b.Source == checkpoint.Backfill {
		p.number++
		return event.Position{Ordinal: p.number}
	}
	return event.Position{Commit: b.End.Commit, Ordinal: b.End.Ordinal - uint64(len(b.IDs)-1-place)}
}
