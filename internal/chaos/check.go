// Package chaos proves the relay's promise under faults: real servers and relay
// processes, a load of transactions of all kinds, faults drawn by a seed, and a
// checker that holds what Postgres committed against what the stream got.
//
// The promise is: each committed event exactly once in the stream, in commit
// order, unchanged; the slot never confirmed past an event that is not stored;
// and the rows' status as the stream is. What failed and is asked for again stands
// where that was committed, and what is replayed stands there once more for each
// run. Only what no slot could bring comes from the table, in the order of ids.
package chaos

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
)

// digest stands for a body.
type digest [sha256.Size]byte

func digestOf(body []byte) digest { return sha256.Sum256(body) }

// event is one event that was committed.
type event struct {
	id       string
	body     digest
	end      pglogrepl.LSN // of its transaction's commit record
	inserted pglogrepl.LSN // its own record
	order    int           // among all events and wishes, as they were committed
	rejected bool          // as it was inserted, no message can carry it
}

// wish is a row that a transaction asked the relay to publish from the table.
type wish struct {
	id    string
	run   string // of a replay; empty: it failed, and is to be tried again
	end   pglogrepl.LSN
	order int
}

// message is one message of the stream, as it was read from there.
type message struct {
	sequence uint64
	id       string
	body     digest
	stored   time.Time // by the NATS server
	position string    // its Outbox-Position
}

// sample is how far the slot was confirmed at a time that lies not before the
// look at it.
type sample struct {
	taken     time.Time
	confirmed pglogrepl.LSN
	slot      int  // which one, of those that a season had one after the other
	backfill  bool // the checkpoint says that rows come from the table
}

// gap is where inserts were not published: between two LSNs.
type gap struct{ from, to pglogrepl.LSN }

// row is an event's row at the end. published is zero where it is NULL.
type row struct {
	id        string
	status    string
	published time.Time // in microseconds
}

// history is all that is to be judged.
type history struct {
	events   []event   // in commit order
	wishes   []wish    // in commit order
	messages []message // by sequence
	samples  []sample  // in any order
	rows     []row     // in any order
	after    string    // OUTBOX_AFTER_PUBLISH: mark, delete or keep

	// begins says where each slot begins: of what was committed before, it brings
	// nothing. Without a value it has all.
	begins []pglogrepl.LSN
	gaps   []gap
}

// kind is a way to break the promise.
type kind int

const (
	lost      kind = iota // committed, and never stored
	duplicate             // stored again
	disorder              // stored behind an event that was committed later
	phantom               // stored, and never committed
	altered               // stored with another body
	early                 // confirmed before it was stored
	wrongRow              // a row that does not say what the stream does
	kinds
)

var kindNames = [kinds]string{"lost", "duplicate", "out of order", "phantom", "body changed", "confirmed too early", "wrong rows"}

func (k kind) String() string { return kindNames[k] }

// finding counts what was found of one kind, with some examples.
type finding struct {
	count    int
	examples []string
}

const maxExamples = 5

type findings [kinds]finding

func (f *findings) add(k kind, format string, args ...any) {
	f[k].count++
	if len(f[k].examples) < maxExamples {
		f[k].examples = append(f[k].examples, fmt.Sprintf(format, args...))
	}
}

// merge adds others' counts and examples.
func (f *findings) merge(others findings) {
	for k := range f {
		f[k].count += others[k].count
		f[k].examples = append(f[k].examples, others[k].examples...)
	}
}

func (f *findings) clean() bool {
	return !slices.ContainsFunc(f[:], func(one finding) bool { return one.count > 0 })
}

// String is one line: each kind with its count.
func (f *findings) String() string {
	var parts []string
	for k, one := range f {
		parts = append(parts, fmt.Sprintf("%s %d", kind(k), one.count))
	}
	return strings.Join(parts, ", ")
}

// details lists the examples, one a line.
func (f *findings) details() string {
	var b strings.Builder
	for k, one := range f {
		for _, example := range one.examples {
			fmt.Fprintf(&b, "%s: %s\n", kind(k), example)
		}
	}
	return b.String()
}

// check judges a history. An event is found once of each kind at most, and a
// loss is nothing else besides: its row is right where it does not claim more.
func check(h history) findings {
	c := checker{history: h, place: make(map[string]int, len(h.events)), first: make([]*message, len(h.events)),
		wished: make(map[wishKey]int, len(h.wishes)), granted: make([]*message, len(h.wishes)), since: make(map[*message]pglogrepl.LSN, len(h.messages))}
	for i, e := range h.events {
		c.place[e.id] = i
		c.ends = append(c.ends, e.end)
	}
	for i, w := range h.wishes {
		c.wished[w.key()] = i
		c.ends = append(c.ends, w.end)
	}
	slices.Sort(c.ends)
	c.stream()
	c.losses()
	c.confirmations()
	c.table()
	return c.found
}

