package relay_test

import (
	"fmt"
	"strings"
	"testing"

	"outbox-relay/internal/testenv"
)

// listed is the publication's column list, as migrate makes it.
const listed = `(id, version, aggregate_type, aggregate_id, event_type, payload, headers, status, created_at)`

func (b *bundle) text(sql string, args ...any) (text string) {
	b.Helper()
	b.must(b.sql.QueryRow(b.Context(), sql, args...).Scan(&text))
	return text
}

// confirmedPast tells whether the slot has moved past lsn.
func (b *bundle) confirmedPast(lsn string) bool {
	b.Helper()
	return b.count(`select count(*) from pg_replication_slots where slot_name = $1 and confirmed_flush_lsn > $2::pg_lsn`, b.slot(), lsn) == 1
}

const accept = `UPDATE public.outbox_relay_checkpoints SET publication_state = NULL`

// A change behind a running relay's back, after which Postgres passes inserts
// over or may have: the relay ends, confirms nothing past it, says what is wrong
// and, once that is mended, that something may be missing. What was passed over
// stays pending.
func TestPublicationChangedWhileRunning(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, change string
		words        []string
		mend         string // empty: migrate
		fresh        bool   // the slot can't read past the change
	}{
		{"table dropped", `alter publication outbox_relay drop table events`,
			[]string{`publication outbox_relay does not contain table "public"."events"`, "outbox-relay migrate"}, "", false},
		{"emptied", `create table other (n int); alter publication outbox_relay set table other`,
			[]string{`publication outbox_relay does not contain table "public"."events"`, "outbox-relay migrate"}, "", false},
		{"row filter", `alter publication outbox_relay set table events ` + listed + ` where (version > 0)`,
			[]string{"publication outbox_relay has a row filter", "remove it"}, `alter publication outbox_relay set table events ` + listed, false},
		{"inserts left out", `alter publication outbox_relay set (publish = 'truncate')`,
			[]string{"publication outbox_relay does not publish inserts", "SET (publish = 'insert')"}, `alter publication outbox_relay set (publish = 'insert')`, false},
		{"column dropped", `alter table events drop column event_type cascade`,
			[]string{`table "public"."events" has no column event_type`, "add it"}, `alter table events add column event_type text not null default 'late'`, false},
		{"table renamed and made again", `alter table events rename to events_old; create table events (like events_old including all);
				create trigger on_events_create before insert on events for each row execute function on_events_create()`,
			[]string{`publication outbox_relay does not contain table "public"."events"`, "outbox-relay migrate"}, "", false},
		{"dropped", `drop publication outbox_relay`, []string{"publication", "outbox_relay", "outbox-relay migrate"}, "", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			r := b.streaming()
			b.requireStatus("published", b.insert(10))
			before := b.text(`select pg_current_wal_insert_lsn()::text`)
			b.exec(c.change)
			missed := b.missed(c.name)
			requireEnd(t, r, 1, c.words...)
			if b.confirmedPast(before) {
				t.Fatal("the slot has moved past what was passed over")
			}
			requireEnd(t, b.start(), 1, c.words...)

			if c.mend != "" {
				b.exec(c.mend)
			}
			b.migrate()
			b.requireStatus("pending", missed)
			keep := b.start("AFTER_PUBLISH=keep")
			requireEnd(t, keep, 1, "was changed or made again", "status 'pending'", accept)
			b.requireStatus("pending", missed)
			r = b.start()
			r.WaitLog("was changed or made again")
			b.requireStatus("published", append(missed, b.insert(2)...))
			requireLeaves(t, r)
		})
	}
}

// missed inserts what the change lets pass over.
func (b *bundle) missed(change string) []string {
	b.Helper()
	if change == "column dropped" {
		return nil // the table takes no event any more
	}
	return b.insert(3)
}

// The window between drop and creation is not seen by a look at either end.
func TestPublicationMadeAgainWhileRunning(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	b.requireStatus("published", b.insert(10))
	b.exec(`begin; drop publication outbox_relay; create publication outbox_relay for table events ` + listed + ` with (publish = 'insert', publish_via_partition_root = true); commit`)
	b.insert(3)
	r.WaitLog("publication outbox_relay, or the membership of table")
	b.requireStatus("published", b.ids())
	b.requireStream(b.ids())
	requireLeaves(t, r)
}

// ids lists the table's, by which they are made in order.
func (b *bundle) ids() []string {
	b.Helper()
	var ids []string
	b.must(b.sql.QueryRow(b.Context(), `select array_agg(id order by id) from events where aggregate_type <> 'history'`).Scan(&ids))
	return ids
}

