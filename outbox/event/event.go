package event

import (
	"time"
)

// Event is one inserted row. Its byte slices are the text that Postgres sent,
// nil for NULL; who hands an event on says how long they are valid.
type Event struct {
	Position Position
	XID      uint32    // of the inserting transaction
	Commit   time.Time // when it committed, by Postgres's clock

	ID            []byte
	Version       []byte
	AggregateType []byte
	AggregateID   []byte
	EventType     []byte
	Payload       []byte // jsonb as text, verbatim
	Headers       []byte // a JSON object of strings
	Status        []byte
	CreatedAt     []byte   // timestamptz as text: ISO, UTC
	Extra         [][]byte // further columns that the subject names, in Columns.Extra's order

	Run string // of the replay that publishes it once more; else empty
}

// MessageID is the Nats-Msg-Id of the event's message: of a replay one of its
// own, and the same however often it is sent.
func (e *Event) MessageID() string { return MessageID(string(e.ID), e.Run) }

// MessageID is the Nats-Msg-Id of the row's message in a replay, or of its first
// one where run is empty.
func MessageID(id, run string) string {
	if run == "" {
		return id
	}
	return id + ":" + run
}

// Size returns the bytes of the event's values.
func (e *Event) Size() int {
	n := len(e.ID) + len(e.Version) + len(e.AggregateType) + len(e.AggregateID) + len(e.EventType) +
		len(e.Payload) + len(e.Headers) + len(e.Status) + len(e.CreatedAt)
	for _, v := range e.Extra {
		n += len(v)
	}
	return n
}

// CopyTo copies the event into dst, its values into buf if that has room for
// e.Size() bytes, else into memory of their own. dst is valid as long as buf is not
// used again.
func (e *Event) CopyTo(dst *Event, buf []byte) {
	if need := e.Size(); cap(buf) < need {
		buf = make([]byte, 0, need)
	}
	buf = buf[:0]
	extra := dst.Extra
	*dst = *e
	if len(extra) != len(e.Extra) {
		extra = make([][]byte, len(e.Extra))
	}
	dst.Extra = extra
	for _, v := range [...]*[]byte{&dst.ID, &dst.Version, &dst.AggregateType, &dst.AggregateID, &dst.EventType,
		&dst.Payload, &dst.Headers, &dst.Status, &dst.CreatedAt} {
		*v, buf = keep(buf, *v)
	}
	for i, v := range e.Extra {
		dst.Extra[i], buf = keep(buf, v)
	}
}

// keep appends v to buf and returns the copy; NULL stays NULL. buf must have
// room, since earlier copies point into it.
func keep(buf, v []byte) (kept, grown []byte) {
	if v == nil {
		return nil, buf
	}
	start := len(buf)
	buf = append(buf, v...)
	return buf[start:len(buf):len(buf)], buf
}
