package outbox

import (
	"cmp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/charset"
)

// Columns says which columns of the table make an event.
type Columns struct {
	// Names are the table's own names of columns, by their usual ones. What is not
	// in it has its usual name.
	Names map[string]string
	Extra []string // beyond the fields of Event: what the subject names
	// Payload is the type of the payload, as format_type has it: Layout says it.
	// Empty: jsonb.
	Payload string
	// ID is the type of the id, with its collation unless that is the database's: what
	// the order of the rows is by. Layout says it. Empty: text.
	ID string
	// Charset is the encoding of the database's text: Layout says it.
	Charset charset.Charset
}

// Field is a column and where its value goes.
type Field struct {
	Usual    string // its name in a table that migrate made; empty for an extra one
	Name     string // in this table
	Value    *[]byte
	Required bool // the table must have it
}

// Fields binds the columns to the event's fields. e.Extra is made if needed.
func (c Columns) Fields(e *Event) []Field {
	if len(e.Extra) != len(c.Extra) {
		e.Extra = make([][]byte, len(c.Extra))
	}
	fields := []Field{
		{"id", "", &e.ID, true},
		{"version", "", &e.Version, true},
		{"aggregate_type", "", &e.AggregateType, true},
		{"aggregate_id", "", &e.AggregateID, false},
		{"event_type", "", &e.EventType, true},
		{"payload", "", &e.Payload, true},
		{"headers", "", &e.Headers, false},
		{"status", "", &e.Status, true},
		{"created_at", "", &e.CreatedAt, true},
	}
	for i := range fields {
		fields[i].Name = c.Name(fields[i].Usual)
	}
	for i, name := range c.Extra {
		fields = append(fields, Field{"", name, &e.Extra[i], true})
	}
	return fields
}

// Name is the table's own name of a column.
func (c Columns) Name(usual string) string {
	if name := c.Names[usual]; name != "" {
		return name
	}
	return usual
}

// Find returns where the value of a column goes that is called by its usual name
// or else by the table's own; nil: no event has it.
func (c Columns) Find(e *Event, name string) *[]byte {
	if name == "" {
		return nil
	}
	fields := c.Fields(e)
	i := slices.IndexFunc(fields, func(f Field) bool { return f.Usual == name })
	if i < 0 {
		i = slices.IndexFunc(fields, func(f Field) bool { return f.Name == name })
	}
	if i < 0 {
		return nil
	}
	return fields[i].Value
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

// remedy says what to do about columns that the table lacks.
func (c Columns) remedy(missing []string) string {
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

// Bytea reports whether the payload is bytes, and not text.
func (c Columns) Bytea() bool { return c.Payload == "bytea" }

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
func (t Table) value(row string, field Field) string {
	column := row + "." + pgx.Identifier{field.Name}.Sanitize()
	if field.Usual == "payload" && t.Columns.Bytea() {
		return column
	}
	return column + "::text"
}
