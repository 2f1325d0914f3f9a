package sink

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
)

// replyRoom is what the reply subject may take of the control line.
const replyRoom = 160

// ack is the server's answer to a publish. No error means that the message
// stands in the stream at sequence, from this publish or an earlier one.
type ack struct {
	stream    []byte
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
		Sequence  uint64 `json:"seq"`
		Duplicate bool   `json:"duplicate"`
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		return ack{}, fmt.Errorf("parse the answer to a publish: %w", err)
	}
	a := ack{stream: []byte(answer.Stream), sequence: answer.Sequence, duplicate: answer.Duplicate}
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
	ackStream   = []byte(`{"stream":"`)
	ackSequence = []byte(`"seq":`)
	comma       = []byte(",")
	blank       = []byte(" ")
)

// plainAck reads exactly {"stream":"NAME","seq":N}, also with a blank behind
// comma and colon, as older servers have it.
func plainAck(data []byte) (ack, bool) {
	rest, ok := bytes.CutPrefix(data, ackStream)
	if !ok {
		return ack{}, false
	}
	end := bytes.IndexByte(rest, '"')
	if end < 0 || bytes.IndexByte(rest[:end], '\\') >= 0 {
		return ack{}, false
	}
	stream := rest[:end]
	rest, separated := bytes.CutPrefix(rest[end+1:], comma)
	rest, ok = bytes.CutPrefix(bytes.TrimPrefix(rest, blank), ackSequence)
	if !separated || !ok || len(rest) < 2 || rest[len(rest)-1] != '}' {
		return ack{}, false
	}
	sequence, err := strconv.ParseUint(string(bytes.TrimPrefix(rest[:len(rest)-1], blank)), 10, 64)
	if err != nil || sequence == 0 {
		return ack{}, false
	}
	return ack{stream: stream, sequence: sequence}, true
}

// A reply subject is "<inbox><generation>.<number>": which sending it answers,
// and which event.
func appendReply(dst []byte, inbox string, generation, number uint64) []byte {
	dst = append(dst, inbox...)
	dst = strconv.AppendUint(dst, generation, 36)
	dst = append(dst, '.')
	return strconv.AppendUint(dst, number, 36)
}

func parseReply(inbox, subject string) (generation, number uint64, ok bool) {
	if len(subject) <= len(inbox) || subject[:len(inbox)] != inbox {
		return 0, 0, false
	}
	tokens := subject[len(inbox):]
	for i := range len(tokens) {
		if tokens[i] == '.' {
			generation, err1 := strconv.ParseUint(tokens[:i], 36, 64)
			number, err2 := strconv.ParseUint(tokens[i+1:], 36, 64)
			return generation, number, err1 == nil && err2 == nil
		}
	}
	return 0, 0, false
}
