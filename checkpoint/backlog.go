package checkpoint

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
)

// The backlog is the list of the rows that a backfill publishes: their ids, in the order
// in which they go out, in parts. It is written in one reading of the table, in which
// they are pending; from then on no snapshot has to be held for as long as publishing
// them takes, and a crash loses nothing of it. A part says how many of its ids have been
// announced as a batch.

// BacklogPart is the next ids of the backlog.
type BacklogPart struct {
	Number int // of the part; the first is 1
	IDs    []string
}

// BeginBacklog forgets the list of an earlier backfill.
func (s *Store) BeginBacklog(ctx context.Context) error {
	return s.changeClaimed(ctx, "begin the backlog beside the", `backlog_end = null`,
		`, older as (delete from `+s.backlog+` b using changed where b.slot = changed.slot)`, pgx.NamedArgs{})
}

// AddBacklog adds a part to the list.
func (s *Store) AddBacklog(ctx context.Context, p BacklogPart) error {
	return s.changeClaimed(ctx, "add to the backlog beside the", `backlog_end = null`,
		`, added as (insert into `+s.backlog+` (slot, part, ids, rows) select slot, @part, @ids::text[], cardinality(@ids::text[]) from changed)`,
		pgx.NamedArgs{"part": p.Number, "ids": p.IDs})
}

// EndBacklog records that the list is whole: it has so many rows.
func (s *Store) EndBacklog(ctx context.Context, rows int) error {
	return s.changeClaimed(ctx, "end the backlog beside the", `backlog_end = backfilled + @rows::bigint + `+s.announced("@slot"), ``, pgx.NamedArgs{"rows": rows})
}

// BacklogLeft returns how many rows of a whole list are still to be announced. listed is
// false where there is no whole list, or an older release, which knows of none, has
// published rows since: what is left is then told by the table.
func (s *Store) BacklogLeft(ctx context.Context) (rows int, listed bool, err error) {
	err = s.conn.QueryRow(ctx, `select b.rows, coalesce(c.backlog_end - b.rows = c.backfilled + b.announced, false)
		from `+s.table+` c, lateral (select coalesce(sum(rows - taken), 0)::bigint as rows,
				`+s.announced("$1")+` as announced
			from `+s.backlog+` where slot = $1) as b
		where c.slot = $1`, s.slot).Scan(&rows, &listed)
	return rows, listed, s.explain("read the backlog beside the", err)
}

// announced is the expression for how many rows of a backfill are announced and not done.
func (s *Store) announced(slot string) string {
	return `(select coalesce(sum(cardinality(ids) - done), 0) from ` + s.batches + ` where slot = ` + slot + ` and kind = 'backfill')`
}

// NextBacklog returns the ids of the first part that is not announced whole; none: all
// of the list is.
func (s *Store) NextBacklog(ctx context.Context) (BacklogPart, error) {
	var p BacklogPart
	err := s.conn.QueryRow(ctx, `select part, ids[taken + 1:] from `+s.backlog+` where slot = $1 and taken < rows order by part limit 1`, s.slot).
		Scan(&p.Number, &p.IDs)
	if errors.Is(err, pgx.ErrNoRows) {
		return p, nil
	}
	return p, s.explain("read the backlog beside the", err)
}

// taking is the part of an announcement that takes the batch from the backlog's list.
func (s *Store) taking(part int) string {
	if part == 0 {
		return ""
	}
	return `, taken as (update ` + s.backlog + ` b set taken = taken + cardinality(@ids::text[]) from changed where b.slot = changed.slot and b.part = @part),
		through as (delete from ` + s.backlog + ` b using changed where b.slot = changed.slot and b.part < @part)`
}
