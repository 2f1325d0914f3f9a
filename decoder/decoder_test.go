package decoder_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"

	"outbox-relay/decoder"
	"outbox-relay/outbox/event"
)

const (
	table = 16402 // OID of the outbox
	other = 16500 // of another table
)

var usual = []string{"id", "version", "aggregate_type", "aggregate_id", "event_type", "payload", "headers", "status", "created_at"}

func row(id string) [][]byte {
	return [][]byte{text(id), text("0"), text("order"), null(), text("created"), text(`{"n": 1}`), null(), text("pending"),
		text("2026-01-02 03:04:05.678901+00")}
}

// decode decodes messages that have to be right, and returns what each was.
func decode(t testing.TB, d *decoder.Decoder, messages ...[]byte) []decoder.Kind {
	t.Helper()
	var kinds []decoder.Kind
	for i, m := range messages {
		kind, err := d.Decode(exact(m))
		if err != nil {
			t.Fatalf("message %d, %q: %v", i, m, err)
		}
		kinds = append(kinds, kind)
	}
	return kinds
}

// fields prints each of the event's columns, apart by what NULL and empty are.
func fields(e *event.Event) string {
	show := func(v []byte) string {
		if v == nil {
			return "NULL"
		}
		return fmt.Sprintf("%q", v)
	}
	values := []string{show(e.ID), show(e.Version), show(e.AggregateType), show(e.AggregateID), show(e.EventType),
		show(e.Payload), show(e.Headers), show(e.Status), show(e.CreatedAt)}
	for _, v := range e.Extra {
		values = append(values, show(v))
	}
	return strings.Join(values, " ")
}

const rowFields = `"e1" "0" "order" NULL "created" "{\"n\": 1}" NULL "pending" "2026-01-02 03:04:05.678901+00"`

// The place of a column in the message is none of the decoder's business.
func TestColumnsInAnyOrder(t *testing.T) {
	orders := map[string][]int{"reversed": nil, "rotated": nil, "swapped": {1, 0, 2, 3, 4, 5, 6, 8, 7}}
	for i := range usual {
		orders["reversed"] = append(orders["reversed"], len(usual)-1-i)
		orders["rotated"] = append(orders["rotated"], (i+4)%len(usual))
	}
	for name, order := range orders {
		t.Run(name, func(t *testing.T) {
			var columns []string
			var values [][]byte
			for n, i := range order {
				columns = append(columns, fmt.Sprintf("more%d", n), usual[i]) // each behind one that nobody wants
				values = append(values, text("not wanted"), row("e1")[i])
			}
			d := decoder.New(table, event.Columns{}, event.Proof{})
			decode(t, d, relation(table, columns...), begin(10, 7), insert(table, values...))
			if got := fields(&d.Event); got != rowFields {
				t.Errorf("got  %s\nwant %s", got, rowFields)
			}
			if len(d.Missing) != 0 {
				t.Errorf("missing %q", d.Missing)
			}
		})
	}
}

func TestNullIsNotEmpty(t *testing.T) {
	d := decoder.New(table, event.Columns{Extra: []string{"tenant", "region"}}, event.Proof{})
	values := append(row("e1"), text(""), null())
	values[3], values[6] = text(""), text("")
	decode(t, d, relation(table, append(slices.Clone(usual), "tenant", "region")...), begin(10, 7), insert(table, values...))
	const want = `"e1" "0" "order" "" "created" "{\"n\": 1}" "" "pending" "2026-01-02 03:04:05.678901+00" "" NULL`
	if got := fields(&d.Event); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	// What the next row has not does not stay from the one before.
	decode(t, d, insert(table, append(row("e2"), null(), text("eu"))...))
	const next = `"e2" "0" "order" NULL "created" "{\"n\": 1}" NULL "pending" "2026-01-02 03:04:05.678901+00" NULL "eu"`
	if got := fields(&d.Event); got != next {
		t.Errorf("got  %s\nwant %s", got, next)
	}
}