type checker struct {
	history
	found   findings
	place   map[string]int  // of each event in commit order
	first   []*message      // of each event, nil: none
	wished  map[wishKey]int // which wish it is
	granted []*message      // of each replay, nil: none
	ends    []pglogrepl.LSN // of all transactions
	since   map[*message]pglogrepl.LSN
}

func (c *checker) losses() {
	for i, e := range c.events {
		if c.first[i] == nil {
			c.found.add(lost, "event %s, number %d of %d, whose commit ends at %s", e.id, i+1, len(c.events), e.end)
		}
	}
	for i, w := range c.wishes {
		if w.run != "" && c.granted[i] == nil {
			c.found.add(lost, "event %s of run %s, asked for by a commit that ends at %s", w.id, w.run, w.end)
		}
	}
}

// confirmations looks for messages that a slot had passed, which had them to
// bring, when they were not stored yet. What comes from the table may be passed
// once the checkpoint says so.
func (c *checker) confirmations() {
	samples := map[int][]sample{}
	sure := map[int][]sample{}
	for _, s := range c.samples {
		samples[s.slot] = append(samples[s.slot], s)
		if !s.backfill {
			sure[s.slot] = append(sure[s.slot], s)
		}
	}
	var messages, tables []stored
	for m, end := range c.since {
		if commit, _, told := parsePosition(m.position); told && commit == 0 {
			tables = append(tables, stored{m, end})
		} else {
			messages = append(messages, stored{m, end})
		}
	}
	c.passed(messages, samples)
	c.passed(tables, sure)
}

// stored is a message, and where its transaction ends.
type stored struct {
	*message
	end pglogrepl.LSN
}

func (c *checker) passed(messages []stored, samples map[int][]sample) {
	slices.SortFunc(messages, func(a, b stored) int { return cmp.Compare(b.end, a.end) })
	found := map[*message]bool{}
	for slot, samples := range samples {
		slices.SortFunc(samples, func(a, b sample) int { return cmp.Compare(b.confirmed, a.confirmed) })
		next := 0
		var passed time.Time // the earliest time at which an LSN as high was confirmed
		for _, m := range messages {
			if m.end <= c.begin(slot) {
				break
			}
			for ; next < len(samples) && samples[next].confirmed >= m.end; next++ {
				if taken := samples[next].taken; passed.IsZero() || taken.Before(passed) {
					passed = taken
				}
			}
			if !passed.IsZero() && m.stored.After(passed) && !found[m.message] {
				found[m.message] = true
				c.found.add(early, "event %s was stored %s after the slot had passed %s", m.id, m.stored.Sub(passed), m.end)
			}
		}
	}
}

func (c *checker) begin(slot int) pglogrepl.LSN {
	if slot < len(c.begins) {
		return c.begins[slot]
	}
	return 0
}

// table holds the rows against the stream.
func (c *checker) table() {
	rows := make(map[string]row, len(c.rows))
	for _, r := range c.rows {
		rows[r.id] = r
		if _, committed := c.place[r.id]; !committed {
			c.found.add(wrongRow, "row %s was never committed", r.id)
		}
	}
	for i, e := range c.events {
		r, there := rows[e.id]
		if fault := rowFault(r, there, c.first[i], c.after); fault != "" {
			c.found.add(wrongRow, "row %s %s", e.id, fault)
		}
	}
}

// rowFault says what is wrong with the row of an event whose message is m.
func rowFault(r row, there bool, m *message, after string) string {
	switch {
	case after == "delete" && m != nil:
		return when(there, "is still there, as message %d is", m)
	case !there:
		return "is gone"
	case after == "mark" && m != nil:
		if r.status != "published" || r.published.IsZero() {
			return fmt.Sprintf("is %s, and message %d is stored", r.status, m.sequence)
		}
		return when(r.published.Before(m.stored.Truncate(time.Microsecond)), "was marked before message %d was stored", m)
	case r.status != "pending" || !r.published.IsZero():
		return "is " + r.status + ", and should be pending"
	}
	return ""
}

func when(wrong bool, format string, m *message) string {
	if !wrong {
		return ""
	}
	return fmt.Sprintf(format, m.sequence)
}
