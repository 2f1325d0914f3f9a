package ops

import (
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// textWidth is what a line of the text fits in, unless one word is longer.
const textWidth = 80

// report is aligned text: a label, and lines beside it.
type report struct{ strings.Builder }

const labelWidth = 12

// line adds a line, broken between words where it is too long. An empty label
// continues the one above.
func (r *report) line(label, format string, args ...any) {
	for _, part := range wrap(printable(fmt.Sprintf(format, args...)), textWidth-labelWidth) {
		fmt.Fprintf(r, "%-*s%s\n", labelWidth, label, part)
		label = ""
	}
}

// printable keeps what stands in a row from steering the terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return utf8.RuneError
		}
		return r
	}, text)
}

// wrap breaks text between words. What was aligned by several spaces stays so
// where it fits.
func wrap(text string, width int) []string {
	if utf8.RuneCountInString(text) <= width {
		return []string{text}
	}
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		switch {
		case line == "":
			line = word
		case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width:
			lines = append(lines, line)
			line = "  " + word
		default:
			line += " " + word
		}
	}
	return append(lines, line)
}

// text is the status for people.
func (s *Status) text() string {
	var r report
	if s.Relay != nil {
		r.line("relay", "%s, here", s.Relay.State)
	}
	s.slotText(&r)
	s.lagText(&r)
	s.checkpointText(&r)
	s.streamText(&r)
	s.rowsText(&r)
	s.batchText(&r)
	s.failuresText(&r)
	s.problemsText(&r)
	return r.String()
}

func (s *Status) slotText(r *report) {
	if s.Slot == nil {
		r.line("slot", "does not exist")
		return
	}
	use := "no relay reads from it"
	if s.Slot.Active {
		use = "a relay reads from it"
		if s.Slot.ActivePID != nil {
			use += fmt.Sprintf(" (walsender %d)", *s.Slot.ActivePID)
		}
	}
	r.line("slot", "%s (%s): %s", s.Slot.Name, s.Slot.Plugin, use)
	safe := "no limit"
	if s.Slot.SafeWALSize != nil {
		safe = size(*s.Slot.SafeWALSize) + " left until it is in danger"
	}
	r.line("", "wal_status %s, holds %s of WAL, %s", s.Slot.WALStatus, size(s.Slot.HeldBytes), safe)
	r.line("", "restart %s, confirmed %s", s.Slot.RestartLSN, s.Slot.ConfirmedLSN)
}

// lagText says what is behind, and what that means.
func (s *Status) lagText(r *report) {
	if s.Slot != nil {
		r.line("lag", "%s of WAL, of all tables, written since the confirmed LSN", size(s.Slot.LagBytes))
	}
	label := "lag"
	if s.Slot != nil {
		label = ""
	}
	switch {
	case s.Rows.Error != nil:
	case s.Rows.LagSeconds == nil:
		r.line(label, "in time: not known, since kept rows do not tell whether they are published")
	case s.Rows.OldestPendingAt == nil:
		r.line(label, "0 s: no row that was seen is pending")
	default:
		r.line(label, "%s: the age of the oldest pending row that was seen", seconds(*s.Rows.LagSeconds))
	}
}

func (s *Status) checkpointText(r *report) {
	c := s.Checkpoint
	if c == nil {
		r.line("checkpoint", "none")
		return
	}
	r.line("checkpoint", "%s, at %s/%d, sequence %s of stream %s", c.Phase, c.CommitLSN, c.Ordinal, grouped(c.StreamSequence), c.Stream)
	r.line("", "confirmed %s, format %d, written %s ago", c.ConfirmedLSN, c.Format, seconds(c.AgeSeconds))
	if c.ForeignSeen {
		r.line("", "foreign messages were seen in the stream")
	}
}

func (s *Status) streamText(r *report) {
	if s.Stream.Error != nil {
		r.line("stream", "%s: %s", s.Stream.Name, *s.Stream.Error)
		return
	}
	r.line("stream", "%s: last sequence %s, %s messages, %s", s.Stream.Name, grouped(int64(*s.Stream.LastSequence)),
		grouped(int64(*s.Stream.Messages)), size(int64(*s.Stream.Bytes)))
}

func (s *Status) rowsText(r *report) {
	rows := s.Rows
	if rows.Error != nil {
		r.line("rows", "not counted: %s", *rows.Error)
		return
	}
	label := "rows"
	count := func(what string, n *int64, exact bool, hedge string) {
		if n == nil {
			return
		}
		text := grouped(*n)
		if !exact {
			text = hedge + grouped(coarse(*n))
		}
		r.line(label, "%-10s%s", what, text)
		label = ""
	}
	about := func(what string, n *int64) { count(what, n, rows.Exact, "about ") }
	about("pending", rows.Pending)
	about("published", rows.Published)
	about("kept", rows.Kept)
	count("failed", rows.Failed, rows.FailedExact, "at least about ")
	if rows.Exact {
		return
	}
	among := ""
	if rows.PendingInNewest != nil {
		among = fmt.Sprintf(" (%s pending)", grouped(*rows.PendingInNewest))
	}
	r.line("", "exact for the newest %s rows%s and for failed ones; of what is older, one page of %s was read",
		grouped(rows.CountedNewest), among, grouped(rows.SampledEachPages))
}

func (s *Status) batchText(r *report) {
	if s.Checkpoint != nil && s.Checkpoint.Phase == "backfilling" {
		r.line("backfill", "%s done so far", rows(s.Checkpoint.Backfilled))
	}
	b := s.Batch
	if b == nil {
		return
	}
	kind := b.Kind
	if b.Run != nil {
		kind += " " + *b.Run
	}
	if b.Done < b.Rows {
		r.line("batch", "%s: %s of %s done, begun %s ago", kind, grouped(int64(b.Done)), rows(int64(b.Rows)), seconds(b.AgeSeconds))
		return
	}
	r.line("batch", "none under way; the last was a %s of %s, %s ago", kind, rows(int64(b.Rows)), seconds(b.AgeSeconds))
}

func (s *Status) failuresText(r *report) {
	label := "failures"
	for _, f := range s.Failures {
		times := ""
		if f.Attempts > 1 {
			times = fmt.Sprintf(", %d times", f.Attempts)
		}
		r.line(label, "%s", f.ID)
		r.line("", "  %s %s, %s UTC%s", f.AggregateType, f.EventType, f.FailedAt.Format(time.DateTime), times)
		for _, part := range wrap(f.Reason, textWidth-labelWidth-2) {
			r.line("", "  %s", part)
		}
		label = ""
	}
}

func (s *Status) problemsText(r *report) {
	if len(s.Problems) == 0 {
		r.WriteString("\nNothing is wrong.\n")
		return
	}
	for _, p := range s.Problems {
		r.WriteByte('\n')
		for i, part := range wrap(p.What, textWidth-2) {
			mark := "! "
			if i > 0 {
				mark = ""
			}
			fmt.Fprintf(r, "%s%s\n", mark, part)
		}
		for i, part := range wrap(p.Remedy, textWidth-5) {
			mark := "  -> "
			if i > 0 {
				mark = "   "
			}
			fmt.Fprintf(r, "%s%s\n", mark, part)
		}
	}
}

func seconds(s float64) string { return span(time.Duration(s * float64(time.Second))) }
