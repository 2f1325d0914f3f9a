package replication

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pglogrepl"
)

// heard is a handler that keeps what a message came to.
type heard struct{ calls []string }

func (h *heard) Data(start pglogrepl.LSN, data []byte) error {
	if cap(data) != len(data) {
		return fmt.Errorf("%d bytes behind the message", cap(data)-len(data))
	}
	h.calls = append(h.calls, fmt.Sprintf("data %s %q", start, data))
	return nil
}

func (h *heard) Keepalive(end pglogrepl.LSN, urgent bool) error {
	h.calls = append(h.calls, fmt.Sprintf("keepalive %s %v", end, urgent))
	return nil
}

func (h *heard) Notice(string) {}
func (h *heard) Idle()         {}
func (h *heard) Lost(error)    {}

func newSession(at pglogrepl.LSN) *Session {
	return &Session{slot: "outbox_relay", at: at, moved: make(chan struct{}, 1), ask: make(chan struct{}, 1)}
}

func xlogData(start, end pglogrepl.LSN, message string) []byte {
	m := binary.BigEndian.AppendUint64([]byte{'w'}, uint64(start))
	m = binary.BigEndian.AppendUint64(m, uint64(end))
	m = binary.BigEndian.AppendUint64(m, 1_000_000)
	return append(m, message...)
}

func keepalive(end pglogrepl.LSN, urgent byte) []byte {
	m := binary.BigEndian.AppendUint64([]byte{'k'}, uint64(end))
	m = binary.BigEndian.AppendUint64(m, 1_000_000)
	return append(m, urgent)
}

// FuzzFrames: two messages of the walsender come to what pglogrepl reads from
// them, each to one call of the handler; or the session ends by ErrMalformed,
// with the LSN behind which it came. A message without an LSN has the one before.
func FuzzFrames(f *testing.F) {
	f.Add(xlogData(0x1_00000010, 0x1_00000010, "B and so on"), keepalive(0x1_00000048, 1))
	f.Add(keepalive(0x1_00000048, 0), xlogData(10, 20, ""))
	f.Add(xlogData(10, 20, "C")[:24], keepalive(7, 2)[:17])
	f.Add(xlogData(10, 20, "B"), xlogData(0, 0, "R"))
	f.Add([]byte{}, append(keepalive(7, 0), 0))
	f.Fuzz(func(t *testing.T, first, second []byte) {
		const start = pglogrepl.LSN(0x7_0000ABCD)
		s, at := newSession(start), start
		for _, m := range [][]byte{first, second} {
			h := &heard{}
			m = bytes.Clone(m)
			err := s.handle(m[:len(m):len(m)], h)
			want, asks := expected(m, at)
			switch {
			case want == "":
				if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "behind "+at.String()+":") || len(h.calls) > 0 {
					t.Fatalf("%q: %q, %v, want ErrMalformed behind %s", m, h.calls, err, at)
				}
				return
			case err != nil:
				t.Fatalf("%q: %v", m, err)
			case len(h.calls) != 1 || h.calls[0] != want:
				t.Fatalf("%q: %q, want %q", m, h.calls, want)
			case asks != (len(s.ask) == 1):
				t.Fatalf("%q: an answer is due: %v, want %v", m, !asks, asks)
			}
			at = s.at
			drain(s.ask)
		}
	})
}

// expected is the call that a message behind an LSN must come to, by pglogrepl;
// "": none.
func expected(m []byte, at pglogrepl.LSN) (call string, asks bool) {
	if len(m) == 0 {
		return "", false
	}
	switch m[0] {
	case pglogrepl.XLogDataByteID:
		if x, err := pglogrepl.ParseXLogData(m[1:]); err == nil {
			return fmt.Sprintf("data %s %q", cmp.Or(x.WALStart, at), x.WALData), false
		}
	case pglogrepl.PrimaryKeepaliveMessageByteID:
		if k, err := pglogrepl.ParsePrimaryKeepaliveMessage(m[1:]); err == nil {
			return fmt.Sprintf("keepalive %s %v", k.ServerWALEnd, k.ReplyRequested), k.ReplyRequested
		}
	}
	return "", false
}

func drain(c chan struct{}) {
	select {
	case <-c:
	default:
	}
}

// What is cut off, wherever, is told with the LSN of the message before it.
func TestTruncatedFrames(t *testing.T) {
	for name, m := range map[string][]byte{"XLogData": xlogData(10, 20, ""), "keepalive": keepalive(30, 1)} {
		for n := range len(m) {
			s := newSession(0x1_00000010)
			h := &heard{}
			err := s.handle(m[:n:n], h)
			if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "1/10") || len(h.calls) > 0 {
				t.Errorf("%s of %d bytes: %q, %v, want ErrMalformed behind 1/10", name, n, h.calls, err)
			}
		}
	}
}

var wholeLSN = regexp.MustCompile(`^0*([0-9A-Fa-f]{1,8})/0*([0-9A-Fa-f]{1,8})$`)

// FuzzTimelineHistory: where a timeline was left is read as its line has it, or
// not at all: never another line's, never half an LSN.
func FuzzTimelineHistory(f *testing.F) {
	f.Add("1\t0/3000000\tno recovery target specified\n", int32(1))
	f.Add("# a comment\n\n1\t0/3000000\tx\n\n2\t1/A0\tbefore 2000-01-01 00:00:00+00\n", int32(2))
	f.Add("1\t0/30000000000\n", int32(1))
	f.Add("1\t0/3000vv\n", int32(1))
	f.Add("1", int32(1))
	f.Fuzz(func(t *testing.T, history string, timeline int32) {
		got, err := System{history: history}.Left(timeline)
		for line := range strings.Lines(history) {
			fields := strings.Fields(line)
			if len(fields) < 2 || fields[0] != strconv.Itoa(int(timeline)) {
				continue
			}
			m := wholeLSN.FindStringSubmatch(fields[1])
			if m == nil && err == nil {
				t.Fatalf("%q: left at %s", line, got)
			}
			if m != nil {
				high, _ := strconv.ParseUint(m[1], 16, 32)
				low, _ := strconv.ParseUint(m[2], 16, 32)
				if err != nil || got != pglogrepl.LSN(high<<32|low) {
					t.Fatalf("%q: left at %s, %v", line, got, err)
				}
			}
			return
		}
		if !errors.Is(err, ErrNotAncestor) {
			t.Fatalf("timeline %d of %q: left at %s, %v, want ErrNotAncestor", timeline, history, got, err)
		}
	})
}
