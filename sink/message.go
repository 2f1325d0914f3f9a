package sink

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pglogrepl"

	"outbox-relay/outbox/event"
)

// Token is one token of the subject: a literal, or a column whose value
// becomes the token.
type Token struct{ Literal, Column string }

// MessageConfig says what a message looks like.
type MessageConfig struct {
	Subject     []Token
	CloudEvents bool   // beside the minimal headers
	Source      string // of the CloudEvents
	Timeline    int32  // for Outbox-Position
	Columns     event.Columns
}

// Limits of what a server takes. Sources: nats-server, server/const.go
// (MAX_CONTROL_LINE_SIZE) and server/jetstream_batching.go (math.MaxUint16).
const (
	maxControlLine = 4096 - 64 // HPUB line, less the verb and the sizes
	maxHeaders     = 65535
	maxToken       = 200
)

// RejectedError says that an event can never be stored, as it is.
type RejectedError struct{ Reason string }

func (e *RejectedError) Error() string { return e.Reason }

func rejected(format string, args ...any) error {
	return &RejectedError{Reason: fmt.Sprintf(format, args...)}
}

// builder makes publishes from events, as bytes of the NATS protocol: no header
// map and no string is made for an event. What it built is its own, and valid
// until the next build.
//
// Protocol: https://docs.nats.io/reference/reference-protocols/nats-protocol
type builder struct {
	config   MessageConfig
	columns  []*[]byte // of event, where the subject's tokens come from
	constant []byte    // header lines of every message
	event    event.Event
	subject  []byte
	headers  []byte // lines, but for the expected sequence
}

func newBuilder(config MessageConfig) *builder {
	b := &builder{config: config}
	for _, token := range config.Subject {
		b.columns = append(b.columns, config.Columns.Find(&b.event, token.Column)) // nil for a literal
	}
	if config.CloudEvents {
		b.constant = fmt.Appendf(nil, "ce-specversion: 1.0\r\nce-source: %s\r\ncontent-type: %s\r\n", percent(nil, []byte(config.Source)), config.contentType())
	}
	return b
}

// contentType is that of the payload. What a text holds nobody says: an outbox's
// is JSON.
func (c MessageConfig) contentType() string {
	if c.Columns.Bytea() {
		return "application/octet-stream"
	}
	return "application/json"
}

// build makes the event's message but for its reply subject and expected
// sequence. A *RejectedError says that no message can carry the event; limit
// is the largest message that the server and the stream take, in bytes.
func (b *builder) build(e *event.Event, limit int) error {
	b.reset(e)
	// Whoever reads a header trims blanks and tabs, so the id would be another.
	if !legalValue(e.ID) || len(e.ID) == 0 || len(bytes.Trim(e.ID, " \t")) != len(e.ID) {
		return rejected("the id cannot stand in the header Nats-Msg-Id: it is empty, has control characters, or begins or ends with a space or tab")
	}
	b.messageID()
	if err := b.makeSubject(); err != nil {
		return err
	}
	b.position()
	if b.config.CloudEvents {
		b.cloudEvent()
	}
	if err := b.rowHeaders(); err != nil {
		return err
	}
	return b.checkSize(limit)
}

func (b *builder) reset(e *event.Event) {
	b.subject, b.headers = b.subject[:0], b.headers[:0]
	extra := b.event.Extra
	b.event = *e
	b.event.Extra = append(extra[:0], e.Extra...) // columns points into it
}

func (b *builder) messageID() {
	if b.event.Run == "" {
		b.plain("Nats-Msg-Id", b.event.ID)
		return
	}
	b.plain("Nats-Msg-Id", []byte(b.event.MessageID()))
	b.plain("Outbox-Replay", []byte(b.event.Run))
}

// plain adds a header whose value is legal as it is.
func (b *builder) plain(name string, value []byte) {
	b.name(name)
	b.headers = append(b.headers, value...)
	b.end()
}

// encoded adds a header whose value is percent-encoded where it must be.
func (b *builder) encoded(name string, value []byte) {
	b.name(name)
	b.headers = percent(b.headers, value)
	b.end()
}