// A payload of bytes is what Postgres's hex says; what is no hex is no bytea.
func TestByteaPayload(t *testing.T) {
	d := decoder.New(table, event.Columns{Payload: "bytea"}, event.Proof{})
	values := row("e1")
	for i, c := range []struct{ text, want string }{{`\x`, ""}, {`\x00fF7b`, "\x00\xff{"}} {
		at := pglogrepl.LSN(10 * (i + 1))
		values[5] = text(c.text)
		data := insert(table, values...)
		before := slices.Clone(data)
		decode(t, d, relation(table, usual...), begin(at, 7), data)
		if string(d.Event.Payload) != c.want || d.Event.Payload == nil || !slices.Equal(data, before) {
			t.Errorf("%s: got %q, and the message is %q", c.text, d.Event.Payload, data)
		}
		decode(t, d, commit(at, at+1))
	}
	values[5] = null()
	decode(t, d, begin(30, 8), insert(table, values...))
	if d.Event.Payload != nil {
		t.Errorf("got %q, want NULL", d.Event.Payload)
	}
	for _, bad := range []string{`7b`, `\x7`, `\xzz`} {
		values[5] = text(bad)
		if _, err := d.Decode(insert(table, values...)); !errors.Is(err, decoder.ErrMalformed) {
			t.Errorf("%s: got %v", bad, err)
		}
	}
}

