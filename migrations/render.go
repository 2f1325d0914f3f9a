// Package migrations makes the outbox: the user's table events with its trigger,
// and what the relay adds to it. The files are SQL, go only up, can be run twice,
// and by psql alone.
package migrations

import (
	"cmp"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
)

//go:embed *.sql partitioned/*.sql adopted/*.sql
var files embed.FS

// listStart is where 002 begins to list the columns to be published, at its end.
const listStart = "select outbox_relay_publish('outbox_relay', 'events', array["

const (
	definitionFile  = "001_events.sql"
	definitionStart = "create or replace function on_events_create()" // up to the file's end
	partitionedFile = "partitioned/events.sql"                        // in its place
	adoptedFile     = "adopted/events.sql"                            // in the place of the whole file
)

// What the files call things. Render gives them other names.
const (
	schemaName      = "public"
	tableName       = "events"
	functionName    = "on_events_create" // and its trigger
	ulidName        = "gen_random_ulid"
	publicationName = "outbox_relay"
	retryName       = "outbox_retry"
	retryAllName    = "outbox_retry_all"
)

// derivedNames are of the table's constraints, index and default partition; its
// name is their prefix.
var derivedNames = []string{
	"events_id_primary_key",
	"events_id_version_unique",
	"events_id_check",
	"events_version_check",
	"events_aggregate_type_check",
	"events_event_type_check",
	"events_status_check",
	"events_failed_at_index",
	"events_default",
	"events_id_text_index",
}

// messageColumns are what every message needs of a row, and essentialColumns those
// that migrate adds to no table.
var (
	messageColumns = []string{
		"id", "version", "aggregate_type", "aggregate_id", "event_type", "payload", "headers", "status", "created_at",
	}
	essentialColumns = []string{"id", "aggregate_type", "event_type", "payload"}
)

// maxName is Postgres' limit in bytes; what is longer it would cut.
const maxName = 63

// maxTable leaves room for the longest name derived from the table's.
var maxTable = maxName - len("_aggregate_type_check")

// Target is an outbox. Its names are as the catalogs have them: unquoted and in
// their own case.
type Target struct {
	Schema      string
	Table       string // at most 42 bytes, since constraints are named after it
	Publication string
	Columns     []string // what messages need beyond the usual columns; they have to exist
	Partitioned bool     // where the table is not there yet, make it partitioned by range of created_at
	// Names are the table's own names of columns, by their usual ones. Not nil: the
	// table is the application's, which makes it and gives the ids.
	Names map[string]string
}

// String is the table's name for people.
func (t Target) String() string { return display(t.Schema) + "." + display(t.Table) }

// qualified is the table's name for SQL.
func (t Target) qualified() string { return quote(t.Schema) + "." + quote(t.Table) }

// RetryFunction returns the name, unquoted, of the function in the table's schema
// that takes ids (variadic text[]) and has those rows published again that have
// failed. It returns how many as a bigint.
func RetryFunction(table string) string { return ofTable(retryName, table) }

// RetryAllFunction returns the name of the one that takes nothing, and all that
// the relay has parked.
func RetryAllFunction(table string) string { return ofTable(retryAllName, table) }

// ofTable makes a function's name one that other outboxes in the schema have not.
func ofTable(function, table string) string {
	if table == tableName {
		return function
	}
	return function + "_" + table
}

// File is a piece of SQL that can be run by psql alone.
type File struct {
	Name string
	SQL  string
}

// Render returns the migrations for t, in the order in which they have to be run.
// For public.events, published as outbox_relay and not partitioned, they are the
// embedded files to the byte. Where t has further columns, a last file adds them to the
// publication. A fault in t's names is the only error.
func Render(t Target) ([]File, error) {
	if err := t.check(); err != nil {
		return nil, err
	}
	rendered, err := t.numbered()
	if err != nil {
		return nil, err
	}
	if len(t.Columns) > 0 {
		rendered = append(rendered, File{
			Name: "columns.sql",
			SQL:  "-- The further columns that the message needs.\n\n" + t.setPath() + t.publish() + ";\n",
		})
	}
	return rendered, nil
}

// numbered returns the files that goose applies once.
func (t Target) numbered() ([]File, error) {
	names, err := fs.Glob(files, "*.sql") // sorted
	if err != nil {
		return nil, err
	}
	var rendered []File
	for _, name := range names {
		sql, err := t.source(name)
		if err != nil {
			return nil, err
		}
		rendered = append(rendered, File{Name: name, SQL: t.rewrite(sql)})
	}
	return rendered, nil
}

// source returns the file with the definition of the table that t asks for.
func (t Target) source(name string) (string, error) {
	if name == definitionFile && t.Names != nil {
		return t.adoption()
	}
	sql, err := files.ReadFile(name)
	if err != nil || name != definitionFile || !t.Partitioned {
		return string(sql), err
	}
	partitioned, err := files.ReadFile(partitionedFile)
	before, _, _ := strings.Cut(string(sql), definitionStart)
	return before + string(partitioned), err
}

// adoption returns the file for a table that is the application's own: all that
// it has to have is told to it by the variable that names it.
func (t Target) adoption() (string, error) {
	sql, err := files.ReadFile(adoptedFile)
	var needed []string
	for _, usual := range messageColumns {
		if t.Names[usual] != "" || slices.Contains(essentialColumns, usual) {
			needed = append(needed, fmt.Sprintf("(%s, %s)", literal("OUTBOX_COLUMN_"+strings.ToUpper(usual)), literal(t.name(usual))))
		}
	}
	fill := strings.NewReplacer("<needed>", strings.Join(needed, ", "), "<id>", literal(t.name("id")))
	return fill.Replace(string(sql)), err
}

