package sink

import (
	"bytes"
	"encoding/json"
	"math"
	"math/big"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/nats-io/nats.go/jetstream"
)

func TestParseAck(t *testing.T) {
	for _, c := range []struct {
		data string
		want ack // stream is compared apart
		name string
	}{
		{`{"stream":"EVENTS","seq":7}`, ack{sequence: 7}, "EVENTS"},
		{`{"stream":"EVENTS", "seq": 7}`, ack{sequence: 7}, "EVENTS"},
		{`{"stream":"EVENTS","seq":18446744073709551615}`, ack{sequence: math.MaxUint64}, "EVENTS"},
		{`{"stream":"EVENTS","domain":"hub","seq":7}`, ack{sequence: 7}, "EVENTS"},
		{`{"stream":"EVENTS","seq":7,"domain":"hub"}`, ack{sequence: 7}, "EVENTS"},
		{`{"stream":"EVENTS","seq":7,"duplicate": true}`, ack{sequence: 7, duplicate: true}, "EVENTS"},
		{`{"seq":7,"stream":"EVENTS"}`, ack{sequence: 7}, "EVENTS"},
		{` { "stream" : "EVENTS" , "seq" : 7 } `, ack{sequence: 7}, "EVENTS"},
		{`{"stream":"Ereignisse \"neu\"","seq":7}`, ack{sequence: 7}, `Ereignisse "neu"`},
		{`{"type":"io.nats.jetstream.api.v1.pub_ack_response","error":{"code":400,"err_code":10071,"description":"wrong last sequence: 4"},"stream":"EVENTS","seq":0}`,
			ack{code: 10071, text: "wrong last sequence: 4"}, "EVENTS"},
		{`{"error":{"code":503,"err_code":10008,"description":"JetStream system temporarily unavailable"}}`,
			ack{code: 10008, text: "JetStream system temporarily unavailable"}, ""},
	} {
		got, err := parseAck([]byte(c.data))
		if err != nil {
			t.Errorf("%s: %v", c.data, err)
			continue
		}
		if string(got.stream) != c.name {
			t.Errorf("%s: stream %q", c.data, got.stream)
		}
		if got.sequence != c.want.sequence || got.duplicate != c.want.duplicate || got.code != c.want.code || got.text != c.want.text {
			t.Errorf("%s: got %+v, want %+v", c.data, got, c.want)
		}
	}
}

// What is no answer of a stream proves nothing, and is never taken for a good
// one.
func TestParseAckRefuses(t *testing.T) {
	for _, data := range []string{
		``, `null`, `{}`, `[]`, `7`, `not JSON`, "+OK",
		`{"stream":"EVENTS"}`, `{"stream":"EVENTS","seq":0}`, `{"stream":"EVENTS","seq":-1}`, `{"stream":"EVENTS","seq":1.5}`,
		`{"stream":"EVENTS","seq":"7"}`, `{"stream":"EVENTS","seq":18446744073709551616}`, `{"stream":"EVENTS","seq":7`,
		`{"stream":"EVENTS","seq":7}}`, `{"stream":"EVENTS","seq":+7}`, `{"stream":"EVENTS","seq":}`, `{"stream":"EVENTS","seq": }`,
		`{"stream":"EVENTS","seq":7_000}`, `{"stream":"EVENTS","seq":  }`, `{"stream":"EVENTS","seq":07}`, `{"stream":"EVENTS"`, `{"stream":"`,
		`{"error":{"code":500,"description":"without a code of its own"},"seq":7}`, `{"error":{},"stream":"EVENTS","seq":7}`,
	} {
		if got, err := parseAck([]byte(data)); err == nil {
			t.Errorf("%s: taken for %+v", data, got)
		}
	}
}

func TestPermanentRejections(t *testing.T) {
	for code, want := range map[int]bool{10054: true, 10097: true, 10071: false, 10077: false, 10060: false, 10008: false, 0: false} {
		if a := (ack{code: code}); a.permanent() != want {
			t.Errorf("code %d: permanent %v", code, !want)
		}
	}
}

// FuzzParseAck: what is taken for an answer is what encoding/json reads, by our
// names and by those of the client's own PubAck, and everything else is an
// error: to the chain the outcome is unknown, and it resyncs. Nothing that JSON
// reads as an answer is refused either, or the chain would resync for ever.
func FuzzParseAck(f *testing.F) {
	for _, seed := range []string{`{"stream":"EVENTS","seq":7}`, `{"stream":"EVENTS", "seq": 7}`, `{"stream":"a\"b","seq":7,"duplicate":true}`,
		`{"stream":"EVENTS","domain":"hub","seq":18446744073709551615}`, `{"stream":"EVENTS","seq":07}`, `{"stream":"EVENTS","seq":7,"error":null}`,
		`{"type":"io.nats.jetstream.api.v1.pub_ack_response","error":{"code":400,"err_code":10071,"description":"wrong last sequence: 4"},"stream":"EVENTS","seq":0}`,
		`{"error":{"code":400,"err_code":10071,"description":"x"},"seq":0}`, `{"stream":"EVENTS","seq":7,"seq":8}`, "{\"stream\":\"\xff\",\"seq\":7}"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := parseAck(data)
		if err == nil && got.code == 0 && !legalStream(got.stream) {
			return // no stream of ours: the chain breaks at its name, whatever else it read
		}
		want, readable := readAck(data)
		switch {
		case !readable && err == nil:
			t.Fatalf("%q: taken for %+v", data, got)
		case !readable:
			return
		case err != nil:
			t.Fatalf("%q: refused, and it is an answer: %v", data, err)
		case got.code != want.code || got.text != want.text:
			t.Fatalf("%q: error %d %q, want %d %q", data, got.code, got.text, want.code, want.text)
		case got.code == 0 && (got.sequence != want.sequence || got.duplicate != want.duplicate || !bytes.Equal(got.stream, want.stream)):
			t.Fatalf("%q: got %+v, want %+v", data, got, want)
		}
		var client jetstream.PubAck
		if got.code == 0 && json.Unmarshal(data, &client) == nil && (client.Sequence != got.sequence || client.Duplicate != got.duplicate || client.Stream != string(got.stream)) {
			t.Fatalf("%q: got %+v, and the client %+v", data, got, client)
		}
	})
}

