// Package decoder turns pgoutput messages (protocol version 1, text format)
// into events of the outbox with their positions. It does no I/O.
//
// Format: https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html
package decoder

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/jackc/pglogrepl"

	"outbox-relay/internal/charset"
	"outbox-relay/outbox/event"
)

// Kind is what a message means to the outbox.
type Kind uint8

const (
	Nothing Kind = iota // carries no event: another table, a type, a transaction's begin
	Insert              // a row of the outbox: Decoder.Event
	Commit              // the end of a transaction: Decoder.End
	Request             // rows to be published from the table: Decoder.Request; their last one is at Event.Position
	Stray               // a request that can't be read, or proves no right to ask: Decoder.Stray
)

// ErrMalformed says that a message does not follow the protocol. What it
// carried is unknown, so it can't be skipped.
var ErrMalformed = errors.New("malformed pgoutput message")

// ErrNoID says that events come without their id: nothing can be done with them.
var ErrNoID = errors.New("the column of the id was renamed or not published")

// Decoder decodes the messages of one replication session, in order. Not safe
// for concurrent use.
type Decoder struct {
	// Event is the row of the last Insert. Its bytes point into the message, and
	// those of a bytea payload into the decoder: they are valid until the next Insert.
	Event event.Event
	// Missing names the columns that the event's Relation did not list,
	// because the row was written before the publication was extended.
	Missing []string
	// Defect says which value of the last Insert does not convert to UTF-8; empty: all
	// do. Its bytes that are no characters are then written as \x and two hex digits.
	Defect string
	// Request is what the last Request asks for.
	Request event.Request
	// Stray says what is wrong with the last Stray.
	Stray error
	// End is where the transaction of the last Commit ends in WAL: the LSN to
	// confirm once all of it is done.
	End pglogrepl.LSN

	table     uint32 // OID of the outbox table (of its root, where partitioned)
	prefix    string // of requests
	proof     event.Proof
	columns   event.Columns
	relations map[uint32]*relation // of this session, also other tables': an Insert of none is malformed
	open      bool                 // between Begin and Commit
	ordinal   uint64
	bytes     []byte        // of the last payload, where that is bytea
	fields    []event.Field // of Event
	text      []byte        // of the last Insert's values, as far as they were converted

	beginMsg  pglogrepl.BeginMessage // here, so that a transaction costs no allocation
	commitMsg pglogrepl.CommitMessage
}

// relation tells where each column of a tuple goes; nil: not wanted. Of another
// table none is.
type relation struct {
	slots   []*[]byte
	missing []string
	fields  []event.Field // of the columns that it does not list: NULL
}

// New returns a decoder for the events of the table with that OID, and for the requests
// that this proof takes.
func New(table uint32, columns event.Columns, proof event.Proof) *Decoder {
	d := &Decoder{table: table, prefix: event.RequestPrefix(table), proof: proof, columns: columns, relations: map[uint32]*relation{}, bytes: []byte{}}
	d.fields = columns.Fields(&d.Event)
	return d
}

// InTransaction reports whether a transaction is open: a keepalive that comes
// then says nothing about what is done.
func (d *Decoder) InTransaction() bool { return d.open }

// Decode decodes one message. data must stay unchanged as long as Event is
// used. Any error is final: the session can't go on past it.
func (d *Decoder) Decode(data []byte) (Kind, error) {
	if len(data) == 0 {
		return Nothing, fmt.Errorf("%w: empty", ErrMalformed)
	}
	switch data[0] {
	case 'I':
		return d.insert(data[1:])
	case 'B', 'C', 'R', 'O', 'Y', 'M', 'U', 'D', 'T':
	default:
		return Nothing, fmt.Errorf("%w: unknown kind %q", ErrMalformed, data[0])
	}
	if !whole(data) {
		return Nothing, fmt.Errorf("%w: %d bytes of kind %q are not laid out like one", ErrMalformed, len(data), data[0])
	}
	switch data[0] {
	case 'B':
		return Nothing, d.begin(data)
	case 'C':
		return Commit, d.commit(data)
	case 'R':
		return Nothing, d.relation(data)
	case 'M':
		return d.message(data)
	default:
		// Origin, type, and the changes of a publication that once published
		// more than inserts: none inserts an event.
		return Nothing, nil
	}
}

