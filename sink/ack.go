package sink

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
)

// replyRoom is what the reply subject may take of the control line.
const replyRoom = 160

// ack is the server's answer to a publish. No error means that the message
// stands in the stream at sequence, from this publish or an earlier one.
type ack struct {
	stream    []byte
	domain    []byte // of JetStream; empty: it has none, or the answer does not say
	sequence  uint64
	duplicate bool
	code      int // of JetStream's error; 0: none
	text      string
}

// Codes that say that this message can never be stored.
// Source: nats-server, server/errors.json.
const (
	codeMessageTooLarge = 10054
	codeHeadersTooLarge = 10097
)

// Codes that say that the message does not follow the one that it must follow: the
// second where the stream is replicated.
// Source: nats-server, server/errors.json.
const (
	codeWrongLastSequence         = 10071
	codeWrongLastSequenceConstant = 10164
)

// reason is that of an error.
func (a *ack) reason() Reason {
	if a.code == codeWrongLastSequence || a.code == codeWrongLastSequenceConstant {
		return OutOfOrder
	}
	return Refused
}

func (a *ack) permanent() bool {
	return a.code == codeMessageTooLarge || a.code == codeHeadersTooLarge
}

// parseAck reads a PubAck. The plain form, which the server builds by hand, is
// read in place; everything else by encoding/json.
func parseAck(data []byte) (ack, error) {
	if a, ok := plainAck(data); ok {
		return a, nil
	}
	var answer struct {
		Error *struct {
			Code        int    `json:"err_code"`
			Description string `json:"description"`
		} `json:"error"`
		Stream    string `json:"stream"`
		Domain    string `json:"domain"`
		Sequence  uint64 `json:"seq"`
		Duplicate bool   `json:"duplicate"`
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		return ack{}, fmt.Errorf("parse the answer to a publish: %w", err)
	}
	a := ack{stream: []byte(answer.Stream), domain: []byte(answer.Domain), sequence: answer.Sequence, duplicate: answer.Duplicate}
	switch {
	case answer.Error != nil:
		a.code, a.text = answer.Error.Code, answer.Error.Description
		if a.code == 0 {
			return ack{}, fmt.Errorf("parse the answer to a publish: an error without a code: %s", data)
		}
	case a.sequence == 0:
		return ack{}, fmt.Errorf("parse the answer to a publish: no sequence: %.200s", data)
	}
	return a, nil
}

var (
	ackStream   = []byte(`{"stream":`)
	ackDomain   = []byte(`"domain":`)
	ackSequence = []byte(`"seq":`)
)

// plainAck reads exactly {"stream":"NAME","domain":"NAME","seq":N}, where the
// domain may be missing, and a blank may stand behind a comma or the last
// colon, as older servers have it.
// Source: nats-server, server/stream.go (pubAck).
func plainAck(data []byte) (ack, bool) {
	rest, ok := bytes.CutPrefix(data, ackStream)
	if !ok {
		return ack{}, false
	}
	stream, rest, ok := cutQuoted(rest)
	if !ok {
		return ack{}, false
	}
	var domain []byte
	if after, has := cutField(rest, ackDomain); has {
		if domain, rest, ok = cutQuoted(after); !ok {
			return ack{}, false
		}
	}
	rest, ok = cutField(rest, ackSequence)
	if !ok || len(rest) < 2 || rest[len(rest)-1] != '}' {
		return ack{}, false
	}
	digits := trimBlank(rest[:len(rest)-1])
	if len(digits) == 0 || digits[0] == '0' { // no sequence, or none that JSON knows
		return ack{}, false
	}
	sequence, err := strconv.ParseUint(string(digits), 10, 64)
	if err != nil {
		return ack{}, false
	}
	return ack{stream: stream, domain: domain, sequence: sequence}, true
}

// cutQuoted cuts a string without escapes.
func cutQuoted(data []byte) (text, rest []byte, ok bool) {
	if len(data) == 0 || data[0] != '"' {
		return nil, nil, false
	}
	end := bytes.IndexByte(data[1:], '"') + 1
	if end == 0 || bytes.IndexByte(data[1:end], '\\') >= 0 {
		return nil, nil, false
	}
	return data[1:end], data[end+1:], true
}

// cutField cuts a comma and a field's name; a blank may stand between.
func cutField(data, field []byte) (rest []byte, ok bool) {
	if len(data) < 2 || data[0] != ',' {
		return nil, false
	}
	return bytes.CutPrefix(trimBlank(data[1:]), field)
}

func trimBlank(data []byte) []byte {
	if len(data) > 0 && data[0] == ' ' {
		return data[1:]
	}
	return data
}

// reply is where a publish is answered: on "<inbox><generation>", or, where the event
// has a name, on "<inbox><generation>.<number>".
type reply struct {
	generation uint64 // which sending of the window it answers
	number     uint64 // of the event, if named
	named      bool
}

func (r reply) append(dst []byte, inbox string) []byte {
	dst = append(dst, inbox...)
	dst = strconv.AppendUint(dst, r.generation, 36)
	if r.named {
		dst = append(dst, '.')
		dst = strconv.AppendUint(dst, r.number, 36)
	}
	return dst
}

func parseReply(inbox, subject string) (r reply, ok bool) {
	tokens, ok := strings.CutPrefix(subject, inbox)
	if !ok {
		return reply{}, false
	}
	generation, number, named := strings.Cut(tokens, ".")
	var err error
	if r.generation, err = strconv.ParseUint(generation, 36, 64); err != nil {
		return reply{}, false
	}
	if r.named = named; !named {
		return r, true
	}
	r.number, err = strconv.ParseUint(number, 36, 64)
	return r, err == nil
}
