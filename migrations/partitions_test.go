package migrations_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	. "outbox-relay/migrations" // testenv, which other tests here use, imports it
)

func TestPartitionedOutbox(t *testing.T) {
	t.Parallel()
	beside := Target{Schema: "shop", Table: "order_events", Publication: "p", Partitioned: true}
	oddly := odd
	oddly.Partitioned = true
	for name, target := range map[string]Target{"usual": partitioned, "beside": beside, "odd": oddly} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config, conn := made(t, target)
			if log := up(t, config, target); !strings.Contains(log, "nothing to migrate") {
				t.Errorf("second run:\n%s", log)
			}
			runAlone(t, config, render(t, target))
			requireWorks(t, conn, target)
			table, fallback := target.Qualified(), Quote(target.Schema)+"."+Quote(target.Table+"_default")
			execute(t, conn, "truncate "+table)
			execute(t, conn, fmt.Sprintf("create table old partition of %s for values from ('2020-01-01') to ('2021-01-01')", table))
			execute(t, conn, "select pg_create_logical_replication_slot('listen_'||split_part(current_database(), ' ', 1), 'pgoutput', true)")

			const columns = "(id, version, aggregate_type, event_type, payload, status, published_at, failed_at, failed_reasons, failed_attempts, retried_at, retried_attempts"
			const values = "('mine', 7, 'order', 'created', '{}', 'published', now(), now(), '{x}', 7, now(), 7"
			execute(t, conn, fmt.Sprintf(`begin;
				insert into %[1]s %[2]s, created_at) values %[3]s, '2020-06-01');
				insert into old %[2]s, created_at) values %[3]s, '2020-06-01');
				insert into %[1]s %[2]s) values %[3]s);
				commit`, table, columns, values))
			got := query[string](t, conn, `select string_agg(concat_ws(' ', tableoid::regclass, length(id), version, status, published_at, failed_at, failed_reasons, failed_attempts, retried_at, retried_attempts, created_at = '2020-06-01'), ', ' order by id) from `+table)
			want := fmt.Sprintf("old 32 0 pending 0 0 t, old 32 0 pending 0 0 t, %s 32 0 pending 0 0 f", query[string](t, conn, "select $1::text::regclass::text", fallback))
			if got != want {
				t.Errorf("the rows are %s, want %s", got, want)
			}
			if n := query[int](t, conn, "select count(distinct id) from "+table); n != 3 {
				t.Errorf("%d ids of 3 rows", n)
			}
			if n := query[int](t, conn, `select count(*) from pg_logical_slot_peek_binary_changes('listen_'||split_part(current_database(), ' ', 1), null, null, 'proto_version', '1', 'publication_names', $1)
				where get_byte(data, 0) = ascii('I') and substring(data, 2, 4) = int4send($2::text::regclass::int)`, Quote(target.Publication), table); n != 3 {
				t.Errorf("%d inserts published as the root's, want 3", n)
			}
			if got := query[string](t, conn, "select array_to_string(reloptions, ',') from pg_class where oid = $1::text::regclass", fallback); got != "fillfactor=50" {
				t.Errorf("the default partition has %s", got)
			}
		})
	}
}

func TestPartitionedNeedsAPartitionedTable(t *testing.T) {
	t.Parallel()
	config, conn := made(t, usual)
	requireError(t, Up(t.Context(), config, partitioned, quiet()), "public.events", "not partitioned", "OUTBOX_TABLE")
	execute(t, conn, "drop table events_migrations")
	requireError(t, Up(t.Context(), config, partitioned, quiet()), "001_events.sql", "events is there already and is not partitioned", "OUTBOX_TABLE")

	config, _ = made(t, partitioned)
	up(t, config, usual) // leaves a table that is there as it is
}

func TestPartitionKeyThatIsUpdated(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ by, also, want string }{
		"status":     {by: "list (status)", want: "partitioned by status"},
		"expression": {by: "range (coalesce(published_at, failed_at))", want: "partitioned by failed_at, published_at"},
		"nested": {by: "range (created_at)", also: "create table part partition of events for values from ('2020-01-01') to ('2021-01-01') partition by hash (retried_attempts)",
			want: "partitioned by retried_attempts"},
		"several": {by: "range (created_at, failed_attempts)", want: "partitioned by failed_attempts"},
		"others":  {by: "hash (id)"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config, conn := newDatabase(t)
			create := `create table events (
				id text not null, version int not null default 0, aggregate_type text not null, event_type text not null,
				payload jsonb not null, status text not null, published_at timestamptz, failed_at timestamptz,
				failed_reasons text[], failed_attempts int not null default 0, retried_at timestamptz,
				retried_attempts int not null default 0, created_at timestamptz not null) partition by ` + c.by + ";" + c.also
			execute(t, conn, create)
			err := Up(t.Context(), config, usual, quiet())
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			requireError(t, err, "table events is "+c.want+",", "published again", "created_at")
			// The same where the table was replaced after the migration.
			execute(t, conn, "drop table events, events_migrations")
			up(t, config, usual)
			execute(t, conn, "drop table events;"+create)
			requireError(t, Up(t.Context(), config, usual, quiet()), "table events is "+c.want+",")
		})
	}
}

