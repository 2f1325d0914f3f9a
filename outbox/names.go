package outbox

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/fault"
	"outbox-relay/outbox/event"
)

// Names without double quotes fold to lower case, in the relay's variables as in SQL. What
// follows finds the name that was meant, and says how it is written.

// Absent says that the table is not there, or how its name is written.
func (t Table) Absent(ctx context.Context, conn *pgx.Conn) error {
	var other string
	err := conn.QueryRow(ctx, `select coalesce(min(pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname)), '')
		from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
		where pg_catalog.lower(n.nspname) = pg_catalog.lower($1) and pg_catalog.lower(c.relname) = pg_catalog.lower($2) and c.relkind in ('r', 'p')`,
		t.Schema, t.Name).Scan(&other)
	f := &fault.Error{What: fmt.Sprintf("table %s does not exist (OUTBOX_TABLE)", t)}
	switch {
	case err != nil:
		return fmt.Errorf("look for table %s: %w", t, err)
	case other != "":
		f.Remedy = "write OUTBOX_TABLE='" + other + "': a name without double quotes folds to lower case"
	default:
		f.Remedy, f.Shell = "create it with `outbox-relay migrate`", "outbox-relay migrate"
	}
	return f
}

// otherCase returns the column that differs from name by its case only; empty: none does.
func (l Layout) otherCase(name string) string {
	for column := range l.Columns {
		if column != name && strings.EqualFold(column, name) {
			return column
		}
	}
	return ""
}

// rewrite says how the name of one of the missing columns is written; empty: none of them is
// there in another case.
func rewrite(c event.Columns, missing []string, l Layout) string {
	for _, field := range c.Fields(&event.Event{}) {
		other := l.otherCase(field.Name)
		switch {
		case other == "" || !slices.Contains(missing, field.Name) || field.Usual == "status" || field.Usual == "version":
		case field.Usual == "":
			return "write {" + other + "} in OUTBOX_SUBJECT"
		default:
			return "write OUTBOX_COLUMN_" + strings.ToUpper(field.Usual) + "='" + pgx.Identifier{other}.Sanitize() + "': a name without double quotes folds to lower case"
		}
	}
	return ""
}

// CheckBefore refuses what `migrate` can't put right, before it changes anything. A table that
// it will make has no fault.
func (t Table) CheckBefore(ctx context.Context, conn *pgx.Conn) error {
	l, c, err := t.readColumns(ctx, conn)
	switch {
	case err != nil:
		return err
	case len(l.Columns) == 0 && t.Columns.Names == nil:
		return nil
	case len(l.Columns) == 0:
		return t.Absent(ctx, conn)
	}
	missing := l.Lacks(t.Columns.Required())
	if remedy := rewrite(t.Columns, missing, l); remedy != "" {
		return &fault.Error{What: fmt.Sprintf("table %s has no column %s", t, strings.Join(missing, ", ")), Remedy: remedy}
	}
	return cmp.Or(t.checkGenerated(c), t.checkPadding(c))
}

// checkGenerated refuses a column that the message takes and that logical decoding does not
// send: virtual ones never, stored ones from 18 on, where the publication lists them.
// Source: https://www.postgresql.org/docs/18/logical-replication-gencols.html
func (t Table) checkGenerated(c catalog) error {
	for _, field := range t.Columns.Fields(&event.Event{}) {
		if !c.unsent[field.Name] {
			continue
		}
		f := &fault.Error{What: fmt.Sprintf("column %s of table %s is generated, which logical decoding does not send", pgx.Identifier{field.Name}.Sanitize(), t),
			Remedy: "make it an ordinary column, which the application or a trigger fills"}
		if field.Usual == "" {
			f.Remedy = "leave it out of OUTBOX_SUBJECT, or " + f.Remedy
		}
		return f
	}
	return nil
}

// checkPadding refuses an id that Postgres pads: its text, and what it equals, are not what
// pgoutput sends.
func (t Table) checkPadding(c catalog) error {
	name := t.Columns.Name("id")
	if c.types[name] != "character" {
		return nil
	}
	sql := "ALTER TABLE " + t.String() + " ALTER COLUMN " + pgx.Identifier{name}.Sanitize() + " TYPE text"
	return &fault.Error{What: fmt.Sprintf("column %s of table %s is of type character, which Postgres pads", pgx.Identifier{name}.Sanitize(), t),
		Remedy: sql + ", which rewrites the table", SQL: sql}
}
