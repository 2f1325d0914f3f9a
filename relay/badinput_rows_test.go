package relay_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

// insertRow inserts one event by its headers and payload, SQL expressions both.
func (b *bundle) insertRow(headers, payload string) (id string) {
	b.Helper()
	return b.text(`insert into events (aggregate_type, event_type, headers, payload)
		values ('order', 'created', ` + headers + `, ` + payload + `) returning id`)
}

// insertAs inserts an event by an id of the application's own.
func (b *bundle) insertAs(id, payload string) {
	b.Helper()
	b.exec(`insert into events (id, aggregate_type, event_type, payload, status, created_at)
		values ($1, 'order', 'created', $2, 'pending', now())`, id, payload)
}

// requireFailed waits until the row is parked, and compares its reason.
func (b *bundle) requireFailed(id string, words ...string) {
	b.Helper()
	b.requireStatus("failed", []string{id})
	if n := b.count(`select count(*) from events where id = $1 and failed_attempts = 1 and failed_at is not null
		and published_at is null and cardinality(failed_reasons) = 1`, id); n != 1 {
		b.Fatalf("row %s does not tell of one failed attempt", id)
	}
	reason := b.text(`select failed_reasons[1] from events where id = $1`, id)
	for _, want := range words {
		if !strings.Contains(reason, want) {
			b.Fatalf("row %s failed since %q, which does not say %q", id, reason, want)
		}
	}
}

// Rows that no message can carry fail with a reason that names what is wrong,
// and their neighbours are delivered in their order: each in a transaction of
// its own, and all in one.
func TestRowsThatNoMessageCanCarry(t *testing.T) {
	t.Parallel()
	cases := []struct {
		headers, payload string
		words            []string
	}{
		{`null`, `to_jsonb(repeat('x', 2000000))`, []string{"the message has 2000", "takes 1048576 (max_payload, max_msg_size)"}},
		{`jsonb_build_object('pad', repeat('x', 70000))`, `'1'`, []string{"the headers have 70", "NATS takes 65535"}},
		{`'{"Nats-Msg-Id": "forged"}'`, `'1'`, []string{`header "Nats-Msg-Id" is the relay's own`, "not for rows"}},
		{`'{"nats-expected-last-sequence": "0"}'`, `'1'`, []string{`header "nats-expected-last-sequence" is the relay's own`}},
		{`'{"OUTBOX-Position": "1/FFFFFFFF/FFFFFFFF/1"}'`, `'1'`, []string{`header "OUTBOX-Position" is the relay's own`}},
		{`'{"Ce-Id": "forged"}'`, `'1'`, []string{`header "Ce-Id" is the relay's own`}},
		{`'{"Content-Type": "text/html"}'`, `'1'`, []string{`header "Content-Type" is the relay's own`}},
		{`'{"a\r\nNats-Rollup": "all"}'`, `'1'`, []string{`header "a\r\nNats-Rollup" cannot be a header's name`}},
		{`'{"a": "b\r\nNats-Rollup: all"}'`, `'1'`, []string{`header "a" has a control character in its value`}},
		{`'{"retries": 3}'`, `'1'`, []string{`header "retries" is not a string`}},
		{`'["a"]'`, `'1'`, []string{"headers are not a JSON object"}},
		{`'null'`, `'1'`, []string{"headers are not a JSON object"}},
	}
	for _, together := range []bool{false, true} {
		t.Run(fmt.Sprintf("together=%t", together), func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			r := b.streaming()
			if together {
				b.exec(`begin`)
			}
			want := b.insert(1)
			bad := make([]string, len(cases))
			for i, c := range cases {
				bad[i] = b.insertRow(c.headers, c.payload)
				if i%3 != 0 { // some have a bad neighbour
					want = append(want, b.insert(2)...)
				}
			}
			if together {
				b.exec(`commit`)
			}
			for i, c := range cases {
				b.requireFailed(bad[i], c.words...)
				r.WaitLog("id=" + bad[i])
			}
			b.requireStatus("published", want)
			b.requireStream(want)
			requireLeaves(t, r)
		})
	}
}

// An id that cannot stand in a header, or that begins or ends with what readers
// trim, is no id of a message.
func TestIDsThatNoMessageCanCarry(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	b.exec(`alter table events disable trigger on_events_create`)
	b.insertAs("first", `1`)
	bad := []string{" led", "trailed ", "two\r\nlines", "\ttab"}
	for _, id := range bad {
		b.insertAs(id, `1`)
	}
	b.insertAs("événement 2", `1`)
	for _, id := range bad {
		b.requireFailed(id, "the id cannot stand in the header Nats-Msg-Id")
	}
	b.requireStream([]string{"first", "événement 2"})
	requireLeaves(t, r)
}