func (b *builder) name(name string) {
	b.headers = append(b.headers, name...)
	b.headers = append(b.headers, ": "...)
}

func (b *builder) end() { b.headers = append(b.headers, "\r\n"...) }

const (
	headerLine   = "NATS/1.0\r\n"
	sequenceName = "Nats-Expected-Last-Sequence: "
	longest      = len("18446744073709551615") // of a sequence
)

// appendPublish appends the message that was built, as the server reads it:
// HPUB, the headers, the payload. It must follow sequence in the stream, and is
// answered on reply.
func (b *builder) appendPublish(dst, reply []byte, sequence uint64) []byte {
	var text [longest]byte
	digits := strconv.AppendUint(text[:0], sequence, 10)
	headers := len(headerLine) + len(sequenceName) + len(digits) + len("\r\n") + len(b.headers) + len("\r\n")
	dst = append(dst, "HPUB "...)
	dst = append(dst, b.subject...)
	dst = append(dst, ' ')
	dst = append(dst, reply...)
	dst = append(dst, ' ')
	dst = strconv.AppendInt(dst, int64(headers), 10)
	dst = append(dst, ' ')
	dst = strconv.AppendInt(dst, int64(headers+len(b.event.Payload)), 10)
	dst = append(dst, "\r\n"+headerLine+sequenceName...)
	dst = append(dst, digits...)
	dst = append(dst, "\r\n"...)
	dst = append(dst, b.headers...)
	dst = append(dst, "\r\n"...)
	dst = append(dst, b.event.Payload...)
	return append(dst, "\r\n"...)
}

func (b *builder) makeSubject() error {
	for i, token := range b.config.Subject {
		if i > 0 {
			b.subject = append(b.subject, '.')
		}
		if token.Column == "" {
			b.subject = append(b.subject, token.Literal...)
			continue
		}
		value := *b.columns[i]
		var whole bool
		if b.subject, whole = appendToken(b.subject, value); !whole {
			b.encoded("Outbox-"+token.Column, value)
		}
	}
	if n := len(b.subject); n > maxControlLine-replyRoom {
		return rejected("the subject has %d bytes: NATS takes %d", n, maxControlLine-replyRoom)
	}
	return nil
}

const upperHex = "0123456789ABCDEF"

// appendToken appends a value as one subject token: bytes outside
// [A-Za-z0-9_-] become =XX, nothing is a lone =, and what is longer than 200
// bytes is cut and ends in =~ and the value's hash (whole is false then).
func appendToken(dst, value []byte) (out []byte, whole bool) {
	if len(value) == 0 {
		return append(dst, '='), true
	}
	start := len(dst)
	cut := start
	for _, c := range value {
		if len(dst)-start <= maxToken {
			cut = len(dst)
		}
		if plain(c) {
			dst = append(dst, c)
		} else {
			dst = append(dst, '=', upperHex[c>>4], upperHex[c&15])
		}
		if len(dst)-start > maxToken {
			sum := sha256.Sum256(value)
			dst = append(dst[:cut], "=~"...)
			return hex.AppendEncode(dst, sum[:8]), false
		}
	}
	return dst, true
}

func plain(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-'
}

// position adds "<timeline>/<commit LSN>/<ordinal>".
func (b *builder) position() {
	b.name("Outbox-Position")
	b.headers = strconv.AppendInt(b.headers, int64(b.config.Timeline), 10)
	b.headers = append(b.headers, '/')
	b.headers = appendLSN(b.headers, b.event.Position.Commit)
	b.headers = append(b.headers, '/')
	b.headers = strconv.AppendUint(b.headers, b.event.Position.Ordinal, 10)
	b.end()
}

// appendLSN appends what LSN.String prints, without its allocations.
func appendLSN(dst []byte, lsn pglogrepl.LSN) []byte {
	dst = appendUpperHex(dst, uint32(lsn>>32))
	dst = append(dst, '/')
	return appendUpperHex(dst, uint32(lsn))
}

func appendUpperHex(dst []byte, v uint32) []byte {
	shift := 28
	for shift > 0 && v>>shift == 0 {
		shift -= 4
	}
	for ; shift >= 0; shift -= 4 {
		dst = append(dst, upperHex[v>>shift&15])
	}
	return dst
}