func names(t *testing.T, conn *pgx.Conn, sql string, args ...any) []string {
	t.Helper()
	rows, err := conn.Query(t.Context(), sql, args...)
	if err != nil {
		t.Fatal(err)
	}
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return got
}

func TestAddPartitions(t *testing.T) {
	t.Parallel()
	for name, target := range map[string]Target{"usual": partitioned, "odd": {Schema: odd.Schema, Table: odd.Table, Publication: "p", Partitioned: true}} {
		for _, unit := range []string{"day", "week", "month"} {
			t.Run(name+" "+unit, func(t *testing.T) {
				t.Parallel()
				_, conn := made(t, target)
				execute(t, conn, "set timezone = 'Pacific/Auckland'; set datestyle = 'SQL, DMY'; set search_path = "+Quote(target.Schema)+", pg_temp")
				add := "select outbox_relay_add_partitions($1::text::regclass, $2, $3)"
				first := names(t, conn, add, target.Qualified(), unit, 2)
				if len(first) != 3 {
					t.Fatalf("made %q, want 3", first)
				}
				if id := insert(t, conn, target); query[string](t, conn, "select tableoid::regclass::oid::text from "+target.Qualified()+" where id = $1", id) !=
					query[string](t, conn, "select $1::text::regclass::oid::text", first[0]) {
					t.Errorf("a row of now is not in %s", first[0])
				}
				if again := names(t, conn, add, target.Qualified(), unit, 3); len(again) != 1 || slices.Contains(first, again[0]) {
					t.Errorf("then made %q, want one more", again)
				}
				if n := query[int](t, conn, "select count(*) from pg_inherits join pg_class on pg_class.oid = inhrelid where inhparent = $1::text::regclass and 'fillfactor=50' = any (reloptions)", target.Qualified()); n != 5 {
					t.Errorf("%d partitions with a fillfactor, want 5", n)
				}
			})
		}
	}
}

func TestAddPartitionsWhereItCannot(t *testing.T) {
	t.Parallel()
	_, conn := made(t, partitioned)
	insert(t, conn, partitioned)
	if got := names(t, conn, "select outbox_relay_add_partitions('events', 'month', 1)"); len(got) != 1 {
		t.Errorf("made %q, want the next month's only", got)
	}
	execute(t, conn, "create table mine partition of events for values from ('2000-01-01') to ('2010-01-01')")
	if got := names(t, conn, "select outbox_relay_add_partitions('events', 'day', 0)"); len(got) != 0 {
		t.Errorf("made %q", got)
	}
	for _, arguments := range []string{"'year', 1", "'day', -1", "null, 1", "'day', null"} {
		_, err := conn.Exec(t.Context(), "select outbox_relay_add_partitions('events', "+arguments+")")
		requireError(t, err, "cannot add partitions")
	}
}

const dropOld = "select outbox_relay_drop_partitions('events', '30 days')"

// pastPartition makes the year's partition, with a row that was published after days.
func pastPartition(t *testing.T, conn *pgx.Conn, year int) (name string) {
	t.Helper()
	name = fmt.Sprintf("y%d", year)
	execute(t, conn, fmt.Sprintf(`
		create table %[1]s partition of events for values from ('%[2]d-01-01') to ('%[3]d-01-01');
		insert into events (aggregate_type, event_type, payload, created_at) values ('order', 'created', '{}', '%[2]d-06-01');
		update %[1]s set status = 'published', published_at = created_at`, name, year, year+1))
	return name
}

