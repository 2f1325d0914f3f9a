package checkpoint

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/lsn"
	"outbox-relay/outbox/event"
)

// Source is why rows are published from the table.
type Source string

const (
	Backfill Source = "backfill" // they do not come out of the slot
	Retry    Source = "retry"    // they failed, and were asked for again
	Replay   Source = "replay"   // they were published, and were asked for again
)

// TableBatch is the rows that are published next from the table. It is recorded
// before any of them is sent, with all before it stored and recorded, and
// nothing else is sent before all of them are: so after a crash only these, in
// this order, can stand behind the checkpoint in the stream, whatever has become
// of the rows.
type TableBatch struct {
	Source Source
	Run    string // of a replay
	IDs    []string
	Done   int            // how many of them, from the first on, are recorded
	End    event.Position // of the checkpoint once all are
	Part   int            // of the backlog that the ids are the next ones of; 0: of none
}

// Left lists what is still to be done.
func (b TableBatch) Left() []string { return b.IDs[b.Done:] }

// BatchStep is how an advance takes the table's batch further.
type BatchStep struct {
	Source Source
	Rows   int  // that are done now
	Last   bool // all are then
}

// Announce records the batch, in the place of one that is done. No older checkpoint
// is left to go back to: the slot would not give the batch again.
func (s *Store) Announce(ctx context.Context, b TableBatch) error {
	return s.changeClaimed(ctx, "announce a batch beside the", `format = 2`, `, announced as (
			insert into `+s.batches+` (slot, kind, run, ids, commit_lsn, ordinal)
			select slot, @source, nullif(@run::text, ''), @ids::text[], @commit::pg_lsn, @ordinal from changed
			on conflict (slot) do update set kind = excluded.kind, run = excluded.run, ids = excluded.ids, done = 0,
				commit_lsn = excluded.commit_lsn, ordinal = excluded.ordinal, recorded_at = now())`+s.taking(b.Part)+`,
		older as (delete from `+s.history+` h using changed where h.slot = changed.slot)`,
		pgx.NamedArgs{"source": string(b.Source), "run": b.Run, "ids": b.IDs, "part": b.Part, "commit": b.End.Commit.String(), "ordinal": b.End.Ordinal})
}

// Batch reads the last batch; empty: there is none.
func (s *Store) Batch(ctx context.Context) (TableBatch, error) {
	var b TableBatch
	var commit string
	err := s.conn.QueryRow(ctx, `select kind, coalesce(run, ''), ids, done, commit_lsn::text, ordinal from `+s.batches+` where slot = $1`, s.slot).
		Scan(&b.Source, &b.Run, &b.IDs, &b.Done, &commit, &b.End.Ordinal)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return TableBatch{}, nil
	case err != nil:
		return b, s.explain("read the batch beside the", err)
	case b.Source != Backfill && b.Source != Retry && b.Source != Replay:
		return b, s.explain("read the batch beside the", fmt.Errorf("its kind is %q, which this release does not know", b.Source))
	}
	b.End.Commit, err = lsn.Parse(commit)
	return b, s.explain("read the batch beside the", err)
}

// stepping is what an advance sets in the checkpoint for the batch.
func (s *Store) stepping(step BatchStep) string {
	switch {
	case step.Rows > 0 && step.Source == Backfill:
		return `, backfilled = backfilled + @rows::int`
	case step.Rows > 0 && step.Last:
		return `, format = case phase when 'streaming' then 1 else 2 end`
	}
	return ""
}

// steps is the part of an advance that takes the batch further.
func (s *Store) steps(step BatchStep) string {
	if step.Rows == 0 {
		return ""
	}
	return `, stepped as (update ` + s.batches + ` set done = done + @rows::int where slot = @slot and exists (select from advanced))`
}
