package decoder_test

import (
	"encoding/binary"

	"github.com/jackc/pglogrepl"
)

// Messages of pgoutput as the documentation lays them out, so that the decoder
// is not checked against itself.
// Source: https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html

var order = binary.BigEndian

func begin(commit pglogrepl.LSN, xid uint32) []byte {
	m := order.AppendUint64([]byte{'B'}, uint64(commit))
	m = order.AppendUint64(m, 1_000_000) // a second into the year 2000
	return order.AppendUint32(m, xid)
}

func commit(at, end pglogrepl.LSN) []byte {
	m := order.AppendUint64([]byte{'C', 0}, uint64(at))
	m = order.AppendUint64(m, uint64(end))
	return order.AppendUint64(m, 1_000_000)
}

func relation(oid uint32, columns ...string) []byte {
	m := order.AppendUint32([]byte{'R'}, oid)
	m = append(m, "public\x00events\x00d"...)
	m = order.AppendUint16(m, uint16(len(columns)))
	for _, name := range columns {
		m = append(m, 0)
		m = append(m, name...)
		m = append(m, 0)
		m = order.AppendUint32(m, 25)         // text
		m = order.AppendUint32(m, 0xFFFFFFFF) // no type modifier
	}
	return m
}

func insert(oid uint32, values ...[]byte) []byte {
	m := order.AppendUint32([]byte{'I'}, oid)
	m = append(m, 'N')
	m = order.AppendUint16(m, uint16(len(values)))
	for _, value := range values {
		m = append(m, value...)
	}
	return m
}

func origin(name string) []byte {
	return append(append(order.AppendUint64([]byte{'O'}, 10), name...), 0)
}

func typeOf(oid uint32, name string) []byte {
	m := append(order.AppendUint32([]byte{'Y'}, oid), "public\x00"...)
	return append(append(m, name...), 0)
}

func logical(prefix, content string) []byte {
	m := order.AppendUint64([]byte{'M', 1}, 10)
	m = append(append(m, prefix...), 0)
	return append(order.AppendUint32(m, uint32(len(content))), content...)
}

func text(s string) []byte {
	return append(order.AppendUint32([]byte{'t'}, uint32(len(s))), s...)
}

func null() []byte { return []byte{'n'} }

// exact returns a copy with nothing behind it: whoever reads further panics.
func exact(data []byte) []byte {
	c := make([]byte, len(data))
	copy(c, data)
	return c[:len(c):len(c)]
}