func (d *Decoder) begin(data []byte) error {
	begin := &d.beginMsg
	if err := parse(data, begin); err != nil {
		return err
	}
	if d.open {
		return fmt.Errorf("%w: Begin inside a transaction", ErrMalformed)
	}
	if begin.FinalLSN == 0 || begin.FinalLSN < d.End { // transactions come in the order of their commits
		return fmt.Errorf("%w: Begin of a transaction that commits at %s, and the one before it ended at %s", ErrMalformed, begin.FinalLSN, d.End)
	}
	d.open, d.ordinal = true, 0
	d.Event.Position.Commit = begin.FinalLSN
	d.Event.XID = begin.Xid
	d.Event.Commit = begin.CommitTime
	return nil
}

func (d *Decoder) commit(data []byte) error {
	commit := &d.commitMsg
	if err := parse(data, commit); err != nil {
		return err
	}
	if !d.open || commit.CommitLSN != d.Event.Position.Commit {
		return fmt.Errorf("%w: Commit at %s does not end the open transaction", ErrMalformed, commit.CommitLSN)
	}
	if commit.Flags != 0 || commit.TransactionEndLSN <= commit.CommitLSN {
		return fmt.Errorf("%w: Commit at %s with flags %d ends at %s", ErrMalformed, commit.CommitLSN, commit.Flags, commit.TransactionEndLSN)
	}
	d.open = false
	d.End = commit.TransactionEndLSN
	return nil
}

func (d *Decoder) relation(data []byte) error {
	var msg pglogrepl.RelationMessage
	if err := parse(data, &msg); err != nil {
		return err
	}
	rel := &relation{slots: make([]*[]byte, len(msg.Columns))}
	if msg.RelationID != d.table {
		d.relations[msg.RelationID] = rel
		return nil
	}
	for _, field := range d.columns.Fields(&d.Event) {
		bound := rel.bind(msg.Columns, field, d.columns.Charset)
		if !bound && field.Usual == "id" {
			return ErrNoID
		}
		if !bound {
			rel.missing = append(rel.missing, field.Name)
			rel.fields = append(rel.fields, field)
		}
	}
	d.relations[msg.RelationID] = rel
	return nil
}

func (r *relation) bind(columns []*pglogrepl.RelationMessageColumn, field event.Field, text charset.Charset) bool {
	for i, column := range columns {
		if text.Text(column.Name) == field.Name {
			r.slots[i] = field.Value
			return true
		}
	}
	return false
}

// insert walks the tuple in place: pglogrepl.Parse would cost 29 allocations.
func (d *Decoder) insert(data []byte) (Kind, error) {
	if len(data) < 7 || data[4] != 'N' {
		return Nothing, fmt.Errorf("%w: short Insert", ErrMalformed)
	}
	if !d.open {
		return Nothing, fmt.Errorf("%w: Insert outside a transaction", ErrMalformed)
	}
	oid := binary.BigEndian.Uint32(data)
	rel := d.relations[oid]
	if rel == nil {
		return Nothing, fmt.Errorf("%w: Insert before the Relation of table %d", ErrMalformed, oid)
	}
	for _, field := range rel.fields {
		*field.Value = nil
	}
	if err := rel.tuple(data[5:]); err != nil || oid != d.table {
		return Nothing, err
	}
	if d.columns.Charset.Raw() {
		d.convert()
	}
	if d.columns.Bytea() {
		if err := d.unhex(); err != nil {
			return Nothing, err
		}
	}
	d.Missing = rel.missing
	d.ordinal++
	d.Event.Position.Ordinal = d.ordinal
	return Insert, nil
}

