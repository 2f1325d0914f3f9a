package sink

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"unsafe"

	"github.com/jackc/pglogrepl"
	"github.com/nats-io/nats.go"

	"outbox-relay/outbox"
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
	Columns     outbox.Columns
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

// Places of the values that are set for every message.
const (
	valueID = iota
	valueSequence
	valuePosition
	valueCloudID
	valueType
	valueTime
	valueSubject
	valueAggregate
	valueVersion
	valueCount
)

// builder makes messages from events. The message that it returns is its own,
// and valid until the next call: the client copies it when it publishes. So no
// header map and no string is made for an event.
type builder struct {
	config  MessageConfig
	columns []*[]byte // of event, where the subject's tokens come from
	event   outbox.Event
	msg     nats.Msg
	values  [valueCount]string
	extra   []string // names of headers that only this event has
	scratch []byte
	fixed   int // bytes of the header block, less values and what not every event has
	size    int // likewise, of the message being built
}

func newBuilder(config MessageConfig) *builder {
	b := &builder{config: config}
	fields := config.Columns.Fields(&b.event)
	for _, token := range config.Subject {
		var column *[]byte
		for _, field := range fields {
			if token.Column != "" && field.Name == token.Column {
				column = field.Value
			}
		}
		b.columns = append(b.columns, column)
	}
	b.msg.Header = nats.Header{}
	b.fixed = len("NATS/1.0\r\n\r\n")
	b.slot("Nats-Msg-Id", valueID)
	b.slot("Nats-Expected-Last-Sequence", valueSequence)
	b.slot("Outbox-Position", valuePosition)
	if config.CloudEvents {
		b.constant("ce-specversion", "1.0")
		b.constant("ce-source", percent(config.Source))
		b.constant("content-type", "application/json")
		b.slot("ce-id", valueCloudID)
		b.slot("ce-type", valueType)
		b.slot("ce-aggregatetype", valueAggregate)
		b.slot("ce-eventversion", valueVersion)
	}
	return b
}

// line is what a header takes beside its name and value.
const line = len(": \r\n")

func (b *builder) constant(name, value string) {
	b.msg.Header[name] = []string{value}
	b.fixed += len(name) + len(value) + line
}

// slot binds a header of every event to its value.
func (b *builder) slot(name string, value int) {
	b.bind(name, value)
	b.fixed += len(name) + line
}

func (b *builder) bind(name string, value int) {
	b.msg.Header[name] = b.values[value : value+1 : value+1]
}

// build makes the event's message but for its reply subject and expected
// sequence. A *RejectedError says that no message can carry the event; limit
// is the largest message that the server and the stream take, in bytes.
func (b *builder) build(e *outbox.Event, limit int) (*nats.Msg, error) {
	b.reset(e)
	if err := b.subject(); err != nil {
		return nil, err
	}
	if !legalValue(e.ID) || len(e.ID) == 0 || e.ID[0] == ' ' || e.ID[len(e.ID)-1] == ' ' {
		return nil, rejected("the id cannot stand in the header Nats-Msg-Id: it is empty, has control characters, or begins or ends with a space")
	}
	b.values[valueID] = view(e.ID)
	b.values[valueSequence] = "18446744073709551615" // the longest; set when it is sent
	b.position()
	if b.config.CloudEvents {
		b.cloudEvent()
	}
	if err := b.rowHeaders(); err != nil {
		return nil, err
	}
	b.msg.Data = e.Payload
	return &b.msg, b.checkSize(limit)
}

func (b *builder) reset(e *outbox.Event) {
	for _, name := range b.extra {
		delete(b.msg.Header, name)
	}
	b.extra = b.extra[:0]
	b.scratch = b.scratch[:0]
	b.size = b.fixed
	extra := b.event.Extra
	b.event = *e
	b.event.Extra = append(extra[:0], e.Extra...) // columns points into it
}

// add sets a header that only this event has.
func (b *builder) add(name, value string) {
	b.msg.Header[name] = []string{value}
	b.extra = append(b.extra, name)
	b.size += len(name) + len(value) + line
}

