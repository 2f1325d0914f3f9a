package outbox

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Removal is one step of a walk through the table, in the order of ids.
type Removal struct {
	Walked    int    // rows looked at
	Removed   int    // those of them that went
	Unchanged int    // those that were to go, and did not: a trigger swallows that
	Last      string // id of the last row looked at: where the next step begins
	// End says that no row behind Last is old enough: there is none, or the ids
	// are ULIDs, and say when each was made.
	End bool
}

// RemovePublished looks at the next limit rows behind the id after and removes
// those that were published longer than age ago. A row stays that the
// application holds locked, for which an outcome still waits, or that is being
// published once more.
//
// It walks by primary key since there is no index on status or published_at:
// with one, marking a row published would not stay on its page (HOT). The limit
// stands in the text, so that no plan takes it for a tenth of the table; an array is looked up in the index whatever the planner believes of the sizes.
// One statement is a short transaction, which holds up neither writers nor vacuum,
// and SKIP LOCKED never waits for the application.
func (t Table) RemovePublished(ctx context.Context, conn *pgx.Conn, after string, age time.Duration, limit int) (Removal, error) {
	var r Removal
	var last, final made
	var cutoff time.Time
	err := conn.QueryRow(ctx, fmt.Sprintf(`with walked as materialized (
			select %[5]s as id, %[6]s as created_at from %[1]s e where %[5]s > $1 order by %[5]s limit %[2]d),
		old as materialized (select %[5]s as id from %[1]s e where %[5]s = any (array(select id from walked))
				and e.status = 'published' and e.published_at < now() - $2::interval
				and %[5]s not in (select id from %[3]s where waiting)
				and %[5]s not in (select unnest(ids[done + 1:]) from %[4]s)
			for update of e skip locked),
		removed as (delete from %[1]s e where %[5]s = any (array(select id from old)) returning 1)
		select (select count(*) from walked), (select count(*) from removed), (select count(*) from old) - (select count(*) from removed), now() - $2::interval,
			last.id, last.created_at, final.id, final.created_at
		from (select id, created_at from walked order by id desc limit 1) last,
			(select %[5]s as id, %[6]s as created_at from %[1]s e order by %[5]s desc limit 1) final`,
		t, limit, t.leftovers(), t.own("outbox_relay_batches"), t.id("e"), t.column("created_at")), after, age).
		Scan(&r.Walked, &r.Removed, &r.Unchanged, &cutoff, &last.id, &last.at, &final.id, &final.at)
	switch {
	case errors.Is(err, pgx.ErrNoRows): // nothing is behind after
		return Removal{Last: after, End: true}, nil
	case err != nil:
		return r, fmt.Errorf("remove published rows of %s: %w", t, err)
	}
	r.Last = last.id
	r.End = r.Walked < limit || noneOlder(last, final, cutoff)
	return r, nil
}

// NextID returns the next id behind after that a pass comes to.
func (t Table) NextID(ctx context.Context, conn *pgx.Conn, after string) (id string, err error) {
	err = conn.QueryRow(ctx, `select `+t.id("e")+` from `+t.String()+` e where `+t.id("e")+` > $1 order by `+t.id("e")+` limit 1`, after).Scan(&id)
	if err != nil {
		return "", fmt.Errorf("read the next id of %s: %w", t, err)
	}
	return id, nil
}

// TimePartitioned reports whether the table is partitioned by range of a time, so
// that old rows go with their partition.
func (t Table) TimePartitioned(ctx context.Context, conn *pgx.Conn) (bool, error) {
	var yes bool
	err := conn.QueryRow(ctx, `select exists (select from pg_catalog.pg_partitioned_table p
		join pg_catalog.pg_attribute a on a.attrelid = p.partrelid and a.attnum = p.partattrs[0]
		where p.partrelid = pg_catalog.to_regclass($1) and p.partstrat = 'r' and p.partnatts = 1
			and a.atttypid in ('timestamptz'::regtype, 'timestamp'::regtype, 'date'::regtype))`, t.String()).Scan(&yes)
	if err != nil {
		return false, fmt.Errorf("look how %s is partitioned: %w", t, err)
	}
	return yes, nil
}

// DropPartitions drops the partitions whose time ended longer than age ago, and of
// which each row was published longer ago than that. It returns their names. What
// is in use is left, and told of in a notice. The owner's function does it, which
// migrate makes.
func (t Table) DropPartitions(ctx context.Context, conn *pgx.Conn, age time.Duration) ([]string, error) {
	rows, err := conn.Query(ctx, `select `+t.function("outbox_relay_drop_partitions")+`($1::text::regclass, $2)`, t.String(), age)
	if err != nil {
		return nil, fmt.Errorf("drop partitions of %s: %w", t, err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("drop partitions of %s: %w", t, err)
	}
	return names, nil
}

func (t Table) own(name string) string { return pgx.Identifier{t.Schema, name}.Sanitize() }

// made is a row's id and its created_at.
type made struct {
	id string
	at time.Time
}

// noneOlder reports whether no row from last to final, the table's last one, was
// made before the cutoff. It is so where both ids are ULIDs behind one prefix:
// so are those between them, and each tells when it was made. Of any other ids
// nothing is known.
func noneOlder(last, final made, cutoff time.Time) bool {
	prefix, at, ok := last.ulid()
	common, _, also := final.ulid()
	return ok && also && prefix == common && at.After(cutoff)
}

// crockford is the alphabet of ULIDs, in the order of their values, which is
// also that of every collation.
const crockford = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

// A ULID has 26 characters, the first 10 of them milliseconds since 1970.
const ulidLength, ulidTimeLength = 26, 10

// ulid splits the id into a prefix and the time in the ULID behind it. What reads
// like one by chance is told by created_at: a transaction begins at most a day
// before it inserts.
func (m made) ulid() (prefix string, at time.Time, ok bool) {
	prefix, at, ok = ulid(m.id)
	return prefix, at, ok && at.Sub(m.at).Abs() < longestTransaction
}

// ulid splits an id into a prefix and the time in the ULID behind it, if it ends with
// 26 characters that could be one.
func ulid(id string) (prefix string, at time.Time, ok bool) {
	split := len(id) - ulidLength
	if split < 0 {
		return "", at, false
	}
	prefix, text := id[:split], id[split:]
	var ms int64
	for i := range len(text) {
		value := strings.IndexByte(crockford, text[i])
		if value < 0 {
			return "", at, false
		}
		if i < ulidTimeLength {
			ms = ms<<5 | int64(value)
		}
	}
	return prefix, time.UnixMilli(ms), true
}