// convert converts the event's values to UTF-8.
func (d *Decoder) convert() {
	d.Defect, d.text = "", d.text[:0]
	for _, field := range d.fields {
		if charset.ASCII(*field.Value) {
			continue
		}
		start := len(d.text)
		text, defect := d.columns.Charset.AppendUTF8(d.text, *field.Value)
		d.text, *field.Value = text, text[start:len(text):len(text)]
		if defect != "" && d.Defect == "" {
			d.Defect = fmt.Sprintf("column %s has %s", field.Name, defect)
		}
	}
}

// unhex takes a bytea payload from its text, which is \x and hex digits, since the
// session is pinned to bytea_output = hex.
func (d *Decoder) unhex() (err error) {
	text := d.Event.Payload
	if text == nil {
		return nil
	}
	digits, found := bytes.CutPrefix(text, []byte(`\x`))
	if d.bytes, err = hex.AppendDecode(d.bytes[:0], digits); err != nil || !found {
		return fmt.Errorf("%w: a payload of type bytea that is not in hex", ErrMalformed)
	}
	d.Event.Payload = d.bytes
	return nil
}

// tuple puts each wanted column of TupleData into its place.
func (r *relation) tuple(data []byte) error {
	if n := int(binary.BigEndian.Uint16(data)); n != len(r.slots) {
		return fmt.Errorf("%w: tuple of %d columns, relation of %d", ErrMalformed, n, len(r.slots))
	}
	data = data[2:]
	for i, slot := range r.slots {
		if len(data) == 0 {
			return fmt.Errorf("%w: tuple ends at column %d", ErrMalformed, i)
		}
		var value []byte
		switch kind := data[0]; kind {
		case 'n':
			data = data[1:]
		case 't':
			if len(data) < 5 {
				return fmt.Errorf("%w: tuple ends in column %d", ErrMalformed, i)
			}
			end := 5 + uint64(binary.BigEndian.Uint32(data[1:]))
			if end > uint64(len(data)) {
				return fmt.Errorf("%w: column %d is longer than its message", ErrMalformed, i)
			}
			value, data = data[5:end:end], data[end:]
		default: // 'u' can't be in an insert, 'b' was not asked for
			return fmt.Errorf("%w: column %d of kind %q", ErrMalformed, i, kind)
		}
		if slot != nil {
			*slot = value
		}
	}
	if len(data) != 0 {
		return fmt.Errorf("%w: %d bytes behind the tuple", ErrMalformed, len(data))
	}
	return nil
}

// message takes a logical message. Those of others, and those that no
// transaction holds, are none of ours.
func (d *Decoder) message(data []byte) (Kind, error) {
	var msg pglogrepl.LogicalDecodingMessage
	if err := parse(data, &msg); err != nil {
		return Nothing, err
	}
	if !msg.Transactional || msg.Prefix != d.prefix {
		return Nothing, nil
	}
	if !d.open {
		return Nothing, fmt.Errorf("%w: transactional message outside a transaction", ErrMalformed)
	}
	content, err := d.proof.Open(msg.Prefix, d.Event.XID, d.Event.Commit, msg.Content)
	if err == nil {
		d.Request, err = event.ParseRequest([]byte(d.columns.Charset.Text(string(content)))) // Postgres converts no message
	}
	if d.Stray = err; err != nil {
		return Stray, nil
	}
	d.ordinal += uint64(len(d.Request.IDs))
	d.Event.Position.Ordinal = d.ordinal
	return Request, nil
}

// parse decodes a rare message that is whole: pglogrepl panics on some that are
// not (RelationMessage.Decode indexes before it checks).
func parse(data []byte, msg pglogrepl.MessageDecoder) error {
	if err := msg.Decode(data[1:]); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return nil
}