func (b *builder) subject() error {
	start := len(b.scratch)
	for i, token := range b.config.Subject {
		if i > 0 {
			b.scratch = append(b.scratch, '.')
		}
		if token.Column == "" {
			b.scratch = append(b.scratch, token.Literal...)
			continue
		}
		value := *b.columns[i]
		var whole bool
		if b.scratch, whole = appendToken(b.scratch, value); !whole {
			b.add("Outbox-"+token.Column, percent(string(value)))
		}
	}
	if n := len(b.scratch) - start; n > maxControlLine-replyRoom {
		return rejected("the subject has %d bytes: NATS takes %d", n, maxControlLine-replyRoom)
	}
	b.msg.Subject = view(b.scratch[start:])
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

// position writes "<timeline>/<commit LSN>/<ordinal>".
func (b *builder) position() {
	start := len(b.scratch)
	b.scratch = strconv.AppendInt(b.scratch, int64(b.config.Timeline), 10)
	b.scratch = append(b.scratch, '/')
	b.scratch = appendLSN(b.scratch, b.event.Position.Commit)
	b.scratch = append(b.scratch, '/')
	b.scratch = strconv.AppendUint(b.scratch, b.event.Position.Ordinal, 10)
	b.values[valuePosition] = view(b.scratch[start:])
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

// cloudEvent sets the attributes of the CloudEvents NATS binding, whose values
// are percent-encoded where they are not plain ASCII.
// Source: https://github.com/cloudevents/spec, bindings/nats-protocol-binding.md
func (b *builder) cloudEvent() {
	b.values[valueCloudID] = b.encoded(b.event.ID)
	b.values[valueType] = b.encoded(b.event.EventType)
	b.values[valueAggregate] = b.encoded(b.event.AggregateType)
	b.values[valueVersion] = b.encoded(b.event.Version)
	b.optional("ce-subject", valueSubject, b.encoded(b.event.AggregateID))
	b.optional("ce-time", valueTime, b.time(b.event.CreatedAt))
}

// optional sets or removes a header that not every event has.
func (b *builder) optional(name string, value int, text string) {
	b.values[value] = text
	if text == "" {
		delete(b.msg.Header, name)
		return
	}
	b.size += len(name) + line
	if b.msg.Header[name] == nil {
		b.bind(name, value)
	}
}

func (b *builder) encoded(value []byte) string {
	for _, c := range value {
		if c <= ' ' || c > '~' || c == '"' || c == '%' {
			return percent(string(value))
		}
	}
	return view(value)
}

// percent encodes a value as CloudEvents wants it in a header.
func percent(value string) string {
	var out strings.Builder
	for i := range len(value) {
		if c := value[i]; c <= ' ' || c > '~' || c == '"' || c == '%' {
			out.WriteByte('%')
			out.WriteByte(upperHex[c>>4])
			out.WriteByte(upperHex[c&15])
		} else {
			out.WriteByte(c)
		}
	}
	return out.String()
}

// time turns Postgres's "2026-11-23 13:15:00.123456+00" into RFC 3339. What
// RFC 3339 can't say (infinity, other than four digits of year) is left out.
func (b *builder) time(value []byte) string {
	if len(value) < 22 || value[4] != '-' || value[10] != ' ' || string(value[len(value)-3:]) != "+00" {
		return ""
	}
	start := len(b.scratch)
	b.scratch = append(b.scratch, value[:len(value)-3]...)
	b.scratch[start+10] = 'T'
	b.scratch = append(b.scratch, 'Z')
	return view(b.scratch[start:])
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
		case !legalValue(unsafe.Slice(unsafe.StringData(value), len(value))):
			return rejected("the row's header %q has a control character in its value", name)
		}
		b.add(name, value)
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
	size := b.size
	for _, value := range b.values {
		size += len(value)
	}
	if size > maxHeaders {
		return rejected("the headers have %d bytes: NATS takes %d", size, maxHeaders)
	}
	if size += len(b.msg.Data); size > limit {
		return rejected("the message has %d bytes: the server or the stream takes %d (max_payload, max_msg_size)", size, limit)
	}
	return nil
}

// view returns the bytes as a string without a copy: valid as long as they are
// not changed, which is longer than the publish that reads it.
func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }
