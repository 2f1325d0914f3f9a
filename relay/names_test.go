package relay_test

import (
	"strings"
	"testing"
	"time"

	"outbox-relay/internal/testenv"
)

// requireSaid runs each of the commands, and requires that it says the words; white space
// aside, since the doctor breaks lines.
func (b *bundle) requireSaid(env map[string]string, words string, commands ...string) {
	b.Helper()
	for _, command := range commands {
		r := testenv.StartRelay(b, env, command)
		if code := r.Wait(time.Minute); code != 1 {
			b.Errorf("%s: exit code %d, want 1", command, code)
		}
		said := strings.Join(strings.Fields(r.Logs()), " ")
		if !strings.Contains(said, words) && !strings.Contains(strings.ReplaceAll(said, " -> ", ": "), words) {
			b.Errorf("%s does not say %q: %s", command, words, said)
		}
	}
}

// Names that are not in quotes fold to lower case: where a name of another case is there,
// the error shows how it is written.
func TestNamesOfAnotherCase(t *testing.T) {
	t.Parallel()
	b := setupFresh(t)
	b.exec(`create table "outboxEvents" (id text primary key, "aggregateType" text not null, event_type text, payload jsonb)`)
	own := []string{"TABLE=outboxEvents", "COLUMN_ID=id", "COLUMN_AGGREGATE_TYPE=aggregateType"}
	b.requireSaid(b.with(own...), `write OUTBOX_TABLE='public."outboxEvents"'`, "run", "status", "doctor", "migrate")
	own[0] = `TABLE="outboxEvents"`
	b.requireSaid(b.with(own...), `write OUTBOX_COLUMN_AGGREGATE_TYPE='"aggregateType"'`, "run", "doctor", "migrate")
	own[2] = `COLUMN_AGGREGATE_TYPE="aggregateType"`
	b.requireSaid(b.with(append(own, "SUBJECT=events.{Payload}", "PUBLICATION=camel")...), "write {payload} in OUTBOX_SUBJECT", "run", "doctor", "migrate")
	requireEnd(t, testenv.StartRelay(t, b.with(append(own, "PUBLICATION=camel")...), "migrate"), 0)
}

// Postgres pads what is in a column of type character, and compares it without the
// padding: its text is no id.
func TestIDOfTypeCharacter(t *testing.T) {
	t.Parallel()
	b := setupFresh(t)
	b.exec(`create table shop (id char(26) primary key, aggregate_type text not null, event_type text not null, payload jsonb not null)`)
	env := b.with("TABLE=shop", "COLUMN_ID=id", "PUBLICATION=shop")
	const says = `ALTER TABLE "public"."shop" ALTER COLUMN "id" TYPE text`
	b.requireSaid(env, says, "migrate")
	if n := b.count(`select count(*) from pg_attribute where attrelid = 'shop'::regclass and attname = 'status'`); n != 0 {
		t.Error("the table was changed all the same")
	}
	b.exec(says)
	requireEnd(t, testenv.StartRelay(t, env, "migrate"), 0)
	b.exec(`drop publication shop`)
	b.exec(`alter table shop alter column id type char(26)`)
	b.requireSaid(env, says, "run", "doctor", "migrate")
}

// Logical decoding does not send generated columns.
func TestGeneratedColumnInTheSubject(t *testing.T) {
	t.Parallel()
	b := setupFresh(t)
	kind := "stored"
	if b.count(`select current_setting('server_version_num')::int`) >= 180000 {
		kind = "virtual"
	}
	b.exec(`alter table events add column region text generated always as (upper(aggregate_type)) ` + kind)
	b.requireSaid(b.with("SUBJECT=events.{aggregate_type}.{region}"),
		`column "region" of table "public"."events" is generated, which logical decoding does not send: leave it out of OUTBOX_SUBJECT, or `, "run", "doctor", "migrate")
	b.exec(`alter table events drop column region, add column region text default 'eu'`)
	b.migrate("SUBJECT=events.{aggregate_type}.{region}")
	b.requireWorks("SUBJECT=events.{aggregate_type}.{region}")
}