// What does not matter to the message may change under a running relay, and
// what does is read by its name.
func TestTableAlteredWhileRunning(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	var ids []string
	for _, change := range []string{
		`alter table events add column tenant text not null default 'a.b'`,
		`alter table events add column note text`,
		`alter table events alter column retried_attempts type bigint`, // a rewrite
		`alter table events rename column note to remark`,
		`alter table events drop column remark`,
		`alter table events rename constraint events_id_primary_key to events_pkey`,
		`create index on events (created_at)`,
		`cluster events using events_pkey`,
		`vacuum full events`,
		`truncate other_table`,
	} {
		if strings.HasPrefix(change, "truncate") {
			b.exec(`create table other_table (n int)`)
		}
		b.exec(change)
		more := b.insert(5)
		b.requireStatus("published", more)
		ids = append(ids, more...)
	}
	b.requireStream(ids)

	// migrate extends the publication beneath a running relay; the next one names
	// the column in its subject, also for events from before.
	b.must(b.nats.Server().DisableJetStream())
	early := b.insert(3)
	b.migrate("SUBJECT=events.{tenant}.{event_type}")
	late := b.insert(3)
	r.Kill()
	b.nats.Restart()
	r = b.streaming("SUBJECT=events.{tenant}.{event_type}")
	b.requireStatus("published", append(early, late...))
	for _, m := range b.requireStream(append(ids, append(early, late...)...))[len(ids):] {
		if m.Subject != "events.a=2Eb.created" {
			t.Fatalf("subject %s", m.Subject)
		}
	}

	// By hand the same is a change that may have passed something over.
	b.exec(`alter publication outbox_relay set table events (id, version, aggregate_type, aggregate_id, event_type, payload, headers, status, created_at, tenant, retried_attempts)`)
	r.WaitLog("was changed or made again")
	b.requireStatus("published", b.insert(3))
	requireLeaves(t, r)
}

func TestPublicationExtendedBeneathARunningRelay(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	ids := b.insert(3)
	b.requireStatus("published", ids)
	b.exec(`alter table events add column tenant text`)
	before := b.text(`select outbox_relay_publication_state('outbox_relay', 'events')`)
	b.migrate("SUBJECT=events.{tenant}.{event_type}")
	if b.text(`select outbox_relay_publication_state('outbox_relay', 'events')`) == before {
		t.Fatal("the publication is as it was")
	}
	more := b.insert(3)
	b.requireStatus("published", more)
	b.requireStream(append(ids, more...))
	requireLeaves(t, r)
}

// A column that the message needs and that has another name for a while: the
// relay ends by its name, and with the name back what was inserted meanwhile is
// delivered, since the row still has it.
func TestNeededColumnRenamedWhileRunning(t *testing.T) {
	t.Parallel()
	for _, column := range []string{"payload", "event_type", "status", "created_at"} {
		t.Run(column, func(t *testing.T) {
			b := setup(t)
			r := b.streaming("AFTER_PUBLISH=keep")
			ids := b.insert(3)
			b.requireStream(ids)
			b.exec(`alter table events disable trigger on_events_create`)
			b.exec(`alter table events rename column ` + column + ` to other`)
			names := strings.NewReplacer(column, "other").Replace(`id, aggregate_type, event_type, payload, status, created_at`)
			b.exec(`insert into events (` + names + `) select 'while-' || i, 'order', 'renamed', '{"n": 1}', 'pending', now() from generate_series(1, 3) i`)
			requireEnd(t, r, 1, column, `"public"."events"`)
			requireEnd(t, b.start("AFTER_PUBLISH=keep"), 1, `table "public"."events" has no column `+column)
			b.exec(`alter table events rename column other to ` + column)
			b.exec(`alter table events enable trigger on_events_create`)
			b.streaming("AFTER_PUBLISH=keep")
			after := b.insert(2)
			want := append(append(ids, "while-1", "while-2", "while-3"), after...)
			messages := b.requireStream(want)
			if m := messages[3]; m.Subject != "events.order.renamed" || string(m.Data) != `{"n": 1}` {
				t.Fatalf("message %s: %s", m.Subject, m.Data)
			}
		})
	}
}

// A column that the table may lack is not taken for missing when it has another
// name: the message would come without it.
func TestColumnThatMayBeMissingRenamedWhileRunning(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	ids := []string{b.insertRow(`'{"traceparent": "1"}'`, `'1'`)}
	b.requireStatus("published", ids)
	b.exec(`alter table events rename column headers to headings`)
	late := b.text(`insert into events (aggregate_type, event_type, headings, payload) values ('order', 'created', '{"traceparent": "2"}', '1') returning id`)
	words := []string{"publication outbox_relay lists column headings, and not headers", "give it its name back", "add headers", "outbox-relay migrate"}
	requireEnd(t, r, 1, words...)
	requireEnd(t, b.start(), 1, words...)
	b.exec(`alter table events rename column headings to headers`)
	r = b.streaming()
	b.requireStatus("published", []string{late})
	if m := b.requireStream(append(ids, late))[1]; m.Header.Get("traceparent") != "2" {
		t.Fatalf("headers %v", m.Header)
	}
	requireLeaves(t, r)

	// Or for good.
	b.exec(`alter table events rename column headers to headings`)
	b.exec(`alter table events add column headers jsonb`)
	b.migrate()
	b.requireWorks()
}

