package relay_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"outbox-relay/internal/testenv"
)

// trying lets the relay try again at once what Postgres has refused.
func (b *bundle) trying() {
	b.exec(`update outbox_relay_leftovers set refused_at = refused_at - interval '1 hour'`)
}

// requireOthers waits until all these rows but one have the status.
func (b *bundle) requireOthers(status string, ids []string, but string) {
	b.Helper()
	b.requireStatus(status, slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return id == but }))
}

// obstacles are what an application can put into the way of an outcome: each refuses to let
// the event whose payload has n = 5 be marked, or does as if it were.
var obstacles = map[string]struct {
	create string
	says   string // in the log
}{
	"a trigger raises": {says: "not that one (SQLSTATE P0001), in PL/pgSQL function public.obstruct()",
		create: trigger(`raise exception 'not that one'`, "before")},
	"a trigger swallows the update": {says: "swallows the write",
		create: trigger(`return null`, "before")},
	"a trigger takes the status back": {says: "takes it back",
		create: trigger(`new.status = old.status`, "before")},
	"a trigger writes what the role may not": {says: "permission denied for table audit (SQLSTATE 42501), in SQL statement",
		create: `create table audit (id text);` + trigger(`insert into public.audit values (new.id)`, "after")},
	"a deferred constraint fails at the commit": {says: "not that one (SQLSTATE P0001)",
		create: trigger(`raise exception 'not that one'`, "constraint")},
	"a check constraint": {says: "not_five",
		create: `alter table events add constraint not_five check (payload->>'n' is distinct from '5' or aggregate_type <> 'order' or status = 'pending')`},
	"an index on an expression": {says: "division by zero (SQLSTATE 22012)",
		create: `create index broken on events ((1 / case when status = 'published' and payload->>'n' = '5' and aggregate_type = 'order' then 0 else 1 end))`},
}

// trigger is one for the row whose payload has n = 5.
func trigger(do, when string) string {
	create := `create trigger obstruct ` + when + ` update on events for each row`
	if when == "constraint" {
		create = `create constraint trigger obstruct after update on events deferrable initially deferred for each row`
	}
	return `create function obstruct() returns trigger as $$ begin ` + do + `; return new; end $$ language plpgsql;` +
		create + ` when (new.payload->>'n' = '5' and new.aggregate_type = 'order') execute function obstruct()`
}

// One row that can't be marked stops no other: all are published, each once, the others are
// marked, the log says what Postgres says, and the outcome is written as soon as it can be.
// After a crash, and after a lost slot, nothing is published again.
func TestOutcomeThatPostgresRefuses(t *testing.T) {
	t.Parallel()
	for name, o := range obstacles {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			r := b.streaming()
			b.exec(o.create)
			ids := b.insert(1000)
			b.requireStream(ids)
			b.requireOthers("published", ids, ids[4])
			r.WaitLog("Postgres refuses to write outcomes")
			r.WaitLog(o.says)
			r.Kill()

			r = b.streaming()
			more := b.insert(20)
			ids = append(ids, more...)
			b.requireStream(ids)
			b.requireOthers("published", more, more[4])
			r.Kill()
			b.dropSlot()
			r = b.streaming() // what is pending, and has no outcome that waits, is published
			b.requireStream(ids)

			b.exec(unobstruct(o.create))
			b.trying()
			b.requireStatus("published", ids)
			if code := r.Terminate(); code != 0 {
				t.Errorf("exit code %d", code)
			}
		})
	}
}

func unobstruct(create string) string {
	switch {
	case strings.Contains(create, "not_five"):
		return `alter table events drop constraint not_five`
	case strings.Contains(create, "broken"):
		return `drop index broken`
	}
	return `drop trigger obstruct on events`
}

