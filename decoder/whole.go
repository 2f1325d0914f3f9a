package decoder

import (
	"bytes"
	"encoding/binary"
	"strings"
)

// whole reports whether a message, of any kind but Insert, is laid out as the
// protocol has it, to its last byte. What carries no event is read so far, too:
// else an Insert of whose kind one bit has flipped would be passed over as a
// logical message or a type.
func whole(data []byte) bool {
	body := rest(data[1:])
	switch data[0] {
	case 'B': // commit LSN, time, xid
		body = body.skip(20)
	case 'C': // flags, commit LSN, end LSN, time
		body = body.skip(25)
	case 'O': // commit LSN, name
		body = body.skip(8).text()
	case 'Y': // OID, namespace, name
		body = body.skip(4).text().text()
	case 'M': // flags, LSN, prefix, content
		body = body.skip(9).text().block()
	case 'R': // OID, namespace, name, replica identity, columns
		body = body.skip(4).text().text().skip(1).columns()
	case 'U': // OID, the old row or its key if need be, the new row
		body = body.skip(4)
		if len(body) > 0 && body[0] != 'N' {
			body = body.row("KO")
		}
		body = body.row("N")
	case 'D': // OID, the old row or its key
		body = body.skip(4).row("KO")
	case 'T': // number of tables, options, their OIDs
		tables, _ := body.uint(4)
		body = body.skip(5).skip(4 * tables)
	}
	return body != nil && len(body) == 0
}

// rest is what is left of a message; nil: it ended too early.
type rest []byte

func (r rest) skip(n uint64) rest {
	if r == nil || n > uint64(len(r)) {
		return nil
	}
	return r[n:]
}

// uint reads a number of 2 or 4 bytes.
func (r rest) uint(size uint64) (uint64, rest) {
	after := r.skip(size)
	switch {
	case after == nil:
		return 0, nil
	case size == 2:
		return uint64(binary.BigEndian.Uint16(r)), after
	default:
		return uint64(binary.BigEndian.Uint32(r)), after
	}
}

// text skips a string and the zero behind it.
func (r rest) text() rest {
	end := bytes.IndexByte(r, 0)
	if end < 0 {
		return nil
	}
	return r[end+1:]
}

// block skips a length of 4 bytes and as many bytes.
func (r rest) block() rest {
	n, after := r.uint(4)
	return after.skip(n)
}

// columns skips the columns of a Relation: flags, name, type, type modifier.
func (r rest) columns() rest {
	n, r := r.uint(2)
	for ; n > 0 && r != nil; n-- {
		r = r.skip(1).text().skip(8)
	}
	return r
}

// row skips a row that one of kinds announces.
func (r rest) row(kinds string) rest {
	if len(r) == 0 || strings.IndexByte(kinds, r[0]) < 0 {
		return nil
	}
	n, r := r[1:].uint(2)
	for ; n > 0 && r != nil; n-- {
		r = r.value()
	}
	return r
}

// value skips a column's value: NULL, unchanged, text or binary.
func (r rest) value() rest {
	switch {
	case len(r) == 0:
		return nil
	case r[0] == 'n' || r[0] == 'u':
		return r[1:]
	case r[0] == 't' || r[0] == 'b':
		return r[1:].block()
	}
	return nil
}
