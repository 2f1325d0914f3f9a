package ops

import (
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/checkpoint"
)

// Each thing that is wrong is named, with what to do about it.
func TestProblems(t *testing.T) {
	last := uint64(10)
	well := func() Status {
		s := Status{Slot: &SlotStatus{Name: "slot", Plugin: "pgoutput", Active: true, WALStatus: "reserved"},
			Checkpoint: &CheckpointStatus{Phase: string(checkpoint.Streaming), Stream: "EVENTS", StreamSequence: 10}}
		s.Stream = StreamStatus{Name: "EVENTS", LastSequence: &last, Messages: &last, Bytes: &last}
		return s
	}
	if s := well(); len(s.problems()) != 0 {
		t.Errorf("nothing is wrong, and it says %+v", s.problems())
	}
	text, many, now := "no answer", int64(12_000), time.Now()
	for _, c := range []struct {
		name         string
		change       func(*Status)
		what, remedy string
	}{
		{"first run", func(s *Status) { s.Slot, s.Checkpoint = nil, nil }, "no relay has run yet", "outbox-relay run"},
		{"slot gone", func(s *Status) { s.Slot = nil }, "the slot is gone", "start the relay"},
		{"slot being made", func(s *Status) { s.Slot, s.Checkpoint.Phase = nil, string(checkpoint.Creating) }, "not made yet", "open transactions"},
		{"slot of another plugin", func(s *Status) { s.Slot.Plugin = "wal2json" }, "wal2json", "OUTBOX_SLOT"},
		{"slot lost", func(s *Status) { s.Slot.WALStatus = "lost" }, "the slot is lost", "max_slot_wal_keep_size"},
		{"slot about to be lost", func(s *Status) { s.Slot.WALStatus = "unreserved" }, "about to be lost", "max_slot_wal_keep_size"},
		{"no checkpoint", func(s *Status) { s.Checkpoint = nil }, "has no checkpoint", "start the relay"},
		{"no relay", func(s *Status) { s.Slot.Active, s.Slot.HeldBytes = false, 3<<30 }, "keeps 3.0 GiB of WAL", "start one: `outbox-relay run`"},
		{"no relay for long", func(s *Status) { s.Slot.Active, s.Checkpoint.AgeSeconds = false, 200_000 }, "no relay reads", "outbox-relay drop slot"},
		{"publishing stands still", func(s *Status) {
			s.Checkpoint.AgeSeconds = 300
			s.Checkpoint.UpdatedAt, s.At = now.Add(-5*time.Minute), now
			oldest := now.Add(-4 * time.Minute)
			s.Rows.OldestPendingAt = &oldest
		}, "rows have been pending for 4 min 0 s", "log of the relay"},
		{"no NATS", func(s *Status) { s.Stream = StreamStatus{Name: "EVENTS", Error: &text} }, "could not be asked", "waits in the slot"},
		{"another stream", func(s *Status) { s.Stream.Name = "OTHER" }, "belongs to stream EVENTS, not OTHER", "OUTBOX_STREAM"},
		{"stream behind", func(s *Status) { s.Checkpoint.StreamSequence = 11 }, "ends before the checkpoint", "log"},
		{"foreign messages", func(s *Status) { s.Checkpoint.ForeignSeen = true }, "others have published", "deny"},
		{"not counted", func(s *Status) { s.Rows.Error = &text }, "not counted", "VACUUM"},
		{"failed rows", func(s *Status) { s.Rows.Failed = &many }, "at least 12,000 rows are failed", "outbox-relay retry"},
		{"rejected events", func(s *Status) { s.Leftovers.Kept = 2 }, "2 rows of rejected events", "delete"},
		{"locked rows", func(s *Status) { s.Leftovers.Waiting = 1 }, "1 row is locked", "end the transactions"},
	} {
		s := well()
		c.change(&s)
		found := s.problems()
		if c.name == "no relay" && strings.Contains(found[0].Remedy, "drop") {
			t.Errorf("it advises to drop a slot whose checkpoint is %v s old", s.Checkpoint.AgeSeconds)
		}
		if len(found) != 1 || !strings.Contains(found[0].What, c.what) || !strings.Contains(found[0].Remedy, c.remedy) {
			t.Errorf("%s: %+v", c.name, found)
		}
	}
}

// Beyond the machine a connection has to be encrypted, and the server verified.
func TestJudgeTLS(t *testing.T) {
	for _, c := range []struct{ url, inUse, state, says string }{
		{"postgres://relay@localhost/app?sslmode=disable", "", stateOK, "on this machine"},
		{"postgres://relay@127.0.0.1/app?sslmode=require", "TLSv1.3", stateOK, "TLSv1.3"},
		{"postgres://relay@db.example/app?sslmode=prefer", "", stateWarning, "not encrypted"},
		{"postgres://relay@db.example/app?sslmode=require", "TLSv1.3", stateWarning, "nobody looks"},
		{"postgres://relay@db.example/app?sslmode=verify-ca", "TLSv1.3", stateOK, "channel_binding=require makes sure"},
		{"postgres://relay@db.example/app?sslmode=verify-full&channel_binding=disable", "TLSv1.3", stateOK, "channel binding is off"},
		{"postgres://relay@db.example/app?sslmode=verify-full&channel_binding=require", "TLSv1.3", stateOK, "the password is bound to it"},
		{"host=/var/run/postgresql user=relay dbname=app", "", stateOK, "on this machine"},
	} {
		config, err := pgx.ParseConfig(c.url)
		if err != nil {
			t.Fatal(err)
		}
		state, f := judgeTLS(config, c.inUse)
		if state != c.state || !strings.Contains(f.What, c.says) || (state == stateWarning) != (f.Remedy != "") {
			t.Errorf("%s: %s, %+v", c.url, state, f)
		}
	}
}

func TestFiguresForPeople(t *testing.T) {
	for got, want := range map[string]string{
		grouped(0): "0", grouped(999): "999", grouped(1_000): "1,000", grouped(-1_234_567): "-1,234,567",
		grouped(coarse(999)): "999", grouped(coarse(399_205)): "399,000", grouped(coarse(9_998_716)): "10,000,000",
		size(1023): "1023 B", size(1536): "1.5 KiB", size(16 << 20): "16.0 MiB",
		seconds(0.25): "0.2 s", seconds(75): "75 s", seconds(754): "12 min 34 s", seconds(7384): "2 h 3 min", seconds(200_000): "2 d 7 h",
		rows(1): "1 row", rowsAre(2): "2 rows are",
		strings.Join(wrap("a long line of words", 10), "|"): "a long|  line of|  words",
		printable("a\x1b[2Jb"):                              "a\ufffd[2Jb",
		quoteShell("it's"):                                  `'it'\''s'`, quoteShell("2026-11-24T15:30:00Z"): "2026-11-24T15:30:00Z",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
