package chaos

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
)

// wishKey is what a message tells of the wish that it grants: a replay's has the
// run in its id, one that failed before has the transaction in its position.
type wishKey struct {
	id, run string
	end     pglogrepl.LSN // 0 for a replay: a run has each row once
}

func (w wish) key() wishKey {
	if w.run != "" {
		return wishKey{id: w.id, run: w.run}
	}
	return wishKey{id: w.id, end: w.end}
}

// stream looks for duplicates, phantoms, changed bodies and disorder. Only an
// event's first message counts for the order.
func (c *checker) stream() {
	ranks := ranking{order: -1}
	for i := range c.messages {
		m := &c.messages[i]
		id, run, _ := strings.Cut(m.id, ":")
		at, committed := c.place[id]
		seen := c.slotOf(at, committed, wishKey{id: id, run: run})
		switch {
		case seen == nil:
			c.found.add(phantom, "message %d bears id %q, which was never committed", m.sequence, m.id)
			continue
		case m.body != c.events[at].body:
			c.found.add(altered, "message %d, event %s, has another body than its row", m.sequence, m.id)
		}
		if first := *seen; first != nil {
			c.found.add(duplicate, "message %d, stored at %s, bears id %s, as message %d does (stored %s later)",
				m.sequence, clock(m.stored), m.id, first.sequence, m.stored.Sub(first.stored))
			continue
		}
		*seen = m
		c.rank(m, &c.events[at], run, &ranks)
	}
}

// slotOf is where the first message of an event, or of its replay, is kept; nil
// where there is no such thing.
func (c *checker) slotOf(at int, committed bool, key wishKey) **message {
	if !committed {
		return nil
	}
	if key.run == "" {
		return &c.first[at]
	}
	if i, wished := c.wished[key]; wished {
		return &c.granted[i]
	}
	return nil
}

// clock is a time as the servers' logs have it.
func clock(t time.Time) string { return t.UTC().Format("15:04:05.000000") }

// ranking is what the messages up to one were.
type ranking struct {
	order   int // of the newest
	newest  *message
	number  uint64 // of the last one from the table
	tableID string
}

// rank looks whether a message stands where it should.
func (c *checker) rank(m *message, e *event, run string, ranks *ranking) {
	commit, ordinal, told := parsePosition(m.position)
	fromTable := told && commit == 0
	order, end := e.order, e.end
	switch {
	case fromTable && run == "":
		c.rankTable(m, e, ordinal, ranks)
		return
	case run != "" || e.rejected:
		key := wishKey{id: e.id, run: run}
		if run == "" {
			key.end = c.endOf(commit)
		}
		i, wished := c.wished[key]
		if !wished {
			c.found.add(disorder, "message %d, event %s, stands where nobody asked for it: %q", m.sequence, m.id, m.position)
			return
		}
		order, end = c.wishes[i].order, c.wishes[i].end
	}
	c.since[m] = end
	switch {
	case told && c.endOf(commit) != end:
		c.found.add(disorder, "message %d, event %s, says position %s, and its transaction ends at %s", m.sequence, m.id, m.position, end)
	case order < ranks.order:
		c.found.add(disorder, "message %d, stored at %s, event %s, was committed before event %s, which stands before it as message %d, stored at %s",
			m.sequence, clock(m.stored), m.id, ranks.newest.id, ranks.newest.sequence, clock(ranks.newest.stored))
	}
	if order > ranks.order {
		ranks.order, ranks.newest = order, m
	}
}

// rankTable looks whether a message had to come from the table: its event was
// committed before a slot began, or passed over by the publication, or failed
// before.
func (c *checker) rankTable(m *message, e *event, number uint64, ranks *ranking) {
	if e.rejected {
		return
	}
	c.since[m] = e.end
	if !c.unheard(e) {
		c.found.add(disorder, "message %d, event %s, comes from the table, and the slot has it at %s", m.sequence, m.id, e.inserted)
	} else if number == ranks.number+1 && m.id < ranks.tableID {
		c.found.add(disorder, "message %d, event %s, comes from the table behind %s", m.sequence, m.id, ranks.tableID)
	}
	ranks.number, ranks.tableID = number, m.id
}

// unheard tells whether a slot could not bring the event.
func (c *checker) unheard(e *event) bool {
	return slices.ContainsFunc(c.begins, func(begin pglogrepl.LSN) bool { return e.end <= begin }) ||
		slices.ContainsFunc(c.gaps, func(g gap) bool { return g.from <= e.inserted && e.inserted < g.to })
}

// endOf is where the transaction ends whose commit record begins there.
func (c *checker) endOf(commit pglogrepl.LSN) pglogrepl.LSN {
	i, _ := slices.BinarySearchFunc(c.ends, commit, func(end, commit pglogrepl.LSN) int {
		if end <= commit {
			return -1
		}
		return cmp.Compare(end, commit)
	})
	if i == len(c.ends) {
		return 0
	}
	return c.ends[i]
}

// parsePosition parses timeline/commit/ordinal.
func parsePosition(text string) (commit pglogrepl.LSN, ordinal uint64, ok bool) {
	_, rest, found := strings.Cut(text, "/")
	last := strings.LastIndexByte(rest, '/')
	if !found || last < 0 {
		return 0, 0, false
	}
	commit, err := pglogrepl.ParseLSN(rest[:last])
	if err != nil {
		return 0, 0, false
	}
	ordinal, err = strconv.ParseUint(rest[last+1:], 10, 64)
	return commit, ordinal, err == nil
}
