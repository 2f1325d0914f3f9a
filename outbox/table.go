package outbox

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/internal/fault"
)

// Mode is what happens to a row once its event is in the stream.
type Mode string

const (
	Mark   Mode = "mark"   // status becomes published
	Delete Mode = "delete" // the row goes
	Keep   Mode = "keep"   // the row stays as it is
)

// Table is the outbox table, its publication and how its rows are recorded. It
// is a value without a connection: each method names the one that it uses.
type Table struct {
	Schema, Name string
	Publication  string
	Slot         string // whose leftovers are meant
	Mode         Mode
	Columns      Columns
}

// String returns the name quoted for SQL.
func (t Table) String() string { return pgx.Identifier{t.Schema, t.Name}.Sanitize() }

func (t Table) leftovers() string {
	return pgx.Identifier{t.Schema, "outbox_relay_leftovers"}.Sanitize()
}

func (t Table) function(name string) string { return pgx.Identifier{t.Schema, name}.Sanitize() }

// Layout is what the catalog says of the table when the relay starts.
type Layout struct {
	OID     uint32
	Columns map[string]bool // all that the table has
}

// Inspect reads the layout and checks that the relay can work with the table;
// each fault is an error that says what to do.
func (t Table) Inspect(ctx context.Context, conn *pgx.Conn) (Layout, error) {
	l, err := t.ReadLayout(ctx, conn)
	if err == nil {
		err = t.CheckOwnTables(ctx, conn)
	}
	if err == nil {
		err = t.CheckPartitionKey(ctx, conn)
	}
	return l, err
}

// ReadLayout reads the layout; a table that is not there, or lacks a column, is an
// error that says what to do.
func (t Table) ReadLayout(ctx context.Context, conn *pgx.Conn) (Layout, error) {
	l := Layout{Columns: map[string]bool{}}
	rows, err := conn.Query(ctx, `select a.attrelid, a.attname
		from pg_catalog.pg_attribute a
		where a.attrelid = pg_catalog.to_regclass($1) and a.attnum > 0 and not a.attisdropped`, t.String())
	if err != nil {
		return l, fmt.Errorf("read the columns of %s: %w", t, err)
	}
	var column string
	_, err = pgx.ForEachRow(rows, []any{&l.OID, &column}, func() error {
		l.Columns[column] = true
		return nil
	})
	switch {
	case err != nil:
		return l, fmt.Errorf("read the columns of %s: %w", t, err)
	case len(l.Columns) == 0:
		return l, &fault.Error{What: fmt.Sprintf("table %s does not exist (OUTBOX_TABLE)", t),
			Remedy: "create it with `outbox-relay migrate`", Shell: "outbox-relay migrate"}
	}
	if missing := l.Lacks(t.Columns.Required()); len(missing) > 0 {
		return l, &fault.Error{What: fmt.Sprintf("table %s has no column %s", t, strings.Join(missing, ", ")), Remedy: t.Columns.remedy(missing), SQL: t.addColumns(missing)}
	}
	return l, nil
}

// CheckPartitionKey refuses a table that recording an outcome would move rows
// about in.
func (t Table) CheckPartitionKey(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, `select `+t.function("outbox_relay_check_partition_key")+`(pg_catalog.to_regclass($1))`, t.String())
	var pgErr *pgconn.PgError
	switch {
	case errors.As(err, &pgErr) && pgErr.Code == "55000": // object not in prerequisite state
		return &fault.Error{What: pgErr.Message, Remedy: pgErr.Hint}
	case err != nil:
		return fmt.Errorf("read how %s is partitioned: %w", t, err)
	}
	return nil
}

// columnTypes are those of migrate.
var columnTypes = map[string]string{"id": "text", "version": "int", "aggregate_type": "text", "event_type": "text",
	"payload": "jsonb", "status": "text", "created_at": "timestamptz"}

