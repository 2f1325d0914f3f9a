package relay_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/testenv"
)

// debezium is the table of Debezium's documentation of its outbox event router,
// with the payload's type, and perhaps more columns.
const debezium = `create table outboxevent (
	id            uuid                   not null primary key,
	aggregatetype character varying(255) not null,
	aggregateid   character varying(255) not null,
	type          character varying(255) not null,
	payload       %s)`

// debeziumColumns are what its user sets.
var debeziumColumns = []string{"TABLE=outboxevent", "PUBLICATION=debezium_relay",
	"COLUMN_AGGREGATE_TYPE=aggregatetype", "COLUMN_AGGREGATE_ID=aggregateid", "COLUMN_EVENT_TYPE=type"}

// owned is a bundle whose outbox is the application's own.
type owned struct{ *bundle }

func setupOwned(t testing.TB, create string, variables ...string) owned {
	o := owned{setup(t)}
	o.exec(create)
	o.env = o.with(append(slices.Clone(debeziumColumns), variables...)...)
	return o
}

func (o owned) migrate() {
	o.Helper()
	o.command("migrate")
}

// command runs a command to its good end.
func (o owned) command(args ...string) *testenv.Relay {
	o.Helper()
	r := testenv.StartRelay(o, o.env, args...)
	if code := r.Wait(30 * time.Second); code != 0 {
		o.Fatalf("%s: exit code %d\n%s", args, code, r.Logs())
	}
	return r
}

// insertOrders inserts as Debezium's users do, and returns the ids in their order.
func (o owned) insertOrders(n int) []string {
	o.Helper()
	rows, err := o.sql.Query(o.Context(), `insert into outboxevent (id, aggregatetype, aggregateid, type, payload)
		select gen_random_uuid(), 'Order', i::text, 'OrderCreated', format('{"n":   %s}', i)::jsonb from generate_series(1, $1) i returning id::text`, n)
	o.must(err)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	o.must(err)
	return ids
}

func (o owned) await(status string, ids []string) {
	o.Helper()
	testenv.Eventually(o, fmt.Sprintf("%d rows %s", len(ids), status), func() bool {
		return o.count(`select count(*) from outboxevent where id::text = any ($1) and status = $2`, ids, status) == len(ids)
	})
}

