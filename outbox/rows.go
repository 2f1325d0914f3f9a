package outbox

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Row is a row as it stands in the table: what is published from there, and not
// from WAL.
type Row struct {
	Event    Event // in memory of its own, without a position
	Attempts int   // retried_attempts
}

// Pending reports whether the row waits to be published.
func (r *Row) Pending() bool { return string(r.Event.Status) == "pending" }

// Rows reads the rows with these ids. An id that is not in the result has none.
func (t Table) Rows(ctx context.Context, conn *pgx.Conn, layout Layout, ids []string) (map[string]*Row, error) {
	byID := make(map[string]*Row, len(ids))
	err := t.lookUp(ctx, conn, ids, t.rowColumns(layout), func(r pgx.CollectableRow) (string, error) {
		row, err := t.scanRow(r)
		if err == nil {
			byID[string(row.Event.ID)] = row
		}
		return string(row.Event.ID), err
	})
	if err != nil {
		return nil, fmt.Errorf("read rows of %s: %w", t, err)
	}
	return byID, nil
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
	for _, field := range t.Columns.Fields(&Event{}) {
		if layout.Columns[field.Name] {
			list = append(list, t.value("e", field))
		} else {
			list = append(list, "null::text")
		}
	}
	return strings.Join(list, ", ")
}