// A subject longer than the server's line would close the connection for good.
func TestSubjectTooLong(t *testing.T) {
	t.Parallel()
	b := setup(t)
	subject, columns := "SUBJECT=events", make([]string, 20)
	for i := range columns {
		columns[i] = fmt.Sprint("c", i)
		b.exec(`alter table events add column ` + columns[i] + ` text`)
		subject += ".{" + columns[i] + "}"
	}
	b.migrate(subject)
	r := b.streaming(subject)
	insert := func(bytes int) string {
		return b.text(`insert into events (aggregate_type, event_type, payload, `+strings.Join(columns, ", ")+`)
			values ('order', 'created', '1'`+strings.Repeat(`, repeat('x', $1)`, len(columns))+`) returning id`, bytes)
	}
	ids := []string{insert(180)}
	bad := insert(200)
	ids = append(ids, insert(10))
	b.requireFailed(bad, "the subject has 4026 bytes: NATS takes")
	b.requireStream(ids)
	b.requireStatus("published", ids)
	if strings.Contains(r.Logs(), "publishing is interrupted") {
		t.Fatal("the connection was lost")
	}
	requireLeaves(t, r)
}

// What the server refuses, since the stream takes less than it did when the relay
// looked, is parked in its place: the refusal names no event, and the limits that are
// read after it do.
func TestStreamTakesLessThanBefore(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	ids := b.insert(3)
	b.requireStatus("published", ids)
	config := b.stream().CachedInfo().Config
	config.MaxMsgSize = 2000
	_, err := b.js.UpdateStream(t.Context(), config)
	b.must(err)
	insert := func() (string, []string) {
		b.exec(`begin`)
		defer b.exec(`commit`)
		before := b.insert(2)
		bad := b.insertRow(`null`, `to_jsonb(repeat('x', 3000))`)
		return bad, append(before, b.insert(2)...)
	}
	refused, some := insert()
	b.requireFailed(refused, "takes 2000 (max_payload, max_msg_size)")
	r.WaitLog("the stream refuses a message: message size exceeds maximum allowed (JetStream error 10054)")
	known, more := insert()
	b.requireFailed(known, "takes 2000 (max_payload, max_msg_size)")
	ids = append(append(ids, some...), more...)
	b.requireStream(ids)
	b.requireStatus("published", ids)
	requireLeaves(t, r)
}

// A server that comes back taking less would close the connection on an event
// that was on its way.
func TestServerTakesLessThanBefore(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	ids := b.insert(3)
	b.requireStatus("published", ids)
	b.nats.Stop()
	ids = append(ids, b.insert(2)...)
	bad := b.insertRow(`null`, `to_jsonb(repeat('x', 30000))`)
	ids = append(ids, b.insert(2)...)
	b.restartNATS(10_000)
	b.requireFailed(bad, "takes 10000 (max_payload, max_msg_size)")
	b.requireStream(ids)
	b.requireStatus("published", ids)
	requireLeaves(t, r)
}

// restartNATS starts a server with that max_payload in the place of the one
// that was stopped.
func (b *bundle) restartNATS(maxPayload int32) {
	b.Helper()
	port, store := strings.TrimPrefix(b.nats.URL(), "nats://127.0.0.1:"), b.nats.StoreDir()
	b.nats = testenv.NATS(b, testenv.NATSOptions{MaxPayload: maxPayload, Edit: func(o *server.Options) {
		fmt.Sscan(port, &o.Port)
		o.StoreDir = store
	}})
}

// ON_REJECT=halt: the relay ends before the event, and names it and the ways on.
func TestHaltBeforeARejectedEvent(t *testing.T) {
	t.Parallel()
	b := setup(t)
	config := jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.*.*"}, MaxMsgSize: 2000}
	b.makeStream(config)
	r := b.streaming("ON_REJECT=halt")
	before := b.insert(2)
	large := b.insertRow(`null`, `to_jsonb(repeat('x', 3000))`)
	between := b.insert(2)
	forged := b.insertRow(`'{"Nats-Msg-Id": "forged"}'`, `'1'`)
	after := b.insert(2)

	requireHalted := func(r *testenv.Relay, id, reason string) {
		t.Helper()
		requireEnd(t, r, 1, "halted before event "+id, "can never be stored: "+reason, "raise the limit that it exceeds", "OUTBOX_ON_REJECT=park")
	}
	requireHalted(r, large, "the message has 3")
	requireHalted(b.start("ON_REJECT=halt"), large, "the message has 3")
	b.requireStream(before)
	b.requireStatus("published", before)
	b.requireStatus("pending", append(append(between, after...), large, forged))

	config.MaxMsgSize = 10_000 // the one way
	_, err := b.js.UpdateStream(t.Context(), config)
	b.must(err)
	requireHalted(b.start("ON_REJECT=halt"), forged, `the row's header "Nats-Msg-Id"`)
	want := append(append(before, large), between...)
	b.requireStream(want)
	b.requireStatus("published", want)

	b.streaming() // the other
	b.requireFailed(forged, "Nats-Msg-Id")
	b.requireStatus("published", after)
	b.requireStream(append(want, after...))
}