// The table of Debezium's documentation, and the application's statements as they
// were: the rows that are there already, new ones, a crash, one that can't be
// stored, a retry, and a replay.
func TestDebeziumOutbox(t *testing.T) {
	t.Parallel()
	o := setupOwned(t, fmt.Sprintf(debezium, "jsonb"))
	before := o.insertOrders(3)
	slices.Sort(before) // rows from before the slot come in the order of their ids
	o.migrate()
	o.migrate()

	r := o.streaming()
	ids := append(before, o.insertOrders(500)...)
	o.exec(`insert into outboxevent values ('00000000-0000-0000-0000-00000000000a', 'Order', '7', 'OrderLine Updated', '{"total": 1.10}')`)
	ids = append(ids, "00000000-0000-0000-0000-00000000000a")
	message := o.requireStream(ids)[len(ids)-1]
	if message.Subject != "events.Order.OrderLine=20Updated" || string(message.Data) != `{"total": 1.10}` {
		t.Errorf("%s %s", message.Subject, message.Data)
	}
	for name, want := range map[string]string{"ce-id": ids[len(ids)-1], "ce-type": "OrderLine%20Updated", "ce-aggregatetype": "Order",
		"ce-subject": "7", "ce-eventversion": "0", "content-type": "application/json"} {
		if got := message.Header.Get(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if at, err := time.Parse(time.RFC3339, message.Header.Get("ce-time")); err != nil || time.Since(at).Abs() > time.Hour {
		t.Errorf("ce-time is %s (%v)", at, err)
	}
	o.await("published", ids)
	r.Kill()

	more := o.insertOrders(100)
	r = o.streaming()
	ids = append(ids, more...)
	o.requireStream(ids)

	o.exec(`insert into outboxevent (id, aggregatetype, aggregateid, type, payload)
		values ('00000000-0000-0000-0000-00000000000b', 'Order', '7', 'Large', to_jsonb(repeat('x', 2000000)))`)
	large := []string{"00000000-0000-0000-0000-00000000000b"}
	o.await("failed", large)
	o.exec(`update outboxevent set payload = '"small"' where id = $1`, large[0])
	o.command("retry", large[0])
	o.requireStream(append(slices.Clone(ids), large...))
	o.await("published", large)
	if logs := o.command("status").Logs(); !strings.Contains(logs, "published") {
		t.Error(logs)
	}
	if logs := o.command("doctor").Logs(); !strings.Contains(logs, "none is needed") {
		t.Error(logs)
	}
	o.command("replay", "--event-type", "OrderLine Updated", "--run", "again", "--yes")
	o.requireStream(append(append(slices.Clone(ids), large...), "00000000-0000-0000-0000-00000000000a:again"))
	if code := r.Terminate(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// Debezium's users often delete a row in the transaction that inserts it: WAL has
// it all the same. What can't be stored is kept whole, since its row is gone.
func TestDebeziumOutboxThatIsAlwaysEmpty(t *testing.T) {
	t.Parallel()
	o := setupOwned(t, fmt.Sprintf(debezium, "jsonb"), "AFTER_PUBLISH=keep")
	o.migrate()
	o.streaming()
	o.exec(`begin; insert into outboxevent values ('00000000-0000-0000-0000-00000000000a', 'Order', '7', 'Created', '{"n": 1}'); delete from outboxevent; commit`)
	o.exec(`begin; insert into outboxevent values ('00000000-0000-0000-0000-00000000000b', 'Order', '7', 'Large', to_jsonb(repeat('x', 2000000))); delete from outboxevent; commit`)
	o.exec(`begin; insert into outboxevent values ('00000000-0000-0000-0000-00000000000c', 'Order', '7', 'Deleted', null); delete from outboxevent; commit`)
	messages := o.requireStream([]string{"00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000c"})
	if len(messages[1].Data) != 0 {
		t.Errorf("without a payload the body is %q", messages[1].Data)
	}
	testenv.Eventually(t, "the large event to be kept", func() bool {
		return o.count(`select count(*) from outbox_relay_leftovers where id = '00000000-0000-0000-0000-00000000000b'
			and event->>'aggregatetype' = 'Order' and length(event->>'payload') = 2000000`) == 1
	})
}

// Other types of payload and time, and columns of the application's that carry
// headers: the body is what the application wrote, to the byte.
func TestDebeziumOutboxTypes(t *testing.T) {
	t.Parallel()
	const moment = `'2026-11-25 12:30:00.5+00'`
	for _, c := range []struct {
		payload, time string // types
		value         string // of the payload, in SQL
		body          string
		contentType   string
	}{
		{"bytea", "timestamp", `'\x00ff0d0a7b'`, "\x00\xff\r\n{", "application/octet-stream"},
		{"character varying(8000)", "timestamptz", `'{"b":  1, "a": 2}'`, `{"b":  1, "a": 2}`, "application/json"},
		{"json", "timestamp", `'{"a":1, "a":  2}'`, `{"a":1, "a":  2}`, "application/json"},
	} {
		t.Run(c.payload, func(t *testing.T) {
			t.Parallel()
			create := strings.TrimSuffix(fmt.Sprintf(debezium, c.payload), ")") + `, "Extra Headers" jsonb, timestamp ` + c.time + ` not null)`
			o := setupOwned(t, create, `COLUMN_HEADERS="Extra Headers"`, "COLUMN_CREATED_AT=timestamp", "AFTER_PUBLISH=delete",
				"SUBJECT=shop.{aggregate_type}.{type}.{aggregateid}")
			row := func(id, name string) {
				o.exec(`insert into outboxevent (id, aggregatetype, aggregateid, type, payload, "Extra Headers", timestamp)
					values ('00000000-0000-0000-0000-00000000000` + id + `', 'Order', '7', 'Created', ` + c.value + `, '{"` + name + `": "x"}', ` + moment + `)`)
			}
			row("1", "tracestate") // read from the table
			o.migrate()
			o.streaming()
			row("2", "tracestate") // and from WAL
			row("3", "Nats-Msg-Id")
			messages := o.requireStream([]string{"00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002"})
			for _, m := range messages {
				got := fmt.Sprintf("%s %q %s %s %s", m.Subject, m.Data, m.Header.Get("content-type"), m.Header.Get("ce-time"), m.Header.Get("tracestate"))
				want := fmt.Sprintf("shop.Order.Created.7 %q %s 2026-11-25T12:30:00.5Z x", c.body, c.contentType)
				if got != want {
					t.Errorf("got  %s\nwant %s", got, want)
				}
			}
			testenv.Eventually(t, "one row to be left, failed", func() bool {
				return o.count(`select count(*) from outboxevent`) == 1 && o.count(`select count(*) from outboxevent where status = 'failed'`) == 1
			})
		})
	}
}

// What migrate can't work with, it refuses before it changes anything, and names
// the remedy.
func TestDebeziumOutboxMigrateRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		create  string
		env     []string
		message string
	}{
		"variables forgotten": {fmt.Sprintf(debezium, "jsonb"), []string{"COLUMN_AGGREGATE_TYPE=", "COLUMN_AGGREGATE_ID=", "COLUMN_EVENT_TYPE="},
			"has no column aggregate_type, event_type: if it is an outbox of your application's own"},
		"column unknown": {fmt.Sprintf(debezium, "jsonb"), []string{"COLUMN_CREATED_AT=at"}, "has no column at (OUTBOX_COLUMN_CREATED_AT)"},
		"no table":       {`select`, nil, "does not exist"},
		"padded id": {strings.Replace(fmt.Sprintf(debezium, "jsonb"), "uuid", "character(36)", 1), nil,
			"column \"id\" of table \"public\".\"outboxevent\" is of type character, which Postgres pads: ALTER TABLE"},
		"own status": {strings.Replace(fmt.Sprintf(debezium, "jsonb"), "payload", "status text not null, payload", 1), nil,
			"has a column status of its own"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := setupOwned(t, c.create, c.env...)
			r := testenv.StartRelay(o, o.env, "migrate")
			if code := r.Wait(30 * time.Second); code != 1 || !strings.Contains(r.Logs(), c.message) {
				t.Errorf("exit code %d, and not %q:\n%s", code, c.message, r.Logs())
			}
			if o.count(`select count(*) from pg_attribute where attrelid = to_regclass('outboxevent') and attname = 'failed_at'`) != 0 {
				t.Error("the table was changed all the same")
			}
		})
	}
}
