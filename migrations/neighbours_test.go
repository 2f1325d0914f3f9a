package migrations_test

import (
	"strings"
	"testing"

	. "outbox-relay/migrations" // testenv imports it

	"github.com/jackc/pgx/v5"
)

// hardened takes from PUBLIC what a hardened database has taken from it.
const hardened = `alter default privileges revoke execute on functions from public`

// insertAsWriter inserts as a role that may insert and no more, in a session that finds
// nothing by its search_path.
func insertAsWriter(t *testing.T, config *pgx.ConnConfig, target Target) error {
	t.Helper()
	conn := connect(t, config)
	execute(t, conn, `do $$ begin if to_regrole('app_writer') is null then create role app_writer; end if; exception when duplicate_object or unique_violation then null; end $$;
		grant usage on schema `+Quote(target.Schema)+` to app_writer; grant insert on `+target.Qualified()+` to app_writer`)
	execute(t, conn, `set role app_writer; set search_path = ''`)
	_, err := conn.Exec(t.Context(), `insert into `+target.Qualified()+` (aggregate_type, event_type, payload) values ('order', 'created', '{}')`)
	return err
}

// What migrate installs is called by the application's inserts, in sessions with any
// search_path and in databases with any default privileges.
func TestInsertsFromAnySession(t *testing.T) {
	t.Parallel()
	for name, target := range map[string]Target{
		"usual":       {Schema: "public", Table: "events", Publication: "outbox_relay"},
		"partitioned": {Schema: "public", Table: "events", Publication: "outbox_relay", Partitioned: true},
		"other names": {Schema: "Shop Floor", Table: "Events $1", Publication: "My Relay"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config, conn := newDatabase(t)
			execute(t, conn, hardened)
			up(t, config, target)
			if err := insertAsWriter(t, config, target); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A function that an earlier release has installed is replaced, and one of the user's own
// is not, whatever it says.
func TestInstalledFunctionIsQualified(t *testing.T) {
	t.Parallel()
	target := Target{Schema: "public", Table: "events", Publication: "outbox_relay"}
	const body = `select prosrc from pg_proc where oid = 'public.on_events_create()'::regprocedure`
	files, err := Render(target)
	if err != nil {
		t.Fatal(err)
	}
	config, conn := newDatabase(t)
	up(t, config, target)
	earlier := func() {
		t.Helper()
		execute(t, conn, files[0].SQL)
		execute(t, conn, `delete from events_migrations where version_id >= 6`)
	}
	earlier()
	if err := insertAsWriter(t, config, target); err == nil {
		t.Fatal("the function as it was shipped is qualified: this test shows nothing")
	}
	up(t, config, target)
	if err := insertAsWriter(t, config, target); err != nil {
		t.Fatal(err)
	}
	earlier()
	own := strings.Replace(query[string](t, conn, body), "'event_' || gen_random_ulid()", "gen_random_uuid()", 1)
	execute(t, conn, `create or replace function public.on_events_create() returns trigger as $own$`+own+`$own$ language plpgsql`)
	up(t, config, target)
	if got := query[string](t, conn, body); got != own {
		t.Errorf("the user's own function was replaced by %s", got)
	}
}
