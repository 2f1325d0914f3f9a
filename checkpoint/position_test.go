package checkpoint

import (
	"cmp"
	"encoding/binary"
	"errors"
	"math"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"outbox-relay/internal/lsn"
	"outbox-relay/outbox/event"
)

var lsnForm = regexp.MustCompile(`^0*([0-9A-Fa-f]{1,8})/0*([0-9A-Fa-f]{1,8})$`)

// modelLSN is what a text says: false for what is no LSN.
func modelLSN(text string) (pglogrepl.LSN, bool) {
	m := lsnForm.FindStringSubmatch(text)
	if m == nil {
		return 0, false
	}
	high, _ := strconv.ParseUint(m[1], 16, 64)
	low, _ := strconv.ParseUint(m[2], 16, 64)
	return pglogrepl.LSN(high<<32 | low), true
}

// FuzzPosition: every position comes back from its text, a text is read whole or
// not at all, and the order of positions is that of commits.
func FuzzPosition(f *testing.F) {
	f.Add("0/16B3748", uint64(0x16B3748), uint64(2), uint64(0x16B3748), uint64(3))
	f.Add("FFFFFFFF/FFFFFFFF", uint64(math.MaxUint64), uint64(math.MaxUint64), uint64(0), uint64(0))
	for _, text := range []string{"0/01", "1/00000000", "a/b", "", "/", "1/", "/1", "0/16B374v", "0/16B3748 ", " 0/1", "0/1/2", "100000000/0", "0/100000000", "0x1/2", "+1/2", "1/-2", "1_0/2"} {
		f.Add(text, uint64(1)<<32, uint64(1), uint64(1)<<32-1, uint64(9))
	}
	f.Fuzz(func(t *testing.T, text string, commit, ordinal, otherCommit, otherOrdinal uint64) {
		want, legal := modelLSN(text)
		if got, err := lsn.Parse(text); legal != (err == nil) || got != want {
			t.Fatalf("%q: %s, %v, want %s, %v", text, got, err, want, legal)
		}
		p, q := event.Position{Commit: pglogrepl.LSN(commit), Ordinal: ordinal}, event.Position{Commit: pglogrepl.LSN(otherCommit), Ordinal: otherOrdinal}
		for _, p := range []event.Position{p, q} {
			if back := parsePosition(t, p.String()); back != p {
				t.Fatalf("%+v came back from %q as %+v", p, p, back)
			}
		}
		if order := p.Compare(q); order != -q.Compare(p) || (order == 0) != (p == q) || commit != otherCommit && order != cmp.Compare(commit, otherCommit) {
			t.Fatalf("%s to %s: %d", p, q, order)
		}
	})
}

// parsePosition parses what Position.String prints.
func parsePosition(t testing.TB, text string) event.Position {
	t.Helper()
	slash := strings.LastIndexByte(text, '/')
	lsn, err := lsn.Parse(text[:max(slash, 0)])
	ordinal, err2 := strconv.ParseUint(text[slash+1:], 10, 64)
	if err := errors.Join(err, err2); err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return event.Position{Commit: lsn, Ordinal: ordinal}
}

// row is a row of outbox_relay_checkpoints as it comes from Postgres, column by
// column, in the formats that pgx asks for.
type row []value

type value struct {
	oid    uint32
	format int16
	bytes  []byte
}

func text(s string) value { return value{pgtype.TextOID, pgx.TextFormatCode, []byte(s)} }

func number(n int64) value {
	return value{pgtype.Int8OID, pgx.BinaryFormatCode, binary.BigEndian.AppendUint64(nil, uint64(n))}
}

func small(n int32) value {
	return value{pgtype.Int4OID, pgx.BinaryFormatCode, binary.BigEndian.AppendUint32(nil, uint32(n))}
}

func truth(b bool) value {
	v := value{pgtype.BoolOID, pgx.BinaryFormatCode, []byte{0}}
	if b {
		v.bytes[0] = 1
	}
	return v
}

func moment(micros int64) value { // since the year 2000
	return value{pgtype.TimestamptzOID, pgx.BinaryFormatCode, binary.BigEndian.AppendUint64(nil, uint64(micros))}
}

// Scan implements pgx.Row, as pgx does.
func (r row) Scan(dest ...any) error {
	m := pgtype.NewMap()
	for i, v := range r {
		if err := m.Scan(v.oid, v.format, v.bytes, dest[i]); err != nil {
			return err
		}
	}
	return nil
}

// FuzzCheckpoint: a checkpoint is read as its row has it, or refused: never with
// half an LSN, a number that wrapped round, or a phase or format that is guessed.
func FuzzCheckpoint(f *testing.F) {
	const good = "0/16B3748"
	add := func(format int32, phase, commit, confirmed string, ordinal, sequence int64) {
		f.Add(int64(7), format, phase, "7412345678901234567", int32(1), commit, ordinal, confirmed, "EVENTS", int64(812345678901234), sequence, "event_01M856", int32(16384), false, "16500:771", int64(8192))
	}
	add(1, "streaming", good, "0/16B3778", 2, 41)
	add(1, "creating", "0/0", "0/0", 0, 0)
	add(2, "backfilling", good, good, 2, 41)
	add(3, "streaming", good, good, 2, 41)
	add(0, "streaming", good, good, 2, 41)
	add(1, "stre!ming", good, good, 2, 41)
	add(1, "streaming", "0/16B374", "0/16v3748", 2, 41)
	add(1, "streaming", "0/116B374800", good, 2, 41)
	add(1, "streaming", good, good, -2, math.MinInt64)
	add(1, "streaming", "FFFFFFFF/FFFFFFFF", "", math.MaxInt64, math.MaxInt64)
	f.Fuzz(func(t *testing.T, epoch int64, format int32, phase, system string, timeline int32, commit string, ordinal int64, confirmed, stream string,
		created, sequence int64, message string, bound int32, foreign bool, publication string, backfilled int64) {
		got, claimed, err := scan(row{number(epoch), small(format), text(phase), text(system), small(timeline), text(commit), number(ordinal), text(confirmed),
			text(stream), moment(created), number(sequence), text(message), small(bound), truth(foreign), text(publication), number(backfilled)})
		at, legal := modelLSN(commit)
		end, legalEnd := modelLSN(confirmed)
		finite := created != math.MaxInt64 && created != math.MinInt64 // "infinity" is no time
		legal = legal && legalEnd && finite && (format == 1 || format == 2) && ordinal >= 0 && sequence >= 0 && (phase == "creating" || phase == "backfilling" || phase == "streaming")
		if legal != (err == nil) {
			t.Fatalf("read %+v, %v; legal: %v", got, err, legal)
		}
		if !legal {
			return
		}
		want := Checkpoint{Phase: Phase(phase), SystemID: system, Timeline: timeline, Position: event.Position{Commit: at, Ordinal: uint64(ordinal)}, Confirmed: end, Stream: stream,
			StreamCreated: got.StreamCreated, Sequence: uint64(sequence), MessageID: message, Bound: int(bound), Foreign: foreign, Publication: publication,
			Backfilled: backfilled}
		if !reflect.DeepEqual(got, want) || claimed != epoch {
			t.Fatalf("read %+v of epoch %d, want %+v of %d", got, claimed, want, epoch)
		}
		if back := got.StreamCreated.Sub(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)).Microseconds(); abs(created) < 1<<52 && back != created {
			t.Fatalf("created %d us after 2000, read as %s", created, got.StreamCreated)
		}
	})
}

func abs(n int64) int64 { return max(n, -n) }
