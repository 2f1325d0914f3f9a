package decoder_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"outbox-relay/decoder"
	"outbox-relay/internal/testenv"
	"outbox-relay/migrations"
	"outbox-relay/outbox/event"
	"outbox-relay/replication"
)

var update = flag.Bool("update", false, "write testdata/session.* from what Postgres sends now")

// session is what a walsender sent, message by message.
type session struct {
	table    uint32 // OID of the outbox
	messages [][]byte
}

// sessionColumns are those of the captured sessions.
var sessionColumns = event.Columns{Extra: []string{"tenant"}}

// history is what happened while a session was captured. Each statement is a
// transaction, and the last one inserts the event "last".
var history = []string{
	`insert into events (aggregate_type, event_type, payload, tenant) values
		('order', 'created', '{"b": 1, "a": [1.10, 12345678901234567890, 1e400]}', 'acme'), ('order', 'paid', 'null', null)`,
	`insert into events (aggregate_type, event_type, payload, aggregate_id, headers) values
		('Größe', E'tab\tline\n', '"\u00e9 \" \\"', '', '{"traceparent": "00-1"}')`,
	`insert into elsewhere values (1, 'not an event')`,
	`do $$ begin
		insert into events (aggregate_type, event_type, payload) values ('order', 'in a savepoint', '1');
		begin
			insert into events (aggregate_type, event_type, payload) values ('order', 'rolled back', '2');
			raise exception 'x';
		exception when others then null;
		end;
		insert into elsewhere values (2, 'between');
		perform pg_logical_emit_message(true, 'a prefix', 'content');
		perform pg_logical_emit_message(false, 'a prefix', 'content');
		insert into events (aggregate_type, event_type, payload) values ('order', 'behind it', '3');
	end $$`,
	`update events set status = 'published'; delete from events where event_type = 'paid'`,
	`alter publication outbox_relay set (publish = 'insert, update, delete, truncate');
		create type mood as enum ('calm', 'stormy'); alter table elsewhere add column mood mood, alter column payload set storage external`,
	`insert into elsewhere values (3, repeat('x', 3000), 'calm'); update elsewhere set mood = 'stormy' where id = 3;
		update elsewhere set id = 4 where id = 3; delete from elsewhere where id = 4`,
	`alter table elsewhere replica identity full`,
	`update elsewhere set payload = null where id = 1; delete from elsewhere where id = 2`,
	`truncate elsewhere, events`,
	`alter publication outbox_relay set (publish = 'insert')`,
	`select pg_replication_origin_create(current_database()); select pg_replication_origin_session_setup(current_database())`,
	`insert into events (aggregate_type, event_type, payload) values ('order', 'replicated', '[]')`,
	`select pg_replication_origin_session_reset()`,
	`alter table events add column more text default 'more'; alter table events alter column tenant set default 'none'`,
	`insert into events (aggregate_type, event_type, payload) values ('order', 'toasted', (select to_jsonb(string_agg(md5(n::text), '')) from generate_series(1, 300) n))`,
	`insert into events (aggregate_type, event_type, payload, tenant) values ('order', 'last', '{}', '')`,
}