// Halted by the server's answer: what was sent behind the event is refused with
// it, since it is chained.
func TestHaltBeforeAnEventThatTheServerRefuses(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming("ON_REJECT=halt")
	ids := b.insert(2)
	b.requireStatus("published", ids)
	config := b.stream().CachedInfo().Config
	config.MaxMsgSize = 2000
	_, err := b.js.UpdateStream(t.Context(), config)
	b.must(err)
	b.exec(`begin`)
	more := b.insert(2)
	bad := b.insertRow(`null`, `to_jsonb(repeat('x', 3000))`)
	after := b.insert(100)
	forged := b.insertRow(`'{"Nats-Msg-Id": "forged"}'`, `'1'`) // found before the server has answered
	b.exec(`commit`)
	requireEnd(t, r, 1, "halted before event "+bad, "JetStream error 10054", "OUTBOX_ON_REJECT=park")
	b.requireStream(append(ids, more...))
	b.requireStatus("pending", append(after, bad, forged))
	b.streaming()
	b.requireFailed(bad, "takes 2000")
	b.requireFailed(forged, "Nats-Msg-Id")
	b.requireStatus("published", append(more, after...))
	b.requireStream(append(append(ids, more...), after...))
}

// An id names one message of a stream. While the stream remembers it the second
// one fails, by the message that bears it.
func TestIDUsedTwice(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming("STREAM_DUPLICATE_WINDOW=1h")
	b.exec(`alter table events disable trigger on_events_create`)
	b.insertAs("first", `1`)
	b.insertAs("twice", `1`)
	b.requireStatus("published", []string{"first", "twice"})
	b.exec(`delete from events where id = 'twice'`)
	b.exec(`begin`)
	b.insertAs("before", `1`)
	b.insertAs("twice", `2`)
	b.insertAs("after", `1`)
	b.exec(`commit`)
	b.requireFailed("twice", "its id is taken: message 2 of stream EVENTS bears it")
	b.requireStatus("published", []string{"before", "after"})
	b.requireStream([]string{"first", "twice", "before", "after"})
	requireLeaves(t, r)
}

// The same within one transaction: the row that is there bears the id that is
// stored; the log tells of the other.
func TestIDUsedTwiceInOneTransaction(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	b.exec(`alter table events disable trigger on_events_create`)
	b.exec(`begin`)
	b.insertAs("before", `1`)
	b.insertAs("twice", `1`)
	b.exec(`delete from events where id = 'twice'`)
	b.insertAs("twice", `2`)
	b.insertAs("after", `1`)
	b.exec(`commit`)
	b.requireStatus("published", []string{"before", "after"})
	messages := b.requireStream([]string{"before", "twice", "after"})
	if body := string(messages[1].Data); body != "1" {
		t.Fatalf("body %s", body)
	}
	r.WaitLog(`id=twice reason="its id is taken: message 2 of stream EVENTS bears it"`)
	requireLeaves(t, r)
}

// Behind the stream's memory an id is as good as another, also for the matching
// after a crash.
func TestIDUsedAgainLater(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming(noWindow)
	b.exec(`alter table events disable trigger on_events_create`)
	want := []string{"first", "again"}
	for _, id := range want {
		b.insertAs(id, `1`)
	}
	b.requireStatus("published", want)
	b.exec(`delete from events where id = 'again'`)
	stored := time.Now()
	testenv.Eventually(t, "the window to pass", func() bool { return time.Since(stored) > 150*time.Millisecond })
	b.nats.Restart() // reads the ids that are in the window
	release := b.holdRecording()
	for _, id := range []string{"before", "again", "after"} {
		b.insertAs(id, `2`)
		want = append(want, id)
	}
	b.requireStream(want)
	b.killUnrecorded(r, release)
	b.streaming(noWindow)
	b.insertAs("last", `1`)
	b.requireStatus("published", []string{"before", "again", "after", "last"})
	b.requireStream(append(want, "last"))
}

