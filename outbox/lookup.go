package outbox

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
)

// Rows are found by their ids, each by itself: what that costs grows with the list,
// and neither with the table nor with what its statistics say. So no list of ids is
// ever joined to the table. A planner that believes no row to be pending, because none
// was at the last ANALYZE, would compare every row of the backlog to every id of the
// list. A lateral subquery with OFFSET 0 is not turned into a join; it is carried out
// for each id, and walks the index.
// Source: is_simple_subquery in src/backend/optimizer/prep/prepjointree.c.

// LookupSettings are the settings of a session that finds rows by their ids: no plan
// reads the whole table, whatever role, database or statistics say. JIT compiles a
// statement for longer than it runs. And no policy hides a row: Postgres refuses instead.
func LookupSettings() map[string]string {
	return map[string]string{"row_security": "off",
		"enable_seqscan": "off", "enable_bitmapscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off",
		"enable_nestloop": "on", "enable_indexscan": "on", "enable_partition_pruning": "on",
		"max_parallel_workers_per_gather": "0", "jit": "off"}
}

// list is a list of ids as a statement has it: a row for each, with whatever else is
// known of it. In a table that is partitioned by the time at which rows were made, each
// row has the bounds of that time, as far as its id tells.
type list struct {
	table   Table
	name    string // of its expression in WITH, and the prefix of its arguments
	args    pgx.NamedArgs
	arrays  []string // arguments of unnest
	columns []string // and what they are called
}

// newList adds the ids to the arguments.
func (t Table) newList(args pgx.NamedArgs, name string, ids []string) *list {
	l := &list{table: t, name: name, args: args}
	l.add("id", ids)
	if t.ByTime {
		s := spansOf(ids)
		l.addArray("since", "timestamptz", s.since)
		l.addArray("until", "timestamptz", s.until)
		args[name+"_first"], args[name+"_last"] = s.first, s.last
	}
	return l
}

// add adds a column of text, with a value for each id.
func (l *list) add(column string, values []string) { l.addArray(column, "text", values) }

func (l *list) addArray(column, kind string, values any) {
	argument := l.name + "_" + column
	l.args[argument] = values
	l.arrays = append(l.arrays, "@"+argument+"::"+kind+"[]")
	l.columns = append(l.columns, column)
}

// unnested is the list as rows u.
func (l *list) unnested() string {
	return "unnest(" + strings.Join(l.arrays, ", ") + ") as u(" + strings.Join(l.columns, ", ") + ")"
}

// found selects these columns of the row e that has the id of u, where there is one.
func (l *list) found(columns string) string {
	where := l.table.id("e") + " = u.id"
	if l.table.ByTime {
		created := "e." + l.table.column("created_at")
		where += " and " + created + " >= u.since and " + created + " < u.until"
	}
	return "select " + columns + " from " + l.table.String() + " e where " + where + l.within() + " offset 0"
}

// within bounds e to the time of the whole list: the planner then leaves all other
// partitions alone.
func (l *list) within() string {
	if !l.table.ByTime {
		return ""
	}
	return fmt.Sprintf(" and e.%[1]s >= @%[2]s_first::timestamptz and e.%[1]s < @%[2]s_last::timestamptz", l.table.column("created_at"), l.name)
}

// with is the list's expression, of one row for each id if "advanced" has one: status
// is that of its row, null where none was found, and free says that the row is pending
// and locked by this statement.
//
// SKIP LOCKED, so that no batch waits for the application or deadlocks with it.
func (l *list) with(lock string) string {
	columns, same := "e.status", ""
	if l.table.ByTime {
		created := "e." + l.table.column("created_at")
		columns += ", " + created + " as created_at"
		same = " and " + created + " = seen.created_at"
	}
	return fmt.Sprintf(`,
		%[1]s_listed as materialized (select u.* from advanced, %[2]s),
		%[1]s as materialized (select u.*, seen.status, free.yes is not null as free
			from %[1]s_listed as u
			left join lateral (%[3]s) as seen on true
			left join lateral (select true as yes from %[4]s e where %[5]s = u.id%[6]s%[7]s and e.status = 'pending' and seen.status = 'pending'
				for %[8]s of e skip locked) as free on true)`,
		l.name, l.unnested(), l.found(columns), l.table, l.table.id("e"), same, l.within(), lock)
}

// isIn is the condition that e is a row of this list that the other condition holds for.
// An array is looked up in the index, whatever the planner believes of its size, and
// that of the table; a join could begin with the table.
func (l *list) isIn(condition string) string {
	return fmt.Sprintf("%s = any (array(select id from %s where %s))%s", l.table.id("e"), l.name, condition, l.within())
}

