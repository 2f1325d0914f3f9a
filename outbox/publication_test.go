package outbox_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"outbox-relay/internal/fault"
	"outbox-relay/internal/testenv"
	"outbox-relay/outbox"
	"outbox-relay/outbox/event"
)

// fingerprint is what the relay compares before each confirmation.
func (b *bundle) fingerprint() string {
	b.Helper()
	s, err := b.table.State(b.Context(), b.relay)
	b.must(err)
	return s.Publication
}

// Every change that may have passed inserts over shows in the fingerprint, also
// one that was undone before anybody looked; what passes none over does not.
func TestFingerprint(t *testing.T) {
	t.Parallel()
	const columns = `(id, version, aggregate_type, aggregate_id, event_type, payload, headers, status, created_at)`
	for name, c := range map[string]struct {
		sql  string
		same bool // inserts went on to come
		gone bool // they come no more
	}{
		"table dropped from it":      {sql: "alter publication outbox_relay drop table events", gone: true},
		"dropped and added again":    {sql: "alter publication outbox_relay drop table events; alter publication outbox_relay add table events " + columns},
		"publication dropped":        {sql: "drop publication outbox_relay", gone: true},
		"dropped and made again":     {sql: "drop publication outbox_relay; create publication outbox_relay for table events " + columns + " with (publish = 'insert', publish_via_partition_root)"},
		"table renamed":              {sql: "alter table events rename to old", gone: true},
		"renamed and made again":     {sql: "alter table events rename to old; create table events (like old including all)", gone: true},
		"the new one published":      {sql: "alter table events rename to old; create table events (like old including all); alter publication outbox_relay add table events " + columns},
		"dropped and made":           {sql: "create table copy (like events including all); drop table events; alter table copy rename to events", gone: true},
		"a listed column dropped":    {sql: "alter table events drop column headers cascade", gone: true},
		"inserts stopped for a time": {sql: "alter publication outbox_relay set (publish = 'update'); alter publication outbox_relay set (publish = 'insert')"},
		"renamed publication":        {sql: "alter publication outbox_relay rename to other", gone: true},
		"not via root":               {sql: "alter publication outbox_relay set (publish_via_partition_root = false)"},
		"a row filter":               {sql: "alter publication outbox_relay set table events " + columns + " where (id <> '')"},
		"a column list":              {sql: "alter publication outbox_relay set table events (id)"},

		"nothing":                    {sql: "", same: true},
		"an unlisted column dropped": {sql: "alter table events drop column retried_at cascade", same: true},
		"a column added":             {sql: "alter table events add column tenant text", same: true},
		"another table added":        {sql: "create table other (id int); alter publication outbox_relay add table other", same: true},
		"rows written":               {sql: "insert into events (aggregate_type, event_type, payload) values ('a', 'b', '{}'); truncate events", same: true},
		"the table rewritten":        {sql: "vacuum full events", same: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			before := b.fingerprint()
			if before == "" || b.fingerprint() != before {
				t.Fatalf("the fingerprint is %q", before)
			}
			for sql := range strings.SplitSeq(c.sql, ";") {
				b.exec(sql)
			}
			after := b.fingerprint()
			if (after == before) != c.same || (after == "") != c.gone {
				t.Errorf("the fingerprint was %q and is %q", before, after)
			}
		})
	}
}

// Each state that passes events over is refused, with what to do.
func TestCheckPublication(t *testing.T) {
	t.Parallel()
	const columns = `(id, version, aggregate_type, aggregate_id, event_type, payload, headers, status, created_at)`
	for name, c := range map[string]struct {
		sql  string
		want string // empty: fine
	}{
		"as migrated":                   {"", ""},
		"another table in it":           {"create table other (id int); alter publication outbox_relay add table other", ""},
		"every column":                  {"alter publication outbox_relay set table events", ""},
		"without the two that may miss": {"alter publication outbox_relay set table events (id, version, aggregate_type, event_type, payload, status, created_at)", ""},
		"a further column":              {"alter table events add tenant text; alter publication outbox_relay set table events (" + columns[1:len(columns)-1] + ", tenant)", ""},

		"with one that was renamed": {"alter table events rename column headers to headings", "lists column headings, and not headers"},
		"none":                      {"drop publication outbox_relay", "does not exist"},
		"all tables":                {"drop publication outbox_relay; create publication outbox_relay for all tables with (publish = 'insert')", "all tables"},
		"of a schema":               {"drop publication outbox_relay; create publication outbox_relay for tables in schema public with (publish = 'insert')", "schema"},
		"without inserts":           {"alter publication outbox_relay set (publish = 'truncate')", "does not publish inserts"},
		"with updates":              {"alter publication outbox_relay set (publish = 'insert, update')", "more than inserts"},
		"with truncate":             {"alter publication outbox_relay set (publish = 'insert, truncate')", "more than inserts"},
		"not via root":              {"alter publication outbox_relay set (publish_via_partition_root = false)", "root"},
		"without table":             {"alter publication outbox_relay drop table events", "does not contain"},
		"with a filter":             {"alter publication outbox_relay set table events " + columns + " where (id <> '')", "row filter"},
		"without a needed column":   {"alter publication outbox_relay set table events (id, version, aggregate_type, event_type, status, created_at)", "column payload"},
		"an unlogged partition": {`drop table events;
			create table events (id text, version int, aggregate_type text, event_type text, payload jsonb, status text, created_at timestamptz) partition by list (id);
			create table ours partition of events for values in ('a');
			create unlogged table theirs partition of events default;
			alter publication outbox_relay add table events`, "unlogged"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.exec(c.sql)
			err := b.table.CheckPublication(t.Context(), b.relay)
			var fault *fault.Error
			switch {
			case c.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.want != "" && (!errors.As(err, &fault) || !strings.Contains(fault.What, c.want) || fault.Remedy == ""):
				t.Errorf("got %v, want a fault with %q", err, c.want)
			}
		})
	}
}

