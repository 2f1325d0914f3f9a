package decoder_test

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"github.com/jackc/pglogrepl"

	"outbox-relay/decoder"
	"outbox-relay/outbox"
)

// FuzzDecode feeds a session: each message behind its length in two bytes. It
// must not panic nor read behind a message; what it calls malformed it calls so;
// and an insert that it accepts, pglogrepl reads alike.
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
		d := decoder.New(table, sessionColumns)
		var columns []*pglogrepl.RelationMessageColumn
		for _, m := range unpack(packed) {
			kind, err := d.Decode(m)
			if err != nil {
				if !errors.Is(err, decoder.ErrMalformed) && !errors.Is(err, decoder.ErrNoID) {
					t.Fatalf("%q: %v is neither ErrMalformed nor ErrNoID", m, err)
				}
				return
			}
			if relation := parseRelation(m); relation != nil && relation.RelationID == table {
				columns = relation.Columns
			}
			if kind == decoder.Insert {
				compare(t, &d.Event, columns, m)
			}
		}
	})
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

// parseRelation returns nil for other messages.
func parseRelation(m []byte) *pglogrepl.RelationMessage {
	if m[0] != 'R' {
		return nil
	}
	var relation pglogrepl.RelationMessage
	if err := relation.Decode(m[1:]); err != nil {
		return nil
	}
	return &relation
}

// compare holds the event against what pglogrepl reads from the message, which
// it copies byte by byte.
func compare(t *testing.T, e *outbox.Event, columns []*pglogrepl.RelationMessageColumn, m []byte) {
	t.Helper()
	var insert pglogrepl.InsertMessage
	if err := insert.Decode(m[1:]); err != nil {
		t.Fatalf("%q: accepted, and pglogrepl says %v", m, err)
	}
	for _, field := range sessionColumns.Fields(e) {
		var want []byte
		for i, column := range columns {
			if column.Name == field.Name {
				want = insert.Tuple.Columns[i].Data // nil: NULL
				break
			}
		}
		if got := *field.Value; !bytes.Equal(got, want) || (got == nil) != (want == nil) || cap(got) != len(got) {
			t.Fatalf("%s is %q (capacity %d), and %q for pglogrepl", field.Name, got, cap(got), want)
		}
	}
}
