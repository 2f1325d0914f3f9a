package outbox

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Backlog is what does not come out of the slot: the rows that were pending
// before it was made, or that it has missed. It is read in one snapshot, in the
// order of ids, as fast as it is published: memory stays flat however many rows
// there are.
type Backlog struct {
	table  Table
	layout Layout
	conn   *pgx.Conn // its own; closing it ends the snapshot

	// What is left out: rows that were done, or that come out of the slot.
	After   string          // and every id before it
	Known   map[string]bool // by their ids
	Retried map[string]int  // by their ids, where retried_attempts is that many

	rows pgx.Rows // once it is read
}

// OpenBacklog begins a transaction that locks the table against being rewritten:
// a snapshot from before that would see no rows. The snapshot is taken by Take or
// by the first reading. The session has no timeouts.
func (t Table) OpenBacklog(ctx context.Context, conn *pgx.Conn, layout Layout) (*Backlog, error) {
	b := &Backlog{table: t, layout: layout, conn: conn, Known: map[string]bool{}, Retried: map[string]int{}}
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

// condition selects the rows. A leftover is an outcome.
func (b *Backlog) condition() string {
	return fmt.Sprintf(`e.status = 'pending' and %[2]s > $1 and %[2]s <> all ($2)
		and not exists (select from unnest($3::text[], $4::int[]) as r(id, attempts) where r.id = %[2]s and r.attempts = e.retried_attempts)
		and not exists (select from %[1]s l where l.slot = $5 and l.id = %[2]s)`, b.table.leftovers(), b.table.id("e"))
}

func (b *Backlog) args() []any {
	known, retried, attempts := []string{}, []string{}, []int{}
	for id := range b.Known {
		known = append(known, id)
	}
	for id, n := range b.Retried {
		retried, attempts = append(retried, id), append(attempts, n)
	}
	return []any{b.After, known, retried, attempts, b.table.Slot}
}

// Count counts the rows.
func (b *Backlog) Count(ctx context.Context) (int, error) {
	var n int
	err := b.conn.QueryRow(ctx, `select count(*) from `+b.table.String()+` e where `+b.condition(), b.args()...).Scan(&n)
	if err != nil {
		return 0, fmt.Errorf("count the backlog of %s: %w", b.table, err)
	}
	return n, nil
}

// Next reads the next rows, at most limit, and no more once they have as many bytes;
// none: that was all.
func (b *Backlog) Next(ctx context.Context, limit, bytes int) ([]*Row, error) {
	if b.rows == nil {
		if err := b.read(ctx); err != nil {
			return nil, err
		}
	}
	var list []*Row
	for size := 0; len(list) < limit && size < bytes && b.rows.Next(); {
		row, err := b.table.scanRow(b.rows)
		if err != nil {
			return nil, fmt.Errorf("read the backlog of %s: %w", b.table, err)
		}
		list = append(list, row)
		size += row.Event.Size()
	}
	if err := b.rows.Err(); err != nil {
		return nil, fmt.Errorf("read the backlog of %s: %w", b.table, err)
	}
	return list, nil
}

// read begins to read. Postgres sends no further than the connection takes, so
// neither side holds the rows; and it walks the primary key, since a sort of all
// would have to end before the first row comes.
func (b *Backlog) read(ctx context.Context) error {
	for _, way := range []string{"enable_sort", "enable_seqscan", "enable_bitmapscan"} {
		if _, err := b.conn.Exec(ctx, "set local "+way+" = off"); err != nil {
			return fmt.Errorf("read the backlog of %s: %w", b.table, err)
		}
	}
	var err error
	b.rows, err = b.conn.Query(ctx, "select "+b.table.rowColumns(b.layout)+" from "+b.table.String()+" e where "+b.condition()+` order by `+b.table.id("e"), b.args()...)
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