// An unlogged partition writes no WAL, whenever it comes.
func TestStateFindsUnlogged(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`drop table events;
		create table events (id text, version int, aggregate_type text, event_type text, payload jsonb, status text, created_at timestamptz) partition by list (id);
		create table ours partition of events for values in ('a');
		alter publication outbox_relay add table events`)
	unlogged := func() bool {
		s, err := b.table.State(t.Context(), b.relay)
		b.must(err)
		return s.Unlogged
	}
	if unlogged() {
		t.Error("unlogged from the start")
	}
	b.exec(`create unlogged table theirs partition of events default`)
	if !unlogged() {
		t.Error("the unlogged partition is not seen")
	}
}

// The WAL position of a state lies behind every commit that its snapshot sees.
func TestStateWAL(t *testing.T) {
	t.Parallel()
	b := setup(t)
	before, err := b.table.State(t.Context(), b.relay)
	b.must(err)
	b.insert(1)
	after, err := b.table.State(t.Context(), b.relay)
	b.must(err)
	if after.WALEnd <= before.WALEnd {
		t.Errorf("WAL ends at %s, and before the insert at %s", after.WALEnd, before.WALEnd)
	}
	if after.Standbys != outbox.NoStandbys {
		t.Errorf("standbys at %s", after.Standbys)
	}
}

// Standbys are found however people name them, and whatever the role does to
// backslashes: one that is not found would hold every confirmation up.
func TestStandbysAsPeopleNameThem(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.OwnPostgresSince(t, 17, map[string]string{"synchronized_standby_slots": `nodes, "standby"`}))
	b.exec(`select pg_create_physical_replication_slot(name, true) from unnest('{nodes, standby}'::text[]) name`)
	for _, setting := range []string{"on", "off"} {
		conn := b.connect() // a statement that is prepared is not read again
		_, err := conn.Exec(t.Context(), `set standard_conforming_strings = `+setting)
		b.must(err)
		state, err := b.table.State(t.Context(), conn)
		b.must(err)
		if state.Standbys == 0 || state.Standbys == outbox.NoStandbys {
			t.Errorf("%s: standbys at %s", setting, state.Standbys)
		}
		room, err := outbox.ReadRoom(t.Context(), conn)
		b.must(err)
		if want := []string{"nodes", `"standby"`}; !slices.Equal(room.Away, want) {
			t.Errorf("%s: %q are away, want %q", setting, room.Away, want)
		}
	}
}

func TestInspect(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sql   string
		extra []string
		want  []string // in the error; none: fine
	}{
		"as migrated":                  {},
		"with a further column":        {sql: "alter table events add column tenant text", extra: []string{"tenant"}},
		"without the two that may":     {sql: "alter table events drop column aggregate_id cascade, drop column headers cascade"},
		"no table":                     {sql: "drop table events", want: []string{`"public"."events" does not exist`, "migrate"}},
		"without a column":             {sql: "alter table events drop column payload cascade", want: []string{"no column payload"}},
		"without three":                {sql: "alter table events drop column status cascade, drop column id cascade", extra: []string{"tenant"}, want: []string{"id, status, tenant"}},
		"without the subject's":        {extra: []string{"tenant"}, want: []string{"no column tenant"}},
		"a column in other letters":    {sql: `alter table events add column "Tenant" text`, extra: []string{"tenant"}, want: []string{"no column tenant"}},
		"without the checkpoints":      {sql: "drop table outbox_relay_checkpoints", want: []string{"outbox_relay_checkpoints", "migrate"}},
		"without the leftovers":        {sql: "drop table outbox_relay_leftovers", want: []string{"outbox_relay_leftovers", "migrate"}},
		"a system column is no column": {extra: []string{"xmin"}, want: []string{"no column xmin"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.exec(c.sql)
			b.table.Columns.Extra = c.extra
			layout, err := b.table.Inspect(t.Context(), b.relay)
			if len(c.want) == 0 {
				b.must(err)
				if oid := get[uint32](b, "select 'events'::regclass::oid"); layout.OID != oid {
					t.Errorf("OID %d, want %d", layout.OID, oid)
				}
				names := get[[]string](b, "select array_agg(attname::text) from pg_attribute where attrelid = 'events'::regclass and attnum > 0 and not attisdropped")
				if len(names) != len(layout.Columns) || len(layout.Lacks(names)) > 0 {
					t.Errorf("columns %v, want %q", layout.Columns, names)
				}
				return
			}
			for _, want := range c.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got %v, want it to hold %q", err, want)
				}
			}
		})
	}
}