// addColumns adds columns that the table lacks, where their type is known; rows
// that are there already have none of them.
func (t Table) addColumns(missing []string) string {
	var add []string
	for _, name := range missing {
		if columnTypes[name] == "" {
			return ""
		}
		add = append(add, "ADD COLUMN "+name+" "+columnTypes[name])
	}
	return "ALTER TABLE " + t.String() + " " + strings.Join(add, ", ")
}

// remedy says what to do about columns that the table lacks.
func (c Columns) remedy(missing []string) string {
	for _, name := range c.Extra {
		if slices.Contains(missing, name) {
			return "add it, or leave it out of OUTBOX_SUBJECT"
		}
	}
	return "add it, or give it its name back"
}

// Lacks returns those of the names that the table has not.
func (l Layout) Lacks(names []string) []string {
	var missing []string
	for _, name := range names {
		if !l.Columns[name] {
			missing = append(missing, name)
		}
	}
	return missing
}

// Required names the columns without which a row is no event.
func (c Columns) Required() []string { return c.names(true) }

// names lists the columns that are required, or those that may be missing.
func (c Columns) names(required bool) []string {
	var names []string
	for _, field := range c.Fields(&Event{}) {
		if field.Required == required {
			names = append(names, field.Name)
		}
	}
	return names
}

// strange returns those of the columns that no event has.
func (c Columns) strange(columns []string) []string {
	known := append(c.names(true), c.names(false)...)
	return slices.DeleteFunc(slices.Clone(columns), func(name string) bool { return slices.Contains(known, name) })
}

// CheckOwnTables makes sure that what migrate makes for the relay itself is there.
func (t Table) CheckOwnTables(ctx context.Context, conn *pgx.Conn) error {
	for _, name := range []string{"outbox_relay_checkpoints", "outbox_relay_history", "outbox_relay_leftovers", "outbox_relay_batches"} {
		var there bool
		own := pgx.Identifier{t.Schema, name}.Sanitize()
		if err := conn.QueryRow(ctx, `select pg_catalog.to_regclass($1) is not null`, own).Scan(&there); err != nil {
			return fmt.Errorf("look for table %s: %w", own, err)
		}
		if !there {
			return &fault.Error{What: fmt.Sprintf("table %s does not exist", own), Remedy: "run `outbox-relay migrate`", Shell: "outbox-relay migrate"}
		}
	}
	return nil
}

// ErrNoRow says that the event's row is gone.
var ErrNoRow = errors.New("the row is gone")

// Fill reads the named columns of the event's row, which its Relation did not
// list since it was written before the publication was extended. The values are
// new memory. ErrNoRow if the application has deleted the row.
func (t Table) Fill(ctx context.Context, conn *pgx.Conn, e *Event, names []string) error {
	var list []string
	var dest []any
	for _, field := range t.Columns.Fields(e) {
		for _, name := range names {
			if field.Name == name {
				list = append(list, pgx.Identifier{name}.Sanitize()+"::text")
				dest = append(dest, field.Value)
			}
		}
	}
	texts := make([]*string, len(dest))
	into := make([]any, len(dest))
	for i := range texts {
		into[i] = &texts[i]
	}
	err := conn.QueryRow(ctx, `select `+strings.Join(list, ", ")+` from `+t.String()+` where id = $1`,
		string(e.ID)).Scan(into...)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return ErrNoRow
	case err != nil:
		return fmt.Errorf("read %s of event %s: %w", strings.Join(names, ", "), e.ID, err)
	}
	for i, text := range texts {
		if text != nil {
			*dest[i].(*[]byte) = []byte(*text)
		}
	}
	return nil
}

// HasPending reports whether any row waits to be published.
func (t Table) HasPending(ctx context.Context, conn *pgx.Conn) (bool, error) {
	var pending bool
	err := conn.QueryRow(ctx, `select exists (select from `+t.String()+` where status = 'pending')`).Scan(&pending)
	if err != nil {
		return false, fmt.Errorf("look for pending rows: %w", err)
	}
	return pending, nil
}
