package decoder_test

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"github.com/jackc/pglogrepl"

	"outbox-relay/decoder"
	"outbox-relay/outbox/event"
)

// FuzzDecode feeds a session: each message behind its length in two bytes. It
// must not panic nor read behind a message; what it calls malformed it calls so;
// and what it accepts pglogrepl reads alike: events with their positions, commits
// with their ends, and nothing else for nothing. A byte less is malformed.
func FuzzDecode(f *testing.F) {
	s := golden(f)
	var all [][]byte
	for i, m := range s.messages {
		if len(m) > 2000 {
			continue
		}
		all = append(all, m)
		f.Add(s.table, pack(append(slices.Clone(s.prefix(i)), m)))
	}
	f.Add(s.table, pack(all))
	f.Add(uint32(table), pack([][]byte{relation(table, usual...), begin(10, 7), insert(table, row("e1")...), commit(10, 20)}))
	f.Fuzz(func(t *testing.T, table uint32, packed []byte) {
		d := decoder.New(table, sessionColumns, event.Proof{})
		reference := reader{table: table}
		messages := unpack(packed)
		accepted := 0
		for _, m := range messages {
			kind, err := d.Decode(m)
			if err != nil {
				requireNamed(t, m, kind, err)
				break
			}
			reference.check(t, d, kind, m)
			accepted++
		}
		if accepted > 0 {
			requireShorterFails(t, table, messages[:accepted])
		}
	})
}

// requireNamed makes sure that a message that is not accepted is so by name, and
// for no event.
func requireNamed(t testing.TB, m []byte, kind decoder.Kind, err error) {
	t.Helper()
	if !errors.Is(err, decoder.ErrMalformed) && !errors.Is(err, decoder.ErrNoID) {
		t.Fatalf("%q: %v is neither ErrMalformed nor ErrNoID", m, err)
	}
	if kind == decoder.Insert {
		t.Fatalf("%q: an event in spite of %v", m, err)
	}
}

func requireShorterFails(t testing.TB, table uint32, messages [][]byte) {
	t.Helper()
	last := len(messages) - 1
	d := decoder.New(table, sessionColumns, event.Proof{})
	decode(t, d, messages[:last]...)
	m := messages[last]
	if kind, err := d.Decode(exact(m[:len(m)-1])); !errors.Is(err, decoder.ErrMalformed) || kind == decoder.Insert {
		t.Fatalf("%q less its last byte: kind %d, %v", m, kind, err)
	}
}

// reader follows a session by what pglogrepl reads.
type reader struct {
	table    uint32
	columns  []*pglogrepl.RelationMessageColumn // of the table
	begin    *pglogrepl.BeginMessage            // of the open transaction
	inserted uint64                             // events in it
}

// check holds what the decoder makes of a message against what pglogrepl does,
// which copies it byte by byte.
func (r *reader) check(t testing.TB, d *decoder.Decoder, kind decoder.Kind, m []byte) {
	t.Helper()
	want := decoder.Nothing
	switch msg := parse(t, m).(type) {
	case *pglogrepl.RelationMessage:
		if msg.RelationID == r.table {
			r.columns = msg.Columns
		}
	case *pglogrepl.BeginMessage:
		if r.begin != nil {
			t.Fatalf("%q: a Begin inside a transaction", m)
		}
		r.begin, r.inserted = msg, 0
	case *pglogrepl.InsertMessage:
		if msg.RelationID == r.table {
			want = decoder.Insert
			r.inserted++
			r.checkEvent(t, d, msg)
		}
	case *pglogrepl.CommitMessage:
		want = decoder.Commit
		if r.begin == nil || msg.CommitLSN != r.begin.FinalLSN || d.End != msg.TransactionEndLSN {
			t.Fatalf("%q: a Commit of %+v, up to %s", m, r.begin, d.End)
		}
		r.begin = nil
	}
	if kind != want {
		t.Fatalf("%q: kind %d, want %d", m, kind, want)
	}
	if d.InTransaction() != (r.begin != nil) {
		t.Fatalf("%q: in a transaction: %v", m, d.InTransaction())
	}
}

func (r *reader) checkEvent(t testing.TB, d *decoder.Decoder, msg *pglogrepl.InsertMessage) {
	t.Helper()
	if r.begin == nil {
		t.Fatal("an event outside a transaction")
	}
	e := &d.Event
	want := event.Position{Commit: r.begin.FinalLSN, Ordinal: r.inserted}
	if e.Position != want || e.XID != r.begin.Xid || !e.Commit.Equal(r.begin.CommitTime) {
		t.Fatalf("position %s of transaction %d at %s, want %s of %+v", e.Position, e.XID, e.Commit, want, r.begin)
	}
	var missing []string
	for _, field := range sessionColumns.Fields(e) {
		i := slices.IndexFunc(r.columns, func(c *pglogrepl.RelationMessageColumn) bool { return c.Name == field.Name })
		var value []byte // nil: NULL
		if i < 0 {
			missing = append(missing, field.Name)
		} else {
			value = msg.Tuple.Columns[i].Data
		}
		if got := *field.Value; !bytes.Equal(got, value) || (got == nil) != (value == nil) || cap(got) != len(got) {
			t.Fatalf("%s is %q (capacity %d), and %q for pglogrepl", field.Name, got, cap(got), value)
		}
	}
	if !slices.Equal(d.Missing, missing) {
		t.Fatalf("missing %q, want %q", d.Missing, missing)
	}
}

// parse reads an accepted message by pglogrepl. Two that Postgres can send are
// too short for it: the row of a table without columns, and a truncation of no
// table.
func parse(t testing.TB, m []byte) pglogrepl.Message {
	t.Helper()
	if len(m) == 8 && m[0] == 'I' || len(m) == 6 && m[0] == 'T' {
		return nil
	}
	msg, err := pglogrepl.Parse(m)
	if err != nil {
		t.Fatalf("%q: accepted, and pglogrepl says %v", m, err)
	}
	return msg
}

func pack(messages [][]byte) []byte {
	var packed []byte
	for _, m := range messages {
		packed = append(order.AppendUint16(packed, uint16(len(m))), m...)
	}
	return packed
}

func unpack(packed []byte) (messages [][]byte) {
	for len(packed) >= 2 {
		n := min(int(order.Uint16(packed)), len(packed)-2)
		messages = append(messages, exact(packed[2:2+n]))
		packed = packed[2+n:]
	}
	return messages
}