// A table with a name that needs quotes is found by exactly that name.
func TestInspectQuotes(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`create table "Order ""Events"" 1.0" (like events including all)`)
	b.table.Name = `Order "Events" 1.0`
	if _, err := b.table.Inspect(t.Context(), b.relay); err != nil {
		t.Error(err)
	}
	b.table.Name = `order "Events" 1.0`
	if _, err := b.table.Inspect(t.Context(), b.relay); err == nil {
		t.Error("found under another name")
	}
}

// Fill reads what the event's Relation did not list; NULL stays NULL.
func TestFill(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`alter table events add column "Tenant Name" text, add column n numeric`)
	b.table.Columns.Extra = []string{"Tenant Name", "n"}
	id := get[string](b, `insert into events (aggregate_type, event_type, payload, aggregate_id, headers, "Tenant Name", n)
		values ('a', 'b', '{}', '', '{"b": "2", "a":  "1"}', null, 1.50) returning id`)
	e := event.Event{ID: []byte(id), EventType: []byte("as it was")}
	b.must(b.table.Fill(t.Context(), b.relay, &e, []string{"headers", "aggregate_id", "n", "Tenant Name"}))
	if string(e.Headers) != `{"a": "1", "b": "2"}` || e.AggregateID == nil || len(e.AggregateID) > 0 || e.Extra[0] != nil || string(e.Extra[1]) != "1.50" {
		t.Errorf("filled %q, %q, %q", e.Headers, e.AggregateID, e.Extra)
	}
	if string(e.EventType) != "as it was" {
		t.Errorf("event type %q", e.EventType)
	}
	e.ID = []byte("absent")
	if err := b.table.Fill(t.Context(), b.relay, &e, []string{"headers"}); !errors.Is(err, outbox.ErrNoRow) {
		t.Errorf("got %v, want ErrNoRow", err)
	}
}

func TestHasPending(t *testing.T) {
	t.Parallel()
	b := setup(t)
	require := func(want bool) {
		t.Helper()
		got, err := b.table.HasPending(t.Context(), b.relay)
		b.must(err)
		if got != want {
			t.Errorf("pending: %v", got)
		}
	}
	require(false)
	ids := b.insert(2)
	require(true)
	b.exec(`update events set status = case id when $1 then 'failed' else 'published' end`, ids[0])
	require(false)
}

// A copy is its own: the next event in the same buffer changes the copy, and
// nothing else does.
func TestCopyTo(t *testing.T) {
	source := event.Event{ID: []byte("id"), Payload: []byte("payload"), AggregateID: []byte{}, Extra: [][]byte{[]byte("x"), nil}}
	var copied event.Event
	source.CopyTo(&copied, nil)
	for _, v := range [][]byte{source.ID, source.Payload, source.Extra[0]} {
		clear(v)
	}
	if string(copied.ID) != "id" || string(copied.Payload) != "payload" || string(copied.Extra[0]) != "x" {
		t.Errorf("the copy follows its source: %q, %q, %q", copied.ID, copied.Payload, copied.Extra)
	}
	if copied.AggregateID == nil || copied.Headers != nil || copied.Extra[1] != nil {
		t.Error("NULL and empty are mixed up")
	}
	for _, v := range [][]byte{copied.ID, copied.Payload, copied.Extra[0]} {
		if cap(v) != len(v) {
			t.Error("a value can grow into the next one")
		}
	}
	buf := make([]byte, 0, source.Size())
	source.CopyTo(&copied, buf)
	if &copied.ID[0] != &buf[:1][0] {
		t.Error("the copy is not in the buffer, which has room for it")
	}
	source.Payload = slices.Repeat([]byte("p"), 100)
	source.CopyTo(&copied, buf)
	if string(copied.Payload) != string(source.Payload) {
		t.Errorf("a longer event: %q", copied.Payload)
	}
	buf = make([]byte, 0, source.Size())
	if n := testing.AllocsPerRun(100, func() { source.CopyTo(&copied, buf) }); n != 0 {
		t.Errorf("%v allocations a copy", n)
	}
}