// A column that the publication lists only from some moment on is missing
// before, and is NULL, not the last row's.
func TestRelationIsExtended(t *testing.T) {
	d := decoder.New(table, event.Columns{Extra: []string{"tenant"}}, event.Proof{})
	short := []string{"id", "version", "aggregate_type", "event_type", "payload", "status", "created_at"}
	long := append(slices.Clone(usual), "tenant")
	shortRow := func(id string) []byte {
		r := row(id)
		return insert(table, r[0], r[1], r[2], r[4], r[5], r[7], r[8])
	}
	longRow := row("e2")
	longRow[3], longRow[6] = text("o-1"), text(`{"k": "v"}`)

	decode(t, d, relation(table, short...), begin(10, 7), shortRow("e1"))
	want := []string{"aggregate_id", "headers", "tenant"}
	if !slices.Equal(d.Missing, want) {
		t.Errorf("missing %q, want %q", d.Missing, want)
	}
	decode(t, d, relation(table, long...), insert(table, append(longRow, text("acme"))...))
	if len(d.Missing) != 0 {
		t.Errorf("missing %q, want none", d.Missing)
	}
	if got := string(d.Event.Extra[0]); got != "acme" {
		t.Errorf("tenant %q", got)
	}
	decode(t, d, relation(table, short...), shortRow("e3"))
	if !slices.Equal(d.Missing, want) {
		t.Errorf("missing %q, want %q", d.Missing, want)
	}
	if got, want := fields(&d.Event), strings.Replace(rowFields, "e1", "e3", 1)+" NULL"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// A table of the same name is not the outbox: the OID is.
func TestRelationByOID(t *testing.T) {
	d := decoder.New(table, event.Columns{}, event.Proof{})
	kinds := decode(t, d, relation(other, usual...), relation(table, usual...), begin(10, 7),
		insert(other, row("not ours")...), insert(table, row("e1")...), insert(other, row("not ours")...), insert(table, row("e2")...))
	want := []decoder.Kind{decoder.Nothing, decoder.Nothing, decoder.Nothing, decoder.Nothing, decoder.Insert, decoder.Nothing, decoder.Insert}
	if !slices.Equal(kinds, want) {
		t.Errorf("kinds %v, want %v", kinds, want)
	}
	if got := string(d.Event.ID); got != "e2" {
		t.Errorf("id %q", got)
	}
	if got := d.Event.Position.Ordinal; got != 2 {
		t.Errorf("ordinal %d: another table's inserts count", got)
	}
}

// The session sends the Relation again whenever it likes: ordinals count on.
func TestPositions(t *testing.T) {
	d := decoder.New(table, event.Columns{}, event.Proof{})
	in := func(want bool) {
		t.Helper()
		if d.InTransaction() != want {
			t.Fatalf("in transaction: %v", !want)
		}
	}
	position := func(want event.Position, xid uint32) {
		t.Helper()
		if d.Event.Position != want || d.Event.XID != xid {
			t.Fatalf("position %v of transaction %d, want %v of %d", d.Event.Position, d.Event.XID, want, xid)
		}
	}
	in(false)
	decode(t, d, begin(0x1_00000010, 7))
	in(true)
	decode(t, d, relation(table, usual...), insert(table, row("e1")...))
	position(event.Position{Commit: 0x1_00000010, Ordinal: 1}, 7)
	decode(t, d, relation(table, usual...), logical("any", "message"), typeOf(20000, "mood"), origin("elsewhere"), insert(table, row("e2")...))
	position(event.Position{Commit: 0x1_00000010, Ordinal: 2}, 7)
	if want := time.Date(2000, 1, 1, 0, 0, 1, 0, time.UTC); !d.Event.Commit.Equal(want) {
		t.Errorf("committed at %s, want %s", d.Event.Commit, want)
	}
	if kinds := decode(t, d, commit(0x1_00000010, 0x1_00000048)); kinds[0] != decoder.Commit {
		t.Errorf("kind %d", kinds[0])
	}
	in(false)
	if d.End != 0x1_00000048 {
		t.Errorf("end %s: it is TransactionEndLSN, not the commit's own", d.End)
	}
	decode(t, d, begin(0x1_00000099, 0xFFFFFFFF), insert(table, row("e3")...))
	position(event.Position{Commit: 0x1_00000099, Ordinal: 1}, 0xFFFFFFFF)
}

// The messages are right one by one, and wrong in what they follow or hold.
func TestMalformed(t *testing.T) {
	ready := [][]byte{relation(table, usual...), begin(10, 7)}
	column := func(at int, value []byte) []byte {
		r := row("e1")
		r[at] = value
		return insert(table, r...)
	}
	long := order.AppendUint32([]byte{'t'}, 0xFFFFFFFF) // a length that wraps round in 32 bits
	for name, c := range map[string]struct {
		before  [][]byte
		message []byte
	}{
		"empty":                       {ready, nil},
		"unknown kind":                {ready, []byte("Zzz")},
		"a stream of version 2":       {ready, []byte("S\x00\x00\x00\x07\x01")},
		"insert before relation":      {[][]byte{begin(10, 7)}, insert(table, row("e1")...)},
		"insert outside":              {[][]byte{relation(table, usual...)}, insert(table, row("e1")...)},
		"insert after commit":         {[][]byte{ready[0], ready[1], commit(10, 20)}, insert(table, row("e1")...)},
		"insert of an old row":        {ready, append(order.AppendUint32([]byte{'I'}, table), "O\x00\x00"...)},
		"begin inside":                {ready, begin(30, 8)},
		"commit outside":              {nil, commit(10, 20)},
		"commit of another":           {ready, commit(11, 20)},
		"a column less":               {ready, insert(table, row("e1")[:8]...)},
		"a column more":               {ready, insert(table, append(row("e1"), text("x"))...)},
		"unchanged toast":             {ready, column(5, []byte{'u'})},
		"binary":                      {ready, column(5, append(order.AppendUint32([]byte{'b'}, 1), 1))},
		"longer than its message":     {ready, column(8, append(order.AppendUint32([]byte{'t'}, 2), 'x'))},
		"as long as can be said":      {ready, column(8, long)},
		"the same, columns follow":    {ready, column(2, long)},
		"bytes behind":                {ready, append(insert(table, row("e1")...), 0)},
		"relation without its column": {nil, relation(table, usual...)[:40]},
		"relation and more":           {nil, append(relation(table, usual...), 0)},
		"begin and more":              {ready[:1], append(begin(10, 7), 0)},
		"begin that ends nowhere":     {ready[:1], begin(0, 7)},
		"begin before the last's end": {append(ready, commit(10, 20)), begin(19, 8)},
		"commit and more":             {ready, append(commit(10, 20), 0)},
		"commit with flags":           {ready, append([]byte{'C', 1}, commit(10, 20)[2:]...)},
		"commit that ends before":     {ready, commit(10, 10)},
		"insert of an unknown table":  {ready, insert(other, row("e1")...)},
		"insert that became logical":  {ready, append([]byte{'M'}, insert(table, row("e1")...)[1:]...)},
		"insert that became a type":   {ready, append([]byte{'Y'}, insert(table, row("e1")...)[1:]...)},
		"another table's, cut":        {append(ready, relation(other, "id")), insert(other, text("12"))[:12]},
		"logical message and more":    {ready, append(logical("any", "message"), 0)},
	} {
		t.Run(name, func(t *testing.T) {
			d := decoder.New(table, event.Columns{}, event.Proof{})
			decode(t, d, c.before...)
			if kind, err := d.Decode(exact(c.message)); !errors.Is(err, decoder.ErrMalformed) || kind == decoder.Insert {
				t.Errorf("kind %d, error %v: want ErrMalformed", kind, err)
			}
		})
	}
}

// A message that was cut off, wherever, is malformed: never a shorter value,
// never a panic.
func TestTruncated(t *testing.T) {
	ready := [][]byte{relation(table, usual...), begin(10, 7)}
	for name, c := range map[string]struct {
		before  [][]byte
		message []byte
	}{
		"begin":    {ready[:1], begin(10, 7)},
		"commit":   {ready, commit(10, 20)},
		"relation": {nil, relation(table, usual...)},
		"insert":   {ready, insert(table, row("e1")...)},
		"another":  {append(ready, relation(other, "id")), insert(other, text("1"))},
		"logical":  {ready, logical("any", "message")},
		"type":     {ready, typeOf(20000, "mood")},
		"origin":   {ready, origin("elsewhere")},
	} {
		t.Run(name, func(t *testing.T) {
			for n := range len(c.message) {
				d := decoder.New(table, event.Columns{}, event.Proof{})
				decode(t, d, c.before...)
				if _, err := d.Decode(exact(c.message[:n])); !errors.Is(err, decoder.ErrMalformed) {
					t.Fatalf("cut at %d of %d bytes: %v, want ErrMalformed", n, len(c.message), err)
				}
			}
		})
	}
}

// One goroutine decodes for all: the heap must have no part in an event.
func TestDecodingAllocatesNothing(t *testing.T) {
	d := decoder.New(table, event.Columns{Extra: []string{"tenant"}}, event.Proof{})
	decode(t, d, relation(table, append(slices.Clone(usual), "tenant")...), relation(other, "id"))
	transaction := [][]byte{begin(10, 7), insert(table, append(row("e1"), text("acme"))...), insert(other, text("x")),
		insert(table, append(row("e2"), null())...), commit(10, 20)}
	at := uint64(10)
	allocations := testing.AllocsPerRun(1000, func() {
		at += 10 // each transaction commits behind the one before
		order.PutUint64(transaction[0][1:], at)
		order.PutUint64(transaction[4][2:], at)
		order.PutUint64(transaction[4][10:], at+10)
		for _, m := range transaction {
			if _, err := d.Decode(m); err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Logf("%v allocations in a transaction of two events", allocations)
	if allocations != 0 {
		t.Errorf("%v allocations in a transaction of two events, want none", allocations)
	}
}

// A Relation of the outbox without the id is no malformed one: somebody renamed
// the column, or took it out of the publication.
func TestRelationWithoutID(t *testing.T) {
	d := decoder.New(table, event.Columns{}, event.Proof{})
	if _, err := d.Decode(relation(table, usual[1:]...)); !errors.Is(err, decoder.ErrNoID) {
		t.Errorf("got %v, want ErrNoID", err)
	}
	decode(t, d, relation(other, usual[1:]...)) // of another table it says nothing
}
