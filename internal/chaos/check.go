// Package chaos proves the relay's promise under faults: real servers and relay
// processes, a load of transactions of all kinds, faults drawn by a seed, and a
// checker that holds what Postgres committed against what the stream got.
//
// The promise is: each committed event exactly once in the stream, in commit
// order, unchanged; the slot never confirmed past an event that is not stored;
// and the rows' status as the stream is.
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
	id   string
	body digest
	end  pglogrepl.LSN // of its transaction's commit record
}

// message is one message of the stream, as it was read from there.
type message struct {
	sequence uint64
	id       string
	body     digest
	stored   time.Time // by the NATS server
}

// sample is how far the slot was confirmed at a time that lies not before the
// look at it.
type sample struct {
	taken     time.Time
	confirmed pglogrepl.LSN
}

// row is an event's row at the end. published is zero where it is NULL.
type row struct {
	id        string
	status    string
	published time.Time // in microseconds
}

// history is all that is to be judged.
type history struct {
	events   []event   // in commit order
	messages []message // by sequence
	samples  []sample  // in any order
	rows     []row     // in any order
	after    string    // OUTBOX_AFTER_PUBLISH: mark, delete or keep
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
	c := checker{history: h, place: make(map[string]int, len(h.events)), first: make([]*message, len(h.events))}
	for i, e := range h.events {
		c.place[e.id] = i
	}
	c.stream()
	c.losses()
	c.confirmations()
	c.table()
	return c.found
}

type checker struct {
	history
	found findings
	place map[string]int // of each event in commit order
	first []*message     // of each event, nil: none
}

// stream looks for duplicates, phantoms, changed bodies and disorder. Only an
// event's first message counts for the order.
func (c *checker) stream() {
	newest := -1
	for i := range c.messages {
		m := &c.messages[i]
		at, committed := c.place[m.id]
		switch {
		case !committed:
			c.found.add(phantom, "message %d bears id %q, which was never committed", m.sequence, m.id)
			continue
		case m.body != c.events[at].body:
			c.found.add(altered, "message %d, event %s, has another body than its row", m.sequence, m.id)
		}
		if c.first[at] != nil {
			c.found.add(duplicate, "message %d bears id %s, as message %d does (stored %s later)",
				m.sequence, m.id, c.first[at].sequence, m.stored.Sub(c.first[at].stored))
			continue
		}
		c.first[at] = m
		if at < newest {
			c.found.add(disorder, "message %d, event %s, was committed before event %s, which stands before it",
				m.sequence, m.id, c.events[newest].id)
		}
		newest = max(newest, at)
	}
}

func (c *checker) losses() {
	for i, e := range c.events {
		if c.first[i] == nil {
			c.found.add(lost, "event %s, number %d of %d, whose commit ends at %s", e.id, i+1, len(c.events), e.end)
		}
	}
}

// confirmations looks for events that the slot had passed when they were not
// stored yet.
func (c *checker) confirmations() {
	samples := slices.Clone(c.samples)
	slices.SortFunc(samples, func(a, b sample) int { return cmp.Compare(b.confirmed, a.confirmed) })
	next := 0
	var passed time.Time // the earliest time at which an LSN as high was confirmed
	for i := len(c.events) - 1; i >= 0; i-- {
		for ; next < len(samples) && samples[next].confirmed >= c.events[i].end; next++ {
			if taken := samples[next].taken; passed.IsZero() || taken.Before(passed) {
				passed = taken
			}
		}
		if m := c.first[i]; m != nil && !passed.IsZero() && m.stored.After(passed) {
			c.found.add(early, "event %s was stored %s after the slot had passed %s", m.id, m.stored.Sub(passed), c.events[i].end)
		}
	}
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