// Whether a row is still there when its event is recorded is the application's
// affair: the event was committed, and is delivered.
func TestRowDeletedBeforeItWasRecorded(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"mark", "delete", "keep"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			r := b.streaming("AFTER_PUBLISH=" + mode)
			tx, err := b.connect().Begin(t.Context()) // nothing is recorded, nor the rows looked at
			b.must(err)
			_, err = tx.Exec(t.Context(), `lock table outbox_relay_checkpoints`)
			b.must(err)
			ids := b.insert(4)
			bad := b.insertTooLarge()
			b.requireStream(ids)
			b.exec(`delete from events where id = any ($1)`, append(ids[1:3:3], bad))
			b.must(tx.Commit(t.Context()))
			more := b.insert(2)
			b.requireStream(append(ids, more...))
			testenv.Eventually(t, "the rejected event kept whole", func() bool {
				return b.count(`select count(*) from outbox_relay_leftovers where id = $1 and outcome = 'failed'
					and reason like 'the message has %' and length(event ->> 'payload') = 2000000`, bad) == 1
			})
			r.WaitLog("kept whole in outbox_relay_leftovers")
			if mode != "keep" {
				r.WaitLog("rows are gone or no longer pending")
			}
			switch left := append(ids[:1:1], append(ids[3:4:4], more...)...); mode {
			case "mark":
				b.requireStatus("published", left)
			case "delete":
				b.requireNoRows(left)
			case "keep":
				b.requireStatus("pending", left)
			}
			requireLeaves(t, r)
		})
	}
}

// Inserts that were committed are events, whatever their transaction did to the
// rows afterwards; what was rolled back never was.
func TestTransactionsOfAllKinds(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	var want []string
	deliver := func(ids []string) { want = append(want, ids...) }

	b.exec(`begin`)
	deliver(b.insert(2))
	b.exec(`delete from events where aggregate_type <> 'history'`)
	b.exec(`commit`)

	b.exec(`begin`)
	b.insert(3)
	b.exec(`rollback`)

	b.exec(`begin`)
	deliver(b.insert(1))
	b.exec(`savepoint a`)
	b.insert(2)
	b.exec(`savepoint b`)
	b.insert(2)
	b.exec(`rollback to a`)
	deliver(b.insert(1))
	b.exec(`savepoint c`)
	deliver(b.insert(1))
	b.exec(`release c`)
	b.exec(`commit`)

	b.exec(`begin`)
	b.insert(1)
	if _, err := b.sql.Exec(t.Context(), `select 1 / 0`); err == nil {
		t.Fatal("no error")
	}
	b.exec(`commit`) // is a rollback

	b.exec(`begin`)
	deliver(b.insert(2))
	b.exec(`truncate events`)
	deliver(b.insert(1))
	b.exec(`commit`)
	deliver(b.insert(100))
	b.exec(`truncate events`)
	deliver(b.insert(2))
	b.requireStream(want)
	b.requireStatus("published", want[len(want)-2:])
	if n := b.count(`select count(*) from outbox_relay_leftovers`); n != 0 {
		t.Fatalf("%d leftovers", n)
	}
	requireLeaves(t, r)
}

// A row that was born published, such as one that is copied or moved from one
// partition to another, is no event, and is told.
func TestInsertedWithAnotherStatus(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	b.exec(`alter table events disable trigger on_events_create`)
	b.insertAs("first", `1`)
	b.exec(`insert into events (id, aggregate_type, event_type, payload, status, created_at)
		select s, 'order', 'created', '1', s, now() from unnest('{published,failed}'::text[]) s`)
	b.insertAs("last", `1`)
	b.requireStatus("published", []string{"first", "last"})
	b.requireStream([]string{"first", "last"})
	for _, status := range []string{"published", "failed"} {
		r.WaitLog(`msg="ignored an insert whose status is not pending" id=` + status + ` status=` + status)
	}
	b.requireStatus("failed", []string{"failed"})
	requireLeaves(t, r)
}

// Every kind of JSON is a payload, and comes as Postgres writes it.
func TestPayloadsOfAllKinds(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	for _, payload := range []string{`null`, `true`, `""`, `"a\u0001\t\\\"é😀"`, `0`, `-0.0`, `1.50`, `9007199254740993`, `-18446744073709551617`,
		`1e400`, `1e-20`, `[]`, `{}`, `{"n": 9223372036854775808, "f": 0.30000000000000004, "deep": [[[{"": null}]]]}`} {
		b.insertRow(`null`, `'`+payload+`'`)
	}
	ids := b.ids()
	for _, m := range b.requireStream(ids) {
		if want := b.text(`select payload::text from events where id = $1`, m.id); string(m.Data) != want {
			t.Errorf("body %s, want %s", m.Data, want)
		}
	}
	b.requireStatus("published", ids)
	requireLeaves(t, r)
}
