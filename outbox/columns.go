package outbox

import (
	"cmp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"outbox-relay/outbox/event"
)

// remedy says what to do about columns that the table lacks.
func remedy(c event.Columns, missing []string) string {
	for usual, name := range c.Names {
		if slices.Contains(missing, name) {
			return "correct OUTBOX_COLUMN_" + strings.ToUpper(usual)
		}
	}
	for _, name := range c.Extra {
		if slices.Contains(missing, name) {
			return "add it, or leave it out of OUTBOX_SUBJECT"
		}
	}
	if c.Names != nil {
		return "run `outbox-relay migrate`, which adds it"
	}
	return "add it, or give it its name back"
}

// column is the table's own name of a column, quoted for SQL.
func (t Table) column(usual string) string { return pgx.Identifier{t.Columns.Name(usual)}.Sanitize() }

// id is the id of a row of the table, as text: whatever its type is, it is the
// text that pgoutput sends. Where the type is none of text, migrate has made an
// index on this very expression.
func (t Table) id(row string) string { return row + "." + t.column("id") + "::text" }

// order is what the rows e are in order by: the id as its own type has it. Its text
// would have 10 before 9, and a collation of its own before the column's.
func (t Table) order() string { return "e." + t.column("id") }

// ordered is the expression of an id's text as a value whose order is that of the rows.
func (t Table) ordered(text string) string {
	return "(" + text + "::" + cmp.Or(t.Columns.ID, "text") + ")"
}

// value is a column as pgoutput sends it, given the settings that the session is
// pinned to; but bytea as its bytes.
func (t Table) value(row string, field event.Field) string {
	column := row + "." + pgx.Identifier{field.Name}.Sanitize()
	if field.Usual == "payload" && t.Columns.Bytea() {
		return column
	}
	return column + "::text"
}