func TestDropPartitions(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		harm string
		kept bool
	}{
		"published":           {},
		"empty":               {harm: "delete from y2020"},
		"pending":             {harm: "update y2020 set status = 'pending', published_at = null", kept: true},
		"failed":              {harm: "update y2020 set status = 'failed', failed_at = created_at", kept: true},
		"published lately":    {harm: "update y2020 set published_at = now() - interval '29 days'", kept: true},
		"published, no date":  {harm: "update y2020 set published_at = null", kept: true},
		"one of many pending": {harm: "insert into events (aggregate_type, event_type, payload, created_at) values ('order', 'created', '{}', '2020-02-01')", kept: true},
		"not over":            {harm: "alter table events detach partition y2020; alter table events attach partition y2020 for values from ('2020-01-01') to (now() - interval '29 days')", kept: true},
		"just over":           {harm: "alter table events detach partition y2020; alter table events attach partition y2020 for values from ('2020-01-01') to (now() - interval '31 days')"},
		"never over":          {harm: "alter table events detach partition y2020; alter table events attach partition y2020 for values from ('2020-01-01') to (maxvalue)", kept: true},
		"since ever":          {harm: "alter table events detach partition y2020; alter table events attach partition y2020 for values from (minvalue) to ('2021-01-01')"},
		"default":             {harm: "alter table events detach partition y2020; drop table events_default; alter table events attach partition y2020 default", kept: true},
		"detached":            {harm: "alter table events detach partition y2020", kept: true},
		"partitioned itself": {harm: `drop table y2020; create table y2020 partition of events for values from ('2020-01-01') to ('2021-01-01') partition by range (created_at);
			create table y2020a partition of y2020 for values from ('2020-01-01') to ('2020-07-01')`, kept: true},
		"needed by a view":   {harm: "create view v as select * from y2020", kept: true},
		"in another schema":  {harm: `create schema "Old"; alter table y2020 set schema "Old"`},
		"session's settings": {harm: "set timezone = 'Pacific/Auckland'; set datestyle = 'SQL, DMY'; set search_path = pg_temp, public; set standard_conforming_strings = off"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, conn := made(t, partitioned)
			past := pastPartition(t, conn, 2020)
			execute(t, conn, c.harm)
			oid := query[uint32](t, conn, "select oid from pg_class where relname = $1", past)
			dropped := names(t, conn, dropOld)
			there := query[bool](t, conn, "select exists (select from pg_class where oid = $1)", oid)
			if there != c.kept || len(dropped) != 1 && !c.kept || len(dropped) != 0 && c.kept {
				t.Errorf("dropped %q, is there: %v, want %v", dropped, there, c.kept)
			}
			insert(t, conn, partitioned)
		})
	}
}

func TestDropPartitionsInUse(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		use  string
		want []string
	}{
		"a lock of writers": {"lock table y2020 in row exclusive mode", []string{"public.y2021"}},
		"an update":         {"update y2020 set version = 1", nil}, // has locked the root, too
		"a reader":          {"select from y2020", []string{"public.y2021"}},
		"an update by root": {"update events set version = 1 where created_at = '2020-06-01'", nil},
		"a reader by root":  {"select from events", nil},
		"an insert":         {"insert into events (aggregate_type, event_type, payload) values ('order', 'created', '{}')", nil},
		"nobody":            {"select", []string{"public.y2020", "public.y2021"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config, conn := made(t, partitioned)
			pastPartition(t, conn, 2020)
			pastPartition(t, conn, 2021)
			other := connect(t, config)
			execute(t, other, "begin; "+c.use)
			first := names(t, conn, dropOld)
			if !slices.Equal(first, c.want) {
				t.Errorf("dropped %q, want %q", first, c.want)
			}
			execute(t, other, "rollback")
			if later := names(t, conn, dropOld); len(first)+len(later) != 2 {
				t.Errorf("dropped %q and %q in the end, want both", first, later)
			}
			insert(t, conn, partitioned)
		})
	}
}

// With one snapshot for all, a row that came after it would go unseen.
func TestDropPartitionsNeedsReadCommitted(t *testing.T) {
	t.Parallel()
	_, conn := made(t, partitioned)
	for _, level := range []string{"repeatable read", "serializable"} {
		execute(t, conn, "begin isolation level "+level)
		refused(t, conn, dropOld, "25000")
		execute(t, conn, "rollback")
	}
}

func TestDropPartitionsOfOtherKeys(t *testing.T) {
	t.Parallel()
	for by, refused := range map[string]bool{
		"range (created_at)": false, "range (day)": false, "range (local)": false,
		"list (created_at)": true, "hash (id)": true, "range (created_at, id)": true, "range (id)": true, "range ((created_at at time zone 'UTC'))": true,
	} {
		t.Run(by, func(t *testing.T) {
			t.Parallel()
			config, conn := newDatabase(t)
			execute(t, conn, `create table events (
				id text not null, version int not null default 0, aggregate_type text not null, event_type text not null,
				payload jsonb not null, status text not null, published_at timestamptz, failed_at timestamptz,
				failed_reasons text[], failed_attempts int not null default 0, retried_at timestamptz,
				retried_attempts int not null default 0, created_at timestamptz not null, day date, local timestamp) partition by `+by)
			up(t, config, usual)
			if !refused {
				execute(t, conn, `create table past partition of events for values from ('2020-01-01') to ('2021-01-01');
					create table present partition of events for values from (now() - interval '90 days') to (now() at time zone 'UTC' - interval '30 days 11 hours')`)
			}
			rows, err := conn.Query(t.Context(), dropOld)
			var got []string
			if err == nil {
				got, err = pgx.CollectRows(rows, pgx.RowTo[string])
			}
			switch {
			case refused:
				requireError(t, err, "public.events is not partitioned by range of one timestamptz, timestamp or date column")
			case err != nil:
				t.Error(err)
			case by == "range (local)" && !slices.Equal(got, []string{"public.past"}):
				t.Errorf("dropped %q: not everywhere on earth is the present one over", got)
			case !slices.Contains(got, "public.past"):
				t.Errorf("dropped %q", got)
			}
		})
	}
}