// cloudEvent adds the attributes of the CloudEvents NATS binding, whose values
// are percent-encoded where they are not plain ASCII.
// Source: https://github.com/cloudevents/spec, bindings/nats-protocol-binding.md
func (b *builder) cloudEvent() {
	b.headers = append(b.headers, b.constant...)
	b.encoded("ce-id", b.event.ID)
	b.encoded("ce-type", b.event.EventType)
	b.encoded("ce-aggregatetype", b.event.AggregateType)
	b.encoded("ce-eventversion", b.event.Version)
	if len(b.event.AggregateID) > 0 {
		b.encoded("ce-subject", b.event.AggregateID)
	}
	b.time()
}

var zone = []byte("+00")

// fraction reports whether nothing but a fraction of a second is left of a time.
func fraction(rest []byte) bool {
	return len(rest) == 0 || rest[0] == '.' && !bytes.ContainsAny(rest, "+-: ")
}

// percent appends a value as CloudEvents wants it in a header.
func percent(dst, value []byte) []byte {
	for _, c := range value {
		if c <= ' ' || c > '~' || c == '"' || c == '%' {
			dst = append(dst, '%', upperHex[c>>4], upperHex[c&15])
		} else {
			dst = append(dst, c)
		}
	}
	return dst
}

// time adds ce-time: Postgres's "2026-11-23 13:15:00.123456+00" as RFC 3339. A
// timestamp without time zone is UTC. What RFC 3339 can't say (infinity, other
// than four digits of year) is left out.
func (b *builder) time() {
	value := bytes.TrimSuffix(b.event.CreatedAt, zone)
	if len(value) < 19 || value[4] != '-' || value[10] != ' ' || !fraction(value[19:]) {
		return
	}
	b.name("ce-time")
	b.headers = append(b.headers, value[:10]...)
	b.headers = append(b.headers, 'T')
	b.headers = append(b.headers, value[11:]...)
	b.headers = append(b.headers, 'Z')
	b.end()
}

// rowHeaders passes the members of the row's headers object through.
func (b *builder) rowHeaders() error {
	if b.event.Headers == nil || string(b.event.Headers) == "{}" {
		return nil
	}
	var object map[string]any
	if err := json.Unmarshal(b.event.Headers, &object); err != nil || object == nil {
		return rejected("the row's headers are not a JSON object")
	}
	for name, member := range object {
		value, ok := member.(string)
		switch {
		case !ok:
			return rejected("the row's header %q is not a string", name)
		case !legalName(name):
			return rejected("the row's header %q cannot be a header's name: it is empty or has characters other than printable ASCII without space and colon", name)
		case reserved(name):
			return rejected("the row's header %q is the relay's own: names that start with Nats-, Outbox- or ce-, and content-type, are not for rows", name)
		case !legalValue([]byte(value)):
			return rejected("the row's header %q has a control character in its value", name)
		}
		b.plain(name, []byte(value))
	}
	return nil
}

func legalName(name string) bool {
	for i := range len(name) {
		if c := name[i]; c <= ' ' || c > '~' || c == ':' {
			return false
		}
	}
	return name != ""
}

func legalValue(value []byte) bool {
	for _, c := range value {
		if c < ' ' && c != '\t' || c == 0x7F {
			return false
		}
	}
	return true
}

func reserved(name string) bool {
	for _, prefix := range []string{"nats-", "outbox-", "ce-"} {
		if len(name) >= len(prefix) && strings.EqualFold(name[:len(prefix)], prefix) {
			return true
		}
	}
	return strings.EqualFold(name, "content-type")
}

func (b *builder) checkSize(limit int) error {
	size := len(headerLine) + len(sequenceName) + longest + len("\r\n") + len(b.headers) + len("\r\n")
	if size > maxHeaders {
		return rejected("the headers have %d bytes: NATS takes %d", size, maxHeaders)
	}
	if size += len(b.event.Payload); size > limit {
		return rejected("the message has %d bytes: the server or the stream takes %d (max_payload, max_msg_size)", size, limit)
	}
	return nil
}