// readAck reads an answer without the shortcut: false for what is none.
func readAck(data []byte) (ack, bool) {
	var answer struct {
		Stream    string `json:"stream"`
		Sequence  uint64 `json:"seq"`
		Duplicate bool   `json:"duplicate"`
		Error     *struct {
			Code        int    `json:"err_code"`
			Description string `json:"description"`
		} `json:"error"`
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		return ack{}, false
	}
	want := ack{stream: []byte(answer.Stream), sequence: answer.Sequence, duplicate: answer.Duplicate}
	if answer.Error != nil {
		want.code, want.text = answer.Error.Code, answer.Error.Description
		return want, want.code != 0
	}
	return want, want.sequence != 0
}

// legalStream reports whether a stream can have the name.
// Source: nats-server, server/jetstream_api.go and server/util.go (isValidName).
func legalStream(name []byte) bool {
	return utf8.Valid(name) && len(name) > 0 && !bytes.ContainsAny(name, " \t\r\n\f.*>/\\\"") && legalValue(name)
}

// FuzzParseReply: a reply subject is never taken for another event's, and what
// is not of this chain's inbox for none.
func FuzzParseReply(f *testing.F) {
	const inbox = "_INBOX_outbox.ABC."
	for _, seed := range []string{inbox + "0.0", inbox + "1.zz", inbox + "3w5e11264sgsf.3w5e11264sgsf", inbox + "1", inbox + "1.", inbox + "1.2.3", inbox + "01.Z", "_INBOX_outbox.ABD.1.2"} {
		f.Add(seed, uint64(1), uint64(35), true)
	}
	f.Fuzz(func(t *testing.T, subject string, generation, number uint64, named bool) {
		want := reply{generation: generation, named: named}
		if named {
			want.number = number
		}
		sent := string(want.append(nil, inbox))
		if got, ok := parseReply(inbox, sent); !ok || got != want {
			t.Fatalf("%+v came back from %q as %+v, %v", want, sent, got, ok)
		}
		got, ok := parseReply(inbox, subject)
		tokens := replyForm.FindStringSubmatch(subject)
		if len(tokens) == 0 {
			if ok {
				t.Fatalf("%q: taken for %+v", subject, got)
			}
			return
		}
		first, _ := new(big.Int).SetString(tokens[1], 36)
		second, _ := new(big.Int).SetString("0"+tokens[3], 36)
		if legal := first.IsUint64() && second.IsUint64(); ok != legal ||
			ok && (got != reply{generation: first.Uint64(), number: second.Uint64(), named: tokens[2] != ""}) {
			t.Fatalf("%q: taken for %+v, %v", subject, got, ok)
		}
	})
}

var replyForm = regexp.MustCompile(`^_INBOX_outbox\.ABC\.([0-9A-Za-z]+)(\.([0-9A-Za-z]+))?$`)

func TestReplies(t *testing.T) {
	const inbox = "_INBOX_outbox.ABC."
	for _, want := range []reply{
		{generation: 0}, {generation: math.MaxUint64}, {generation: 0, number: 0, named: true}, {generation: 1, number: 35, named: true},
		{generation: 36, number: 36 * 36, named: true}, {generation: math.MaxUint64, number: math.MaxUint64, named: true},
	} {
		subject := string(want.append(nil, inbox))
		if got, ok := parseReply(inbox, subject); !ok || got != want {
			t.Errorf("%+v came back from %s as %+v", want, subject, got)
		}
		if len(subject) > replyRoom || strings.ContainsAny(strings.TrimPrefix(subject, inbox), "*> ") {
			t.Errorf("the reply subject %q has %d bytes", subject, len(subject))
		}
	}
	for _, subject := range []string{"", inbox, inbox + "1.", inbox + ".1", inbox + "1.2.3", inbox + "-1.2", inbox + "-1",
		inbox + "1.!", "_INBOX_outbox.ABD.1.2", inbox[:len(inbox)-1] + "1.2", inbox + "1.3w5e11264sgsg", inbox + "3w5e11264sgsg"} {
		if got, ok := parseReply(inbox, subject); ok {
			t.Errorf("%q: taken for %+v", subject, got)
		}
	}
}

func TestReadingAnAckAllocatesNothing(t *testing.T) {
	const inbox = "_INBOX_outbox.ABC."
	subject := string(reply{generation: 3, number: 1234567, named: true}.append(nil, inbox))
	for _, data := range []string{`{"stream":"EVENTS","seq":1234567}`, `{"stream":"EVENTS", "seq": 1234567}`} {
		answer := []byte(data)
		allocations := testing.AllocsPerRun(1000, func() {
			if _, err := parseAck(answer); err != nil {
				t.Fatal(err)
			}
			if _, ok := parseReply(inbox, subject); !ok {
				t.Fatal("no reply")
			}
		})
		t.Logf("%v allocations for %s", allocations, data)
		if allocations > 0 {
			t.Errorf("%v allocations for %s, want none", allocations, data)
		}
	}
}
