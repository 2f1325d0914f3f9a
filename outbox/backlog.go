package outbox

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Backlog is what does not come out of the slot: the rows that were pending before it
// was made, or that it has missed. Their ids are read at once, in one snapshot, which
// ends with that: a snapshot that is held for as long as publishing takes would keep
// Postgres from cleaning up the whole database.
type Backlog struct {
	table Table
	conn  *pgx.Conn // its own; closing it ends the snapshot

	// What is left out: rows that were done, or that come out of the slot.
	After   string          // and every id before it
	Known   map[string]bool // by their ids
	Retried map[string]int  // by their ids, where retried_attempts is that many

	rows pgx.Rows // once it is read
}

// OpenBacklog begins a transaction that locks the table against being rewritten:
// a snapshot from before that would see no rows. The snapshot is taken by Take or
// by the first reading. The session has no timeouts.
func (t Table) OpenBacklog(ctx context.Context, conn *pgx.Conn) (*Backlog, error) {
	b := &Backlog{table: t, conn: conn, Known: map[string]bool{}, Retried: map[string]int{}}
	for _, sql := range []string{
		`begin isolation level repeatable read, read only`,
		`lock table ` + t.String() + ` in access share mode`,
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return nil, fmt.Errorf("begin to read the backlog of %s: %w", t, err)
		}
	}
	return b, nil
}

// Take takes over the snapshot that a slot was created with: what it sees does
// not come out of the slot, and what it does not see does.
func (b *Backlog) Take(ctx context.Context, exported string) error {
	if _, err := b.conn.Exec(ctx, `set transaction snapshot '`+exported+`'`); err != nil {
		return fmt.Errorf("take over the snapshot of slot %s: %w", b.table.Slot, err)
	}
	return nil
}

// Snapshot returns the snapshot in which the backlog is read.
func (b *Backlog) Snapshot(ctx context.Context) (Snapshot, error) {
	var text string
	if err := b.conn.QueryRow(ctx, `select pg_catalog.pg_current_snapshot()::text`).Scan(&text); err != nil {
		return Snapshot{}, fmt.Errorf("read the backlog of %s: %w", b.table, err)
	}
	return ParseSnapshot(text)
}

// Next reads the next ids, at most limit, in their order; none: that was all.
func (b *Backlog) Next(ctx context.Context, limit int) ([]string, error) {
	if b.rows == nil {
		if err := b.read(ctx); err != nil {
			return nil, err
		}
	}
	var ids []string
	for len(ids) < limit && b.rows.Next() {
		var id string
		if err := b.rows.Scan(&id); err != nil {
			return nil, fmt.Errorf("read the backlog of %s: %w", b.table, err)
		}
		ids = append(ids, id)
	}
	switch err := b.rows.Err(); {
	case Unprintable(err):
		return nil, b.table.unprintableID(err)
	case err != nil:
		return nil, fmt.Errorf("read the backlog of %s: %w", b.table, err)
	}
	return ids, nil
}

// read begins to read. Each page of the table is read once. Sets are taken from one
// another by sorting, which goes to disk where it has to: by hashing, a set that the
// statistics don't know of could take any amount of memory, and by a join any amount of
// time. A leftover is an outcome.
func (b *Backlog) read(ctx context.Context) error {
	for _, way := range []string{"enable_indexscan", "enable_indexonlyscan", "enable_bitmapscan", "enable_hashagg", "jit"} {
		if _, err := b.conn.Exec(ctx, "set local "+way+" = off"); err != nil {
			return fmt.Errorf("read the backlog of %s: %w", b.table, err)
		}
	}
	known, retried, attempts := []string{}, []string{}, []int{}
	for id := range b.Known {
		known = append(known, id)
	}
	for id, n := range b.Retried {
		retried, attempts = append(retried, id), append(attempts, n)
	}
	args := pgx.NamedArgs{"known": known, "retried": retried, "attempts": attempts, "slot": b.table.Slot}
	behind := ""
	if b.After != "" {
		behind, args["after"] = " and "+b.table.order()+" > "+b.table.ordered("@after"), b.After
	}
	var err error
	b.rows, err = b.conn.Query(ctx, `select id from (
			select id from (
				select `+b.table.id("e")+` as id, e.retried_attempts from `+b.table.String()+` e where e.status = 'pending'`+behind+`
				except select id, attempts from unnest(@retried::text[], @attempts::int[]) as r(id, attempts)) as pending
			except select unnest(@known::text[])
			except select id from `+b.table.leftovers()+` where slot = @slot) as left_over
		order by `+b.table.ordered("id"), args)
	if err != nil {
		return fmt.Errorf("read the backlog of %s: %w", b.table, err)
	}
	return nil
}

// WithoutRow returns those of the ids that no row has.
func (t Table) WithoutRow(ctx context.Context, conn *pgx.Conn, ids []string) ([]string, error) {
	statuses, err := t.Statuses(ctx, conn, ids)
	if err != nil {
		return nil, err
	}
	var without []string
	for _, id := range ids {
		if _, there := statuses[id]; !there {
			without = append(without, id)
		}
	}
	return without, nil
}