// gone is the condition that no row has the id, and astray that none was found in the
// partitions that the id tells, but could be in others.
func (l *list) gone() string {
	if l.table.ByTime {
		return "(status is null and not isfinite(since))"
	}
	return "status is null"
}

func (l *list) astray() string {
	if l.table.ByTime {
		return "(status is null and isfinite(since))"
	}
	return "false"
}

// lookUp reads these columns of the rows that have the ids. each gets every row, and
// returns its id.
func (t Table) lookUp(ctx context.Context, conn *pgx.Conn, ids []string, columns string, each func(pgx.CollectableRow) (string, error)) error {
	args := pgx.NamedArgs{}
	l := t.newList(args, "listed", ids)
	rows, err := conn.Query(ctx, `select r.* from `+l.unnested()+`, lateral (`+l.found(columns)+`) as r`, args)
	if err != nil {
		return err
	}
	read, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (string, error) { return each(r) })
	if err != nil || !t.ByTime || len(read) == len(ids) {
		return err
	}
	found := make(map[string]bool, len(read))
	for _, id := range read {
		found[id] = true
	}
	missing := slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return found[id] })
	return t.anywhere().lookUp(ctx, conn, missing, columns, each)
}

// anywhere looks for rows in all partitions, whatever their ids tell.
func (t Table) anywhere() Table {
	t.ByTime = false
	return t
}

// Near returns how many of the ids, from the front, one statement is to look up. Each
// is looked for in every partition that the time of all of them touches.
func (t Table) Near(ids []string) int {
	if !t.ByTime || len(ids) == 0 {
		return len(ids)
	}
	first, known := madeAt(ids[0])
	last := first
	for n, id := range ids[1:] {
		at, ok := madeAt(id)
		if at.Before(first) {
			first = at
		}
		if at.After(last) {
			last = at
		}
		if ok != known || last.Sub(first) > nearby {
			return n + 1
		}
	}
	return len(ids)
}

// nearby is the time that a statement's ids may span.
const nearby = 48 * time.Hour

// A row's created_at is when its transaction began, and its id is made after that: at
// most so long after it, and, where another clock makes one of both, so long before it.
// A row that is in none of these partitions is looked for in all.
const (
	longestTransaction = 24 * time.Hour
	farthestClock      = time.Hour
)

// spans are the times between which rows were made, by their ids: infinite where an id
// tells none. first and last are the bounds of all.
type spans struct {
	since, until []pgtype.Timestamptz
	first, last  pgtype.Timestamptz
}

func spansOf(ids []string) spans {
	s := spans{since: make([]pgtype.Timestamptz, len(ids)), until: make([]pgtype.Timestamptz, len(ids))}
	var first, last time.Time
	known := 0
	for i, id := range ids {
		at, ok := madeAt(id)
		if !ok {
			s.since[i], s.until[i] = distantPast, distantFuture
			continue
		}
		since, until := at.Add(-longestTransaction), at.Add(farthestClock)
		if known == 0 || since.Before(first) {
			first = since
		}
		if known == 0 || until.After(last) {
			last = until
		}
		known++
		s.since[i], s.until[i] = finite(since), finite(until)
	}
	s.first, s.last = finite(first), finite(last)
	if known < len(ids) {
		s.first, s.last = distantPast, distantFuture
	}
	return s
}

var (
	distantPast   = pgtype.Timestamptz{Valid: true, InfinityModifier: pgtype.NegativeInfinity}
	distantFuture = pgtype.Timestamptz{Valid: true, InfinityModifier: pgtype.Infinity}
)

func finite(at time.Time) pgtype.Timestamptz { return pgtype.Timestamptz{Valid: true, Time: at.UTC()} }

// madeAt tells when an id was made that is a ULID, or ends with one, or is a UUID of
// version 7.
func madeAt(id string) (at time.Time, ok bool) {
	if _, at, ok = ulid(id); !ok {
		at, ok = uuidv7(id)
	}
	return at, ok && at.Year() >= 2000 && at.Year() < 2200 // else it only looks like one
}

// uuidv7 reads the milliseconds at the beginning of a UUID as Postgres prints it.
// Source: RFC 9562, section 5.7.
func uuidv7(id string) (at time.Time, ok bool) {
	const length, version = 36, 14
	if len(id) != length || id[8] != '-' || id[version] != '7' {
		return at, false
	}
	ms, err := strconv.ParseInt(id[:8]+id[9:13], 16, 64)
	return time.UnixMilli(ms), err == nil
}