// Where Postgres refuses every outcome, the relay publishes all the same, and Postgres is
// not flooded with statements that fail.
func TestEveryOutcomeIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`create function obstruct() returns trigger as $$ begin raise exception 'none'; end $$ language plpgsql;
		create trigger obstruct before update on events for each row execute function obstruct()`)
	r := b.streaming()
	var ids []string
	for range 20 {
		ids = append(ids, b.insert(500)...)
	}
	ids = append(ids, b.insertTooLarge())
	b.requireStream(ids[:len(ids)-1])
	testenv.Eventually(t, "all outcomes to wait", func() bool {
		return b.count(`select count(*) from outbox_relay_leftovers where waiting`) == len(ids)
	})
	r.Kill()
	b.streaming()
	b.exec(`drop trigger obstruct on events`)
	b.trying()
	b.requireStatus("published", ids[:len(ids)-1])
	b.requireStatus("failed", ids[len(ids)-1:])
	b.requireStream(ids[:len(ids)-1])
}

// With delete, a foreign key can hold a row for as long as the application likes.
func TestForeignKeyHoldsARow(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`create table orders (id int generated always as identity primary key, event text references events (id))`)
	r := b.streaming("AFTER_PUBLISH=delete")
	var held string
	b.must(b.sql.QueryRow(t.Context(), `with e as (insert into events (aggregate_type, event_type, payload) values ('order', 'created', '{}') returning id)
		select id from e`).Scan(&held))
	tx, err := b.sql.Begin(t.Context())
	b.must(err)
	ids := insert(b, tx, 100)
	_, err = tx.Exec(t.Context(), `insert into orders (event) values ($1)`, ids[50])
	b.must(err)
	b.must(tx.Commit(t.Context()))
	all := append([]string{held}, ids...)
	b.requireStream(all)
	others := slices.DeleteFunc(slices.Clone(all), func(id string) bool { return id == ids[50] })
	b.requireNoRows(others)
	r.WaitLog(`violates foreign key constraint \"orders_event_fkey\" on table \"orders\" (SQLSTATE 23503)`)
	r.Kill()
	b.streaming("AFTER_PUBLISH=delete")
	more := b.insert(10)
	b.requireStream(append(all, more...))
	b.requireNoRows(more)
	if out := b.status(b.with("AFTER_PUBLISH=delete")); !strings.Contains(out, "refuses") || !strings.Contains(out, "orders_event_fkey") {
		t.Errorf("status does not name the foreign key:\n%s", out)
	}
	b.exec(`delete from orders`)
	b.trying()
	b.requireNoRows(ids)
}

// Retention passes over a row that Postgres keeps from being removed.
func TestForeignKeyHoldsAnOldRow(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`create table orders (id int generated always as identity primary key, event text references events (id))`)
	ids := b.insert(1000)
	b.exec(`insert into orders (event) values ($1)`, ids[500])
	r := b.streaming("RETENTION=1s")
	b.requireStream(ids)
	b.requireNoRows(slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return id == ids[500] }))
	r.WaitLog("Postgres refuses to remove published rows")
	b.exec(`delete from orders`)
	b.requireNoRows(ids)
}

// An automatic retry that Postgres refuses stops no other.
func TestRetryThatPostgresRefuses(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(trigger(`raise exception 'not that one'`, "before"))
	ids := b.insert(10)
	b.exec(`set session_replication_role = replica; update events set status = 'failed', failed_at = now() - interval '1 hour' where id = any ('{` + strings.Join(ids, ",") + `}'); reset session_replication_role`)
	r := b.streaming("RETRY_ATTEMPTS=3", "RETRY_BACKOFF=1s")
	b.requireOthers("published", ids, ids[4])
	r.WaitLog("Postgres refuses to retry failed rows")
	b.requireStatus("failed", ids[4:5])
}

// A rule in the place of an update can't stand in the relay's statement: it is refused by name.
func TestRulesAreRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ rule, mode string }{
		"do instead of an update": {`on update to events do instead nothing`, "mark"},
		"do also":                 {`on update to events do also notify changed`, "mark"},
		"do instead of a delete":  {`on delete to events do instead nothing`, "delete"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.exec(`create rule "No Change" as ` + c.rule)
			r := b.start("AFTER_PUBLISH=" + c.mode)
			b.requireFatal(r, "No Change")
			if !strings.Contains(r.Logs(), fmt.Sprintf("DROP RULE %q ON", "No Change")) && !strings.Contains(r.Logs(), `DROP RULE \"No Change\" ON`) {
				t.Errorf("the remedy is not told:\n%s", r.Logs())
			}
		})
	}
}
