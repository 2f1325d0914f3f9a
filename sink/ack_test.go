package sink

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"unicode/utf8"
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
		`{"stream":"EVENTS","seq":7_000}`, `{"stream":"EVENTS","seq":  }`, `{"stream":"EVENTS"`, `{"stream":"`,
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

// FuzzParseAck: the shortcut reads what encoding/json reads, or leaves it to it.
func FuzzParseAck(f *testing.F) {
	for _, seed := range []string{`{"stream":"EVENTS","seq":7}`, `{"stream":"EVENTS", "seq": 7}`, `{"stream":"a\"b","seq":7,"duplicate":true}`,
		`{"error":{"code":400,"err_code":10071,"description":"x"},"seq":0}`, `{"stream":"EVENTS","seq":7,"seq":8}`, "{\"stream\":\"\xff\",\"seq\":7}"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := parseAck(data)
		var want struct {
			Stream    string
			Seq       uint64
			Duplicate bool
			Error     *struct {
				Code int `json:"err_code"`
			}
		}
		wrong := json.Unmarshal(data, &want)
		switch {
		case err != nil:
			return // unknown: the chain resyncs
		case !legalValue(got.stream):
			return // no stream of ours: the chain resyncs, too
		case wrong != nil:
			t.Fatalf("%q: taken for %+v, and it is no JSON: %v", data, got, wrong)
		case want.Error != nil && got.code != want.Error.Code, want.Error == nil && got.code != 0:
			t.Fatalf("%q: code %d", data, got.code)
		case got.code == 0 && (got.sequence != want.Seq || got.sequence == 0 || got.duplicate != want.Duplicate):
			t.Fatalf("%q: got %+v, want %+v", data, got, want)
		case utf8.Valid(data) && string(got.stream) != want.Stream:
			t.Fatalf("%q: stream %q, want %q", data, got.stream, want.Stream)
		}
	})
}

func TestReplies(t *testing.T) {
	const inbox = "_INBOX_outbox.ABC."
	for _, c := range [][2]uint64{{0, 0}, {1, 35}, {36, 36 * 36}, {math.MaxUint64, math.MaxUint64}} {
		reply := string(appendReply(nil, inbox, c[0], c[1]))
		generation, number, ok := parseReply(inbox, reply)
		if !ok || generation != c[0] || number != c[1] {
			t.Errorf("%v came back from %s as %d, %d, %v", c, reply, generation, number, ok)
		}
		if len(reply) > replyRoom || strings.ContainsAny(strings.TrimPrefix(reply, inbox), "*> ") {
			t.Errorf("the reply subject %q has %d bytes", reply, len(reply))
		}
	}
	for _, subject := range []string{"", inbox, inbox + "1", inbox + "1.", inbox + ".1", inbox + "1.2.3", inbox + "-1.2",
		inbox + "1.!", "_INBOX_outbox.ABD.1.2", inbox[:len(inbox)-1] + "1.2", inbox + "1.3w5e11264sgsg"} {
		if generation, number, ok := parseReply(inbox, subject); ok {
			t.Errorf("%q: taken for %d, %d", subject, generation, number)
		}
	}
}

func TestReadingAnAckAllocatesNothing(t *testing.T) {
	const inbox = "_INBOX_outbox.ABC."
	subject := string(appendReply(nil, inbox, 3, 1234567))
	for _, data := range []string{`{"stream":"EVENTS","seq":1234567}`, `{"stream":"EVENTS", "seq": 1234567}`} {
		answer := []byte(data)
		allocations := testing.AllocsPerRun(1000, func() {
			if _, err := parseAck(answer); err != nil {
				t.Fatal(err)
			}
			if _, _, ok := parseReply(inbox, subject); !ok {
				t.Fatal("no reply")
			}
		})
		t.Logf("%v allocations for %s", allocations, data)
		if allocations > 0 {
			t.Errorf("%v allocations for %s, want none", allocations, data)
		}
	}
}
