package outbox

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Backlog is what does not come out of the slot: the rows that were pending
// before it was made, or that it has missed. It is read in one snapshot, in the
// order of ids, a part at a time: memory stays flat however many there are.
type Backlog struct {
	table  Table
	layout Layout
	conn   *pgx.Conn // its own; closing it ends the snapshot

	before string   // pg_snapshot: what was inserted by a transaction that this sees is part of it
	missed []string // further rows that are
	known  []string // rows that are taken care of, whatever the snapshot shows
	after  string   // id up to which it was read earlier

	rows pgx.Rows // once it is read
}

// NoneBefore is a snapshot that sees nothing: of no row it is known that it
// can't come out of the slot.
const NoneBefore = "3:3:"

// OpenBacklog takes the snapshot. exported is the one that the slot was created
// with: what it sees is the backlog. Where it is empty, a new one is taken, and
// before says of which rows it is certain that they are part of it; Doubtful
// lists the others. known lists rows that are taken care of by now, and after is
// the id up to which the backlog was read earlier.
func (t Table) OpenBacklog(ctx context.Context, conn *pgx.Conn, layout Layout, exported, before string, known []string, after string) (*Backlog, error) {
	b := &Backlog{table: t, layout: layout, conn: conn, before: before, known: known, after: after, missed: []string{}}
	if known == nil {
		b.known = []string{} // a null array would leave everything out
	}
	for _, sql := range []string{
		`set idle_in_transaction_session_timeout = 0`,
		`select pg_catalog.set_config('transaction_timeout', '0', false) where pg_catalog.current_setting('transaction_timeout', true) is not null`,
		`begin isolation level repeatable read, read only`,
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return nil, fmt.Errorf("begin to read the backlog of %s: %w", t, err)
		}
	}
	if exported != "" {
		if _, err := conn.Exec(ctx, `set transaction snapshot '`+exported+`'`); err != nil {
			return nil, fmt.Errorf("take over the snapshot of slot %s: %w", t.Slot, err)
		}
	}
	var now string
	if err := conn.QueryRow(ctx, `select pg_catalog.pg_current_snapshot()::text`).Scan(&now); err != nil {
		return nil, fmt.Errorf("begin to read the backlog of %s: %w", t, err)
	}
	if exported != "" {
		b.before = now
	}
	return b, nil
}

// Before is the snapshot to be remembered while the backlog is not done.
func (b *Backlog) Before() string { return b.before }

// certain holds for a row version that was written by a transaction which $2
// sees. A row that is updated has a new version: of one that has not the old
// version any more, nothing is certain. xmin has 32 bits; it is taken as the one
// nearest to the snapshot. The snapshot that a slot exports lists every
// transaction that had not committed, also subtransactions
// (SnapBuildInitialSnapshot in src/backend/replication/logical/snapbuild.c).
const certain = `pg_catalog.pg_visible_in_snapshot(greatest(3, (
		select pg_catalog.pg_snapshot_xmax($2::pg_snapshot)::text::bigint + ((d + 2147483648) & 4294967295) - 2147483648
		from (select e.xmin::text::bigint - pg_catalog.pg_snapshot_xmax($2::pg_snapshot)::text::bigint) as distance(d)
	))::text::xid8, $2::pg_snapshot)`

// open holds for a row that waits to be published, and of which nothing is
// known: a leftover is an outcome.
func (b *Backlog) open() string {
	return fmt.Sprintf(`e.status = 'pending' and e.id > $1 and e.id <> all ($4)
		and not exists (select from %s l where l.slot = $3 and l.id = e.id)`, b.table.leftovers())
}

// Doubtful lists the pending rows that may come out of the slot, or may not,
// with their retried_attempts: they were inserted since, or updated.
func (b *Backlog) Doubtful(ctx context.Context) (map[string]int, error) {
	rows, err := b.conn.Query(ctx, `select e.id, e.retried_attempts from `+b.table.String()+` e where `+b.open()+` and not `+certain,
		b.after, b.before, b.table.Slot, b.known)
	if err != nil {
		return nil, fmt.Errorf("look for pending rows of %s: %w", b.table, err)
	}
	doubtful := map[string]int{}
	var id string
	var attempts int
	_, err = pgx.ForEachRow(rows, []any{&id, &attempts}, func() error {
		doubtful[id] = attempts
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("look for pending rows of %s: %w", b.table, err)
	}
	return doubtful, nil
}

// Missed says that these rows do not come out of the slot either.
func (b *Backlog) Missed(ids []string) { b.missed = ids }

// Count counts the rows.
func (b *Backlog) Count(ctx context.Context) (int, error) {
	var n int
	err := b.conn.QueryRow(ctx, `select count(*) from `+b.table.String()+` e where `+b.open()+` and (`+certain+` or e.id = any ($5))`,
		b.after, b.before, b.table.Slot, b.known, b.missed).Scan(&n)
	if err != nil {
		return 0, fmt.Errorf("count the backlog of %s: %w", b.table, err)
	}
	return n, nil
}

// Next reads the next rows, at most limit; none: that was all.
func (b *Backlog) Next(ctx context.Context, limit int) ([]*Row, error) {
	if b.rows == nil {
		if err := b.read(ctx); err != nil {
			return nil, err
		}
	}
	var list []*Row
	for len(list) < limit && b.rows.Next() {
		row, err := b.table.scanRow(b.rows)
		if err != nil {
			return nil, fmt.Errorf("read the backlog of %s: %w", b.table, err)
		}
		list = append(list, row)
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
	for _, way := range []string{"enable_sort", "enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin"} {
		if _, err := b.conn.Exec(ctx, "set local "+way+" = off"); err != nil {
			return fmt.Errorf("read the backlog of %s: %w", b.table, err)
		}
	}
	var err error
	b.rows, err = b.conn.Query(ctx, b.table.selectRows(b.layout)+b.open()+` and (`+certain+` or e.id = any ($5)) order by e.id`,
		b.after, b.before, b.table.Slot, b.known, b.missed)
	if err != nil {
		return fmt.Errorf("read the backlog of %s: %w", b.table, err)
	}
	return nil
}

// WithoutRow returns those of the ids that no row has.
func (t Table) WithoutRow(ctx context.Context, conn *pgx.Conn, ids []string) ([]string, error) {
	rows, err := conn.Query(ctx, `select u.id from unnest($1::text[]) with ordinality as u(id, n)
		where not exists (select from `+t.String()+` e where e.id = u.id) order by u.n`, ids)
	if err != nil {
		return nil, fmt.Errorf("look for rows of %s: %w", t, err)
	}
	without, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("look for rows of %s: %w", t, err)
	}
	return without, nil
}
