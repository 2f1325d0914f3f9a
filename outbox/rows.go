package outbox

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"outbox-relay/outbox/event"
)

// Row is a row as it stands in the table: what is published from there, and not
// from WAL.
type Row struct {
	Event    event.Event // in memory of its own, without a position
	Attempts int         // retried_attempts
	// Unprintable is why Postgres can't send the row, of whose event then only id and
	// status are known; empty: it can.
	Unprintable string
}

// Pending reports whether the row waits to be published.
func (r *Row) Pending() bool { return string(r.Event.Status) == "pending" }

// RowState is what tells whether a row that was asked for is still to be published.
type RowState struct {
	Pending  bool
	Attempts int // retried_attempts
}

// RowStates reads the states of the rows with these ids. An id that is not in the result
// has no row.
func (t Table) RowStates(ctx context.Context, conn *pgx.Conn, ids []string) (map[string]RowState, error) {
	states := make(map[string]RowState, len(ids))
	err := t.lookUp(ctx, conn, ids, t.id("e")+" as id, e.status = 'pending', e.retried_attempts", func(r pgx.CollectableRow) (id string, err error) {
		var state RowState
		err = r.Scan(&id, &state.Pending, &state.Attempts)
		states[id] = state
		return id, err
	})
	if err != nil {
		return nil, fmt.Errorf("read rows of %s: %w", t, err)
	}
	return states, nil
}

// Rows reads the rows with these ids, which are few. An id that is not in the result has none.
func (t Table) Rows(ctx context.Context, conn *pgx.Conn, layout Layout, ids []string) (map[string]*Row, error) {
	byID := make(map[string]*Row, len(ids))
	if len(ids) == 0 {
		return byID, nil
	}
	err := t.lookUp(ctx, conn, ids, t.rowColumns(layout), func(r pgx.CollectableRow) (string, error) {
		row, err := t.scanRow(r)
		if err == nil {
			byID[string(row.Event.ID)] = row
		}
		return string(row.Event.ID), err
	})
	switch {
	case Unprintable(err):
		return t.rowsApart(ctx, conn, layout, ids, err)
	case err != nil:
		return nil, fmt.Errorf("read rows of %s: %w", t, err)
	}
	return byID, nil
}

// FirstRows reads the rows of the first of these ids, until they have so many bytes or
// a row more; where some are not in the partition that their id tells, so many of these
// besides. It returns of how many ids that are; those that have no row are gone.
func (t Table) FirstRows(ctx context.Context, conn *pgx.Conn, layout Layout, ids []string, limit int) (byID map[string]*Row, n int, err error) {
	byID = map[string]*Row{}
	bytes := limit
	for step := firstStep; n < len(ids) && bytes > 0; { // what is read beyond the bytes is thrown away
		some := ids[n:min(n+step, len(ids))]
		taken, size, err := t.rowsInOrder(ctx, conn, layout, some, bytes, byID)
		switch {
		case Unprintable(err) && len(some) > 1: // smaller steps lead to the row that can't be printed
			step = len(some) / 2
			continue
		case Unprintable(err):
			taken, size = 1, 0
			apart, alone := t.rowsApart(ctx, conn, layout, some, err)
			maps.Copy(byID, apart)
			err = alone
		}
		if err != nil {
			return nil, 0, fmt.Errorf("read rows of %s: %w", t, err)
		}
		n, bytes, step = n+taken, bytes-size, 2*step
	}
	if !t.ByTime || len(byID) == n {
		return byID, n, nil
	}
	missing := slices.DeleteFunc(slices.Clone(ids[:n]), func(id string) bool { return byID[id] != nil })
	astray, found, err := t.anywhere().FirstRows(ctx, conn, layout, missing, limit)
	maps.Copy(byID, astray)
	if found < len(missing) {
		n = slices.Index(ids, missing[found])
	}
	return byID, n, err
}

// firstStep is how many rows are read at first, when nothing is known of their size.
const firstStep = 16

// rowsInOrder adds rows of the first of these ids, until they have so many bytes, and
// returns of how many ids, and their size. A nested loop goes through the list in its
// order: an id that is left out has no row.
func (t Table) rowsInOrder(ctx context.Context, conn *pgx.Conn, layout Layout, ids []string, bytes int, byID map[string]*Row) (n, size int, err error) {
	l := t.newList(pgx.NamedArgs{}, "listed", ids)
	rows, err := conn.Query(ctx, `select r.* from `+l.unnested()+`, lateral (`+l.found(t.rowColumns(layout))+`) as r`, l.args)
	if err != nil {
		return 0, 0, err
	}
	defer rows.Close()
	for size < bytes && rows.Next() {
		row, err := t.scanRow(rows)
		if err != nil {
			return 0, 0, err
		}
		id := string(row.Event.ID)
		at := slices.Index(ids[n:], id)
		if at < 0 {
			return 0, 0, fmt.Errorf("row %s is out of order", id)
		}
		byID[id] = row
		n, size = n+at+1, size+row.Event.Size()
	}
	if size < bytes {
		n = len(ids)
	}
	return n, size, rows.Err()
}

// Failed reports whether the row has failed, or is gone and known to have.
func (t Table) Failed(ctx context.Context, conn *pgx.Conn, id string) (failed bool, err error) {
	err = conn.QueryRow(ctx, `select exists (select from `+t.String()+` e where `+t.id("e")+` = $1 and status = 'failed')
		or exists (select from `+t.leftovers()+` where slot = $2 and id = $1 and outcome = 'failed')`, id, t.Slot).Scan(&failed)
	if err != nil {
		return false, fmt.Errorf("read the status of event %s: %w", id, err)
	}
	return failed, nil
}

// rowColumns are the columns of a row e that scanRow takes.
func (t Table) rowColumns(layout Layout) string { return "e.retried_attempts, " + t.values(layout) }

func (t Table) scanRow(r pgx.CollectableRow) (*Row, error) {
	row := &Row{}
	dest := []any{&row.Attempts}
	for _, field := range t.Columns.Fields(&row.Event) {
		dest = append(dest, field.Value)
	}
	return row, r.Scan(dest...)
}

// values lists the event's columns in the order of Columns.Fields. Those that the
// table lacks are NULL.
func (t Table) values(layout Layout) string {
	var list []string
	for _, field := range t.Columns.Fields(&event.Event{}) {
		if layout.Columns[field.Name] {
			list = append(list, t.value("e", field))
		} else {
			list = append(list, "null::text")
		}
	}
	return strings.Join(list, ", ")
}