// Without its id an event can't be told from others: the slot stops before it.
func TestIDRenamedWhileRunning(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	b.requireStatus("published", b.insert(3))
	before := b.text(`select pg_current_wal_insert_lsn()::text`)
	b.exec(`alter table events disable trigger on_events_create; alter table events rename column id to key`)
	b.exec(`insert into events (key, aggregate_type, event_type, payload, status, created_at) values ('nameless', 'order', 'created', '1', 'pending', now())`)
	requireEnd(t, r, 1, `"public"."events"`, "the column of the id")
	b.exec(`alter table events rename column key to id; alter table events enable trigger on_events_create`)
	requireEnd(t, b.start(), 1, "the column of the id", "status 'pending'", "pg_drop_replication_slot")
	if b.confirmedPast(before) {
		t.Fatal("the slot has moved past the event")
	}
	b.requireStatus("pending", []string{"nameless"})
}

// A table that moves to another name takes its events along; the relay has to be
// told.
func TestTableRenamedWhileRunning(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	ids := b.insert(3)
	b.requireStatus("published", ids)
	b.exec(`alter table events rename to events_of_old`)
	b.exec(`insert into events_of_old (aggregate_type, event_type, payload) values ('order', 'created', '1')`)
	requireEnd(t, r, 1, `table "public"."events" does not exist (OUTBOX_TABLE)`)
	r = b.streaming("TABLE=events_of_old")
	b.exec(`insert into events_of_old (aggregate_type, event_type, payload) values ('order', 'created', '1')`)
	testenv.Eventually(t, "all rows published", func() bool {
		return b.count(`select count(*) from events_of_old where status = 'published' and aggregate_type <> 'history'`) == 5
	})
	if n := b.last(); n != 5 {
		t.Fatalf("%d messages for 5 events", n)
	}
	requireLeaves(t, r)
}

// Two outboxes in one database, each with its own table, slot, publication and
// stream, side by side.
func TestTwoOutboxesInOneDatabase(t *testing.T) {
	t.Parallel()
	b := setup(t)
	second := []string{"TABLE=billing.events", "SLOT=" + b.slot() + "_billing", "PUBLICATION=billing", "STREAM=BILLING", "SUBJECT=billing.{event_type}"}
	third := []string{"TABLE=public.invoices", "SLOT=" + b.slot() + "_invoices", "PUBLICATION=invoices", "STREAM=INVOICES", "SUBJECT=invoices.{event_type}"}
	b.exec(`create schema billing`)
	b.migrate(second...)
	b.migrate(third...)
	requireEnd(t, b.start(append(second, "STREAM=EVENTS", "SUBJECT=events.{event_type}.{id}", "SLOT="+b.slot()+"_wrong", "TABLE=public.events", "PUBLICATION=billing")...), 1,
		`publication billing does not contain table "public"."events"`)
	relays := []*testenv.Relay{b.streaming(), b.streaming(second...), b.streaming(third...)}
	tables := map[string]string{"EVENTS": "public.events", "BILLING": "billing.events", "INVOICES": "public.invoices"}
	for i := range 30 {
		b.exec(`begin`)
		for _, table := range tables {
			b.exec(fmt.Sprintf(`insert into %s (aggregate_type, event_type, payload) values ('order', 'created', to_jsonb(%d))`, table, i))
		}
		b.exec(`commit`)
	}
	for name, table := range tables {
		testenv.Eventually(t, table+" published", func() bool {
			return b.count(`select count(*) from `+table+` where status = 'published' and aggregate_type <> 'history'`) == 30
		})
		stream, err := b.js.Stream(t.Context(), name)
		b.must(err)
		if n := stream.CachedInfo().State.Msgs; n != 30 {
			t.Fatalf("stream %s has %d messages, want 30", name, n)
		}
		for seq := range uint64(30) {
			m, err := stream.GetMsg(t.Context(), seq+1)
			b.must(err)
			if n := b.count(`select count(*) from `+table+` where id = $1 and payload = to_jsonb($2::int)`, m.Header.Get("Nats-Msg-Id"), int(seq)); n != 1 {
				t.Fatalf("message %d of stream %s is not row %d of %s", seq+1, name, seq, table)
			}
		}
	}
	for _, r := range relays {
		requireLeaves(t, r)
	}
}