// name is the table's own name of a column.
func (t Target) name(usual string) string {
	if name := t.Names[usual]; name != "" {
		return name
	}
	return usual
}

func (t Target) rewrite(sql string) string {
	if t.Schema == schemaName && t.Table == tableName && t.Publication == publicationName && t.Names == nil {
		return sql
	}
	before, _, listed := strings.Cut(sql, listStart) // what follows are columns; elsewhere such literals are not
	if listed {
		before += listStart
	}
	sql = rename(before, t.identifiers(), t.literals())
	if listed {
		sql += "\n    " + t.columns(messageColumns) + "]);\n-- +goose StatementEnd\n"
	}
	const up = "-- +goose Up\n"
	return strings.Replace(sql, up, up+"\n-- +goose StatementBegin\n"+t.setPath()+"-- +goose StatementEnd\n", 1)
}

// identifiers maps each identifier of the files to SQL.
func (t Target) identifiers() map[string]string {
	m := map[string]string{publicationName: quote(t.Publication)}
	for usual, name := range t.Names {
		if usual == "id" { // other tables have one, too
			m[tableName+".id"] = quote(t.Table) + "." + quote(name)
		} else {
			m[usual] = quote(name)
		}
	}
	if t.Table != tableName {
		m[tableName] = quote(t.Table)
		m[functionName] = quote("on_" + t.Table + "_create")
		m[retryName] = quote(RetryFunction(t.Table))
		m[retryAllName] = quote(RetryAllFunction(t.Table))
		for _, name := range derivedNames {
			m[name] = quote(t.Table + strings.TrimPrefix(name, tableName))
		}
	}
	if t.Schema != schemaName {
		// The trigger function calls it, whatever search_path the inserting
		// session has. A SET clause of that function would do too, at a cost
		// for every insert.
		m[ulidName] = quote(t.Schema) + "." + ulidName
	}
	return m
}

// literals maps the content of whole string literals.
func (t Target) literals() map[string]string {
	return map[string]string{
		tableName:       quote(t.Table), // a regclass
		publicationName: t.Publication,  // a name
	}
}

// setPath has pg_catalog in front implicitly.
func (t Target) setPath() string { return "set search_path to " + quote(t.Schema) + ";\n" }

// publish makes the publication publish all columns that the message needs. It
// is what 002 ends with.
func (t Target) publish() string {
	return fmt.Sprintf("select outbox_relay_publish(%s, %s, array[\n    %s])",
		literal(t.Publication), literal(t.qualified()), t.columns(slices.Concat(messageColumns, t.Columns)))
}

// columns lists the table's own names of columns as literals.
func (t Target) columns(usual []string) string {
	var list []string
	for _, c := range usual {
		if c = literal(t.name(c)); !slices.Contains(list, c) {
			list = append(list, c)
		}
	}
	return strings.Join(list, ", ")
}

func (t Target) check() error {
	errs := []error{
		checkName("schema", t.Schema, maxName),
		checkName("table", t.Table, maxTable),
		checkName("publication", t.Publication, maxName),
	}
	for _, c := range t.Columns {
		errs = append(errs, checkName("column", c, maxName))
	}
	for usual, c := range t.Names {
		errs = append(errs, checkName("column "+usual, c, maxName))
	}
	if t.Names != nil && t.Partitioned {
		errs = append(errs, errors.New("OUTBOX_COLUMN_ variables are set, so the application makes the table: leave out --partitioned"))
	}
	return errors.Join(errs...)
}

// dollarQuote would end a function's body.
var dollarQuote = regexp.MustCompile(`\$[\pL_0-9]*\$`)

func checkName(kind, name string, limit int) error {
	switch {
	case name == "":
		return fmt.Errorf("the %s's name is empty", kind)
	case len(name) > limit:
		return fmt.Errorf("the %s's name %q has %d bytes: at most %d, so that Postgres cuts no name made from it", kind, name, len(name), limit)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl):
		return fmt.Errorf("the %s's name %q is not UTF-8 without control characters", kind, name)
	case dollarQuote.MatchString(name):
		return fmt.Errorf("the %s's name %q reads like a dollar quote: choose one without two $", kind, name)
	}
	return nil
}

// token is what matters in SQL: a comment, a quoted identifier, a string literal
// or a word, or a column of the outbox that is written events.column. Comments are
// passed over, and dollar quotes: what is in a function's body is read like the
// rest. A dollar quote's tag is a word.
var token = regexp.MustCompile(`--[^\n]*|"[^"]*"|'(?:[^']|'')*'|\bevents\.[a-z_]+|[A-Za-z_][A-Za-z0-9_]*`)

// rename replaces whole identifiers, and string literals by their whole content.
func rename(sql string, identifiers, literals map[string]string) string {
	return token.ReplaceAllStringFunc(sql, func(s string) string {
		if s[0] == '\'' {
			if to, ok := literals[s[1:len(s)-1]]; ok {
				return literal(to)
			}
		} else if to, ok := identifiers[s]; ok {
			return to
		} else if table, column, ok := strings.Cut(s, "."); ok && s[0] != '"' && s[0] != '-' {
			return cmp.Or(identifiers[table], table) + "." + cmp.Or(identifiers[column], column)
		}
		return s
	})
}

func quote(name string) string { return pgx.Identifier{name}.Sanitize() }

// literal has an E in front where a backslash needs it, as quote_literal has.
func literal(s string) string {
	q := "'" + strings.ReplaceAll(s, "'", "''") + "'"
	if strings.Contains(q, `\`) {
		return "E" + strings.ReplaceAll(q, `\`, `\\`)
	}
	return q
}

var plain = regexp.MustCompile(`^[a-z_][a-z0-9_$]*$`)

func display(name string) string {
	if plain.MatchString(name) {
		return name
	}
	return quote(name)
}