// refused wants an error of that SQLSTATE.
func refused(t *testing.T, conn *pgx.Conn, sql, code string) {
	t.Helper()
	_, err := conn.Exec(t.Context(), sql)
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || pgErr.Code != code {
		t.Errorf("%s: %v, want SQLSTATE %s", sql, err, code)
	}
}

func TestDropPartitionsRefuses(t *testing.T) {
	t.Parallel()
	config, conn := made(t, partitioned)
	past := pastPartition(t, conn, 2020)
	const copied = "create table %[1]s (id text, status text, published_at timestamptz, created_at timestamptz) partition by range (created_at);" +
		"create table %[1]s_past partition of %[1]s for values from ('2020-01-01') to ('2021-01-01');"
	execute(t, conn, fmt.Sprintf(copied, "blog")+"alter publication outbox_relay add table blog")
	execute(t, conn, "create schema shop;"+fmt.Sprintf(copied, "shop.events")+"alter publication outbox_relay add table shop.events")
	up(t, config, Target{Schema: "public", Table: "unpublished", Publication: "p", Partitioned: true})
	execute(t, conn, "alter publication p drop table unpublished")
	up(t, config, Target{Schema: "public", Table: "plain", Publication: "p"})
	name := role(t, conn, "cleaner")
	up(t, config, Target{Schema: "public", Table: "given", Publication: "p", Partitioned: true})
	execute(t, conn, "alter table given owner to "+name)

	for _, table := range []string{"blog", "shop.events", "unpublished", "given", "y2020", "pg_class"} {
		refused(t, conn, "select outbox_relay_drop_partitions('"+table+"', '0')", InsufficientPrivilege)
	}
	refused(t, conn, "select outbox_relay_drop_partitions('plain', '0')", "42809")
	for _, older := range []string{"'-1 second'", "null"} {
		refused(t, conn, "select outbox_relay_drop_partitions('events', "+older+")", "22023")
	}

	execute(t, conn, "grant usage on schema public to "+name+"; set role "+name)
	refused(t, conn, dropOld, InsufficientPrivilege)
	execute(t, conn, "reset role; grant execute on function outbox_relay_drop_partitions to "+name+"; set role "+name)
	refused(t, conn, "drop table "+past, InsufficientPrivilege)
	if got := names(t, conn, dropOld); !slices.Equal(got, []string{"public." + past}) {
		t.Errorf("dropped %q", got)
	}
	execute(t, conn, "reset role")
	if n := query[int](t, conn, "select count(*) from pg_class where relname in ('blog_past', 'events_past')"); n != 2 {
		t.Errorf("%d of 2 foreign partitions are there", n)
	}
	// Running 003 again keeps the grant, and gives nobody else one.
	runAlone(t, config, render(t, partitioned))
	if got := query[string](t, conn, "select concat_ws(' ', has_function_privilege($1, f, 'execute'), has_function_privilege('pg_monitor', f, 'execute')) from (select 'outbox_relay_drop_partitions(regclass, interval)'::regprocedure::oid as f) as it", name); got != "t f" {
		t.Errorf("executable by the grantee and others: %s", got)
	}
}

func TestDropPartitionsOfAnotherTable(t *testing.T) {
	t.Parallel()
	oddly := odd
	oddly.Partitioned = true
	_, conn := made(t, oddly)
	execute(t, conn, "set search_path = "+Quote(odd.Schema))
	execute(t, conn, "create table past partition of "+Quote(odd.Table)+" for values from ('2020-01-01') to ('2021-01-01')")
	got := names(t, conn, "select outbox_relay_drop_partitions($1::text::regclass, '0')", oddly.Qualified())
	if !slices.Equal(got, []string{Quote(odd.Schema) + ".past"}) {
		t.Errorf("dropped %q", got)
	}
}