// capture lets the history happen and returns what came out of a slot. The rows
// that it inserted stay in the returned connection's database, in their order,
// in the table kept.
func capture(t *testing.T) (session, *pgx.Conn) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	url := testenv.InhabitedDatabase(t, testenv.Postgres(t))
	config, err := pgx.ParseConfig(url)
	must(err)
	sql, err := pgx.ConnectConfig(t.Context(), config)
	must(err)
	t.Cleanup(func() { sql.Close(context.Background()) })
	target := migrations.Target{Schema: "public", Table: "events", Publication: "outbox_relay"}
	must(migrations.Up(t.Context(), config, target, slog.New(slog.DiscardHandler)))
	_, err = sql.Exec(t.Context(), `
		alter table events add column tenant text;
		create table elsewhere (id int primary key, payload text);
		alter publication outbox_relay add table elsewhere;
		create table kept (n serial, like events);
		create function keep() returns trigger language plpgsql as
			'begin insert into kept select nextval(''kept_n_seq''), new.*; return null; end';
		create trigger keep after insert on events for each row execute function keep()`)
	must(err)
	target.Columns = sessionColumns.Extra
	must(migrations.Up(t.Context(), config, target, slog.New(slog.DiscardHandler)))

	conn, err := replication.Connect(t.Context(), &config.Config)
	must(err)
	t.Cleanup(conn.Close)
	slot, err := conn.CreateSlot(t.Context(), testenv.SlotName(t, url), false)
	must(err)
	for _, statement := range history {
		_, err := sql.Exec(t.Context(), statement)
		must(err)
	}
	reader, err := conn.Start(t.Context(), testenv.SlotName(t, url), "outbox_relay", slot.Point)
	must(err)
	var s session
	must(sql.QueryRow(t.Context(), `select 'events'::regclass::oid`).Scan(&s.table))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	err = reader.Run(ctx, &recorder{session: &s, stop: stop})
	if !errors.Is(err, replication.ErrStopped) {
		t.Fatal(err)
	}
	return s, sql
}

// recorder keeps the messages up to the end of the history.
type recorder struct {
	*session
	last bool
	stop func()
}

// Data also checks what the relay relies on: a Commit stands where its
// transaction ends.
func (r *recorder) Data(start pglogrepl.LSN, data []byte) error {
	if data[0] == 'C' && start != pglogrepl.LSN(order.Uint64(data[10:])) {
		return fmt.Errorf("the Commit %x stands at %s", data, start)
	}
	r.messages = append(r.messages, bytes.Clone(data))
	r.last = r.last || data[0] == 'I' && bytes.Contains(data, []byte("\x04last"))
	if r.last && data[0] == 'C' {
		r.stop()
	}
	return nil
}

func (r *recorder) Keepalive(pglogrepl.LSN, bool) error { return nil }
func (r *recorder) Idle()                               {}
func (r *recorder) Notice(string)                       {}
func (r *recorder) Lost(error)                          {}

// dump decodes the session and prints its transactions: what a reviewer reads
// beside the history. Long values are cut.
func (s session) dump(t testing.TB) (events []string, all string) {
	t.Helper()
	var out strings.Builder
	d := decoder.New(s.table, sessionColumns, event.Proof{})
	for i, m := range s.messages {
		kind, err := d.Decode(exact(m))
		if err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
		fmt.Fprintf(&out, "%c %d bytes", m[0], len(m))
		switch kind {
		case decoder.Insert:
			events = append(events, fields(&d.Event))
			fmt.Fprintf(&out, ": %s xid %d %s: %.200s", d.Event.Position, d.Event.XID,
				d.Event.Commit.UTC().Format("2006-01-02T15:04:05.000000Z"), fields(&d.Event))
		case decoder.Commit:
			fmt.Fprintf(&out, ": up to %s", d.End)
		}
		fmt.Fprintln(&out)
	}
	return events, out.String()
}

// What comes out of Postgres is what stands in its table.
func TestLiveSession(t *testing.T) {
	s, sql := capture(t)
	events, dump := s.dump(t)
	rows, err := sql.Query(t.Context(), `select id, version::text, aggregate_type, aggregate_id, event_type, payload::text,
		headers::text, 'pending', to_char(created_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.FF6+00'), tenant from kept order by n`)
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for rows.Next() {
		var e event.Event
		var dest []any
		for _, field := range sessionColumns.Fields(&e) {
			dest = append(dest, field.Value)
		}
		if err := rows.Scan(dest...); err != nil {
			t.Fatal(err)
		}
		e.CreatedAt = shortFraction(e.CreatedAt)
		want = append(want, fields(&e))
	}
	if rows.Err() != nil {
		t.Fatal(rows.Err())
	}
	if len(want) != 8 || !slices.Equal(events, want) {
		t.Errorf("decoded\n%.3000s\nthe table has\n%.3000s", strings.Join(events, "\n"), strings.Join(want, "\n"))
	}
	for _, kind := range "BRICOYMUDT" {
		if !strings.Contains("\n"+dump, fmt.Sprintf("\n%c ", kind)) {
			t.Errorf("the session has no message of kind %c:\n%s", kind, dump)
		}
	}
	if *update {
		s.write(t, dump)
	}
}

