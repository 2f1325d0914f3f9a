package event

import (
	"slices"

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
func (c Columns) Required() []string { return c.list(true) }

// Optional names the columns that a table may lack.
func (c Columns) Optional() []string { return c.list(false) }

func (c Columns) list(required bool) []string {
	var names []string
	for _, field := range c.Fields(&Event{}) {
		if field.Required == required {
			names = append(names, field.Name)
		}
	}
	return names
}

// Unknown returns those of the columns that no event has.
func (c Columns) Unknown(columns []string) []string {
	known := append(c.Required(), c.Optional()...)
	return slices.DeleteFunc(slices.Clone(columns), func(name string) bool { return slices.Contains(known, name) })
}

// Bytea reports whether the payload is bytes, and not text.
func (c Columns) Bytea() bool { return c.Payload == "bytea" }
