package migrations_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	. "outbox-relay/migrations" // testenv, which other tests here use, imports it
)

var usual = Target{Schema: "public", Table: "events", Publication: "outbox_relay"}

// odd has what breaks a careless rewrite: case, spaces, quotes, a semicolon, a
// comment, a backslash, a format directive.
var odd = Target{Schema: `Odd "Shop";`, Table: `or'der -- Ev%s\1 "x"`, Publication: `pub 'of' "it"; --\`}

func render(t *testing.T, target Target) []File {
	t.Helper()
	rendered, err := Render(target)
	if err != nil {
		t.Fatal(err)
	}
	return rendered
}

func TestRenderUsualIsTheFilesToTheByte(t *testing.T) {
	rendered := render(t, usual)
	if shipped, err := filepath.Glob("*.sql"); err != nil || len(rendered) != len(shipped) {
		t.Fatalf("%d files, want %q (%v)", len(rendered), shipped, err)
	}
	for _, f := range rendered {
		want, err := os.ReadFile(f.Name)
		if err != nil {
			t.Fatal(err)
		}
		if f.SQL != string(want) {
			t.Errorf("%s differs from the embedded file", f.Name)
		}
	}
}

func TestDefinitionIsTheUsersToTheLetter(t *testing.T) {
	definition, err := os.ReadFile("testdata/definition.sql")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(render(t, usual)[0].SQL, string(definition)) {
		t.Error("001 does not hold testdata/definition.sql to the letter")
	}
}

func TestRenderRenames(t *testing.T) {
	var all strings.Builder
	for _, f := range render(t, Target{Schema: "shop", Table: "order_events", Publication: "orders"}) {
		all.WriteString(f.SQL)
	}
	sql := all.String()
	for _, want := range []string{
		`set search_path to "shop";`,
		`create table if not exists "order_events"`,
		`create or replace function "on_order_events_create"() returns trigger`,
		`create or replace trigger "on_order_events_create" before insert on "order_events"`,
		`for each row execute function "on_order_events_create"();`,
		`constraint "order_events_id_primary_key" primary key (id)`,
		`constraint "order_events_aggregate_type_check" check`,
		`new.id = 'event_' || "shop".gen_random_ulid(); -- gen_random_uuid() or gen_random_ulid()`,
		`create or replace function "shop".gen_random_ulid()`,
		`select outbox_relay_publish('orders', '"order_events"', array[`,
		`create table if not exists outbox_relay_checkpoints`,
		`comment on column "order_events".headers`,
		`create index if not exists "order_events_failed_at_index" on "order_events" (failed_at)`,
		`create or replace function "outbox_retry_order_events"(variadic ids text[])`,
		`create or replace function "outbox_retry_all_order_events"()`,
		`select "outbox_retry_order_events"(variadic array(select "order_events".id::text from "order_events"`,
		`'outbox_relay:' || '"order_events"'::regclass::oid`,
	} {
		if !strings.Contains(sql, want) {
			t.Errorf("lacks %s", want)
		}
	}
	code := regexp.MustCompile(`--[^\n]*|'(?:[^']|'')*'`).ReplaceAllString(sql, "")
	if left := regexp.MustCompile(`\b(on_)?events\w*|\boutbox_relay\b|\boutbox_retry(_all)?\b`).FindAllString(code, -1); left != nil {
		t.Errorf("old names are left: %q", left)
	}
}

// The application's own outbox: no trigger, no table, and its own names everywhere;
// an id that is not of the outbox keeps its name.
func TestRenderAdopts(t *testing.T) {
	own := Target{Schema: "shop", Table: "outbox", Publication: "orders", Names: map[string]string{
		"id": "event's id", "aggregate_type": "aggregatetype", "event_type": "type", "headers": "meta"}}
	var all strings.Builder
	for _, f := range render(t, own) {
		all.WriteString(f.SQL)
	}
	for _, want := range []string{
		`values ('OUTBOX_COLUMN_ID', 'event''s id'), ('OUTBOX_COLUMN_AGGREGATE_TYPE', 'aggregatetype'), ('OUTBOX_COLUMN_EVENT_TYPE', 'type'), ('OUTBOX_COLUMN_PAYLOAD', 'payload'), ('OUTBOX_COLUMN_HEADERS', 'meta'))`,
		`create unique index if not exists "outbox_id_text_index" on "outbox" (("outbox"."event's id"::text))`,
		`a.attname = 'event''s id'`,
		`comment on column "outbox"."meta"`,
		`add column if not exists "meta"      jsonb`,
		"array[\n    'event''s id', 'version', 'aggregatetype', 'aggregate_id', 'type', 'payload', 'meta', 'status', 'created_at']);",
		`select "outbox"."event's id"::text as id`,
		`json_build_object('id', id, 'attempt', attempt)`,
		`primary key (slot, id)`,
	} {
		if !strings.Contains(all.String(), want) {
			t.Errorf("lacks %s", want)
		}
	}
	if left := regexp.MustCompile(`on_\w*_create|create table if not exists "outbox"|<\w+>`).FindAllString(strings.ReplaceAll(all.String(), "<schema>", ""), -1); left != nil {
		t.Errorf("has %q", left)
	}
	own.Partitioned = true
	if _, err := Render(own); err == nil {
		t.Error("a table of the application's is made partitioned")
	}
}

func TestRenameHitsWholeTokensOnly(t *testing.T) {
	identifiers := map[string]string{"events": `"X"`}
	literals := map[string]string{"events": "it's"}
	const in = `events my_events events2 "events" 'events' 'the events' -- events
$events$ events.events 'a''events'`
	const want = `"X" my_events events2 "events" 'it''s' 'the events' -- events
$"X"$ "X"."X" 'a''events'`
	if got := Rename(in, identifiers, literals); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestRenderRefusesNames(t *testing.T) {
	for name, change := range map[string]func(*Target){
		"empty schema":     func(t *Target) { t.Schema = "" },
		"long table":       func(t *Target) { t.Table = strings.Repeat("e", 43) },
		"long publication": func(t *Target) { t.Publication = strings.Repeat("p", 64) },
		"control":          func(t *Target) { t.Table = "a\nb" },
		"not UTF-8":        func(t *Target) { t.Table = "\xff" },
		"dollar quote":     func(t *Target) { t.Schema = "a$do$" },
		"empty column":     func(t *Target) { t.Columns = []string{""} },
	} {
		t.Run(name, func(t *testing.T) {
			target := usual
			change(&target)
			if rendered, err := Render(target); err == nil {
				t.Errorf("got %d files, want an error", len(rendered))
			}
		})
	}
	longest := usual
	longest.Table = strings.Repeat("e", 42)
	render(t, longest)
}