// shortFraction writes a fraction of a second as timestamptz does.
func shortFraction(v []byte) []byte {
	v = bytes.TrimRight(bytes.TrimSuffix(v, []byte("+00")), "0")
	return append(bytes.TrimSuffix(v, []byte(".")), "+00"...)
}

// A stored session decodes as it did when it was captured and read through.
func TestGoldenSession(t *testing.T) {
	want, err := os.ReadFile("testdata/session.txt")
	if err != nil {
		t.Fatal(err)
	}
	if _, got := golden(t).dump(t); got != string(want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// No message of the stored session, of whatever kind, is taken for a whole one
// when it is cut, wherever.
func TestGoldenSessionTruncated(t *testing.T) {
	s := golden(t)
	for i, m := range s.messages {
		for n := range len(m) {
			d := decoder.New(s.table, sessionColumns, event.Proof{})
			decode(t, d, s.prefix(i)...)
			if kind, err := d.Decode(exact(m[:n])); !errors.Is(err, decoder.ErrMalformed) || kind == decoder.Insert {
				t.Fatalf("message %d, cut at %d of %d bytes: kind %d, %v, want ErrMalformed", i, n, len(m), kind, err)
			}
		}
	}
}

// Whatever bit of the stored session flips, the session ends by an error with a
// name, or every event comes out of it, as pglogrepl reads it: none is passed
// over. What flips inside a value nobody can tell but the connection's own sums.
func TestGoldenSessionFlipped(t *testing.T) {
	s := golden(t)
	flips, told := 0, 0
	for i, m := range s.messages {
		want, err := s.replay(t, i, m)
		if err != nil {
			t.Fatal(err)
		}
		for bit := range 8 * min(len(m), 600) {
			flipped := exact(m)
			flipped[bit/8] ^= 1 << (bit % 8)
			events, err := s.replay(t, i, flipped)
			switch {
			case err != nil:
				told++
			case events != want:
				t.Fatalf("message %d, bit %d: %d events without an error, want %d", i, bit, events, want)
			}
			flips++
		}
	}
	t.Logf("%d bits flipped, %d of them told", flips, told)
	if told == 0 {
		t.Error("no flip was told")
	}
}

// replay decodes the session from message i on, with another one in its place,
// and counts the events.
func (s session) replay(t *testing.T, i int, other []byte) (events int, err error) {
	t.Helper()
	d := decoder.New(s.table, sessionColumns, event.Proof{})
	reference := reader{table: s.table}
	for _, m := range slices.Concat(s.prefix(i), [][]byte{other}, s.messages[i+1:]) {
		kind, err := d.Decode(exact(m))
		if err != nil {
			requireNamed(t, m, kind, err)
			return events, err
		}
		reference.check(t, d, kind, m)
		if kind == decoder.Insert {
			events++
		}
	}
	return events, nil
}

// prefix returns what message i needs before it.
func (s session) prefix(i int) [][]byte {
	var relation, begin [][]byte
	for _, m := range s.messages[:i] {
		switch m[0] {
		case 'R':
			relation = append(relation, m)
		case 'B':
			begin = [][]byte{m}
		case 'C':
			begin = nil
		}
	}
	return append(relation, begin...)
}

func (s session) write(t *testing.T, dump string) {
	t.Helper()
	var out bytes.Buffer
	fmt.Fprintf(&out, "%d\n", s.table)
	for _, m := range s.messages {
		fmt.Fprintf(&out, "%x\n", m)
	}
	for name, data := range map[string][]byte{"session.hex": out.Bytes(), "session.txt": []byte(dump)} {
		if err := os.WriteFile("testdata/"+name, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// golden reads testdata/session.hex: the table's OID, then a message a line.
func golden(t testing.TB) session {
	t.Helper()
	file, err := os.Open("testdata/session.hex")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var s session
	if _, err := fmt.Fscanln(file, &s.table); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		m, err := hex.DecodeString(lines.Text())
		if err != nil {
			t.Fatal(err)
		}
		s.messages = append(s.messages, m)
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return s
}
