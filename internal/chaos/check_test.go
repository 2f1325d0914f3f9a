package chaos

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
)

var noon = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

// at is a time, in milliseconds after noon.
func at(ms int) time.Time { return noon.Add(time.Duration(ms) * time.Millisecond) }

// flawless is a history of n events in which the promise is kept: event i is
// committed at LSN 100*i, stored at i ms, recorded at i+10 ms and confirmed at
// i+20 ms.
func flawless(n int) history {
	h := history{after: "mark"}
	for i := 1; i <= n; i++ {
		id := fmt.Sprintf("e%d", i)
		h.events = append(h.events, event{id: id, body: digestOf([]byte(id)), end: pglogrepl.LSN(100 * i), inserted: pglogrepl.LSN(100*i - 50), order: i})
		h.messages = append(h.messages, message{uint64(i), id, digestOf([]byte(id)), at(i), fmt.Sprintf("1/0/%X/1", 100*i-10)})
		h.samples = append(h.samples, sample{at(i + 20), pglogrepl.LSN(100 * i), 0, false})
		h.rows = append(h.rows, row{id, "published", at(i + 10)})
	}
	return h
}

// backlog lets the first three come from the table: the slot begins behind them.
func backlog(h *history) {
	h.begins = []pglogrepl.LSN{300}
	for i := range 3 {
		h.messages[i].position = fmt.Sprintf("1/0/0/%d", i+1)
	}
}

// retried lets the third fail at first: it is asked for between the ninth and the
// last.
func retried(h *history) {
	h.events[2].rejected = true
	h.events[9].order = 11
	h.wishes = []wish{{id: "e3", end: 950, order: 10}}
	again := h.messages[2]
	again.stored, again.position = at(9), "1/0/3AC/1"
	h.messages = slices.Insert(slices.Delete(h.messages, 2, 3), 8, again)
}

// replayed asks for the third once more, behind all.
func replayed(h *history) {
	h.wishes = []wish{{id: "e3", run: "x", end: 1100, order: 11}}
	h.messages = append(h.messages, message{11, "e3:x", digestOf([]byte("e3")), at(11), "1/0/442/1"})
}

func TestCheck(t *testing.T) {
	for _, test := range []struct {
		name string
		harm func(*history)
		want findings
	}{
		{"flawless", func(*history) {}, findings{}},
		{"samples in any order", func(h *history) { slices.Reverse(h.samples) }, findings{}},
		{"one transaction", func(h *history) {
			for i := range h.events {
				h.events[i].end = 1000
			}
		}, findings{}},
		{"lost", func(h *history) {
			h.messages = slices.Delete(h.messages, 4, 5)
			h.rows[4] = row{id: "e5", status: "pending"}
		}, count(lost, 1)},
		{"lost, and its row claims the contrary", func(h *history) { h.messages = slices.Delete(h.messages, 9, 10) },
			findings{lost: {count: 1}, wrongRow: {count: 1}}},
		{"all lost", func(h *history) {
			h.messages, h.after = nil, "keep"
			for i := range h.rows {
				h.rows[i] = row{id: h.rows[i].id, status: "pending"}
			}
		}, count(lost, 10)},
		{"stored again at the end", func(h *history) {
			again := h.messages[2]
			again.sequence, again.stored = 11, at(5000)
			h.messages = append(h.messages, again)
		}, count(duplicate, 1)},
		{"stored twice more", func(h *history) { h.messages = append(h.messages, h.messages[0], h.messages[0]) }, count(duplicate, 2)},
		{"two neighbours swapped", func(h *history) {
			h.messages[3], h.messages[4] = h.messages[4], h.messages[3]
		}, count(disorder, 1)},
		{"one too late", func(h *history) {
			late := h.messages[0]
			h.messages = append(slices.Delete(h.messages, 0, 1), late)
		}, count(disorder, 1)},
		{"invented", func(h *history) { h.messages = slices.Insert(h.messages, 5, message{sequence: 6, id: "x"}) }, count(phantom, 1)},
		{"without an id", func(h *history) { h.messages = append(h.messages, message{sequence: 11}) }, count(phantom, 1)},
		{"of another transaction, as it says", func(h *history) { h.messages[3].position = "1/0/10/1" }, count(disorder, 1)},
		{"one transaction, in the order of inserts", func(h *history) {
			for i := range h.events {
				h.events[i].end, h.messages[i].position = 1000, "1/0/3E0/1"
			}
			h.messages[3], h.messages[4] = h.messages[4], h.messages[3]
		}, count(disorder, 1)},
		{"from the table before the slot", backlog, findings{}},
		{"from the table before the slot, without a slot that begins there", func(h *history) { backlog(h); h.begins = nil }, count(disorder, 3)},
		{"from the table, in another order", func(h *history) {
			backlog(h)
			h.messages[0].id, h.messages[1].id = h.messages[1].id, h.messages[0].id
			h.messages[0].body, h.messages[1].body = h.messages[1].body, h.messages[0].body
		}, count(disorder, 1)},
		{"from the table, stored after the slot began", func(h *history) { backlog(h); h.messages[2].stored = at(500); h.rows[2].published = at(501) }, findings{}},
		{"from the table, and again by a slot", func(h *history) {
			backlog(h)
			h.messages = append(h.messages, message{11, "e2", digestOf([]byte("e2")), at(11), "1/0/BE/1"})
		}, count(duplicate, 1)},
		{"confirmed too early by a second slot", func(h *history) {
			h.begins = []pglogrepl.LSN{0, 500}
			h.samples = append(h.samples, sample{at(1), 600, 1, false})
		}, count(early, 1)}, // e6
		{"passed over by the publication", func(h *history) { h.messages[4].position, h.gaps = "1/0/0/1", []gap{{400, 500}} }, findings{}},
		{"passed over by the publication, and by the slot", func(h *history) {
			h.messages[4].position, h.gaps = "1/0/0/1", []gap{{400, 500}}
			h.samples = append(h.samples, sample{at(4), 500, 0, false})
		}, count(early, 1)},
		{"passed over by the publication, and by the slot while it is healed", func(h *history) {
			h.messages[4].position, h.gaps = "1/0/0/1", []gap{{400, 500}}
			h.samples = append(h.samples, sample{at(4), 500, 0, true})
		}, findings{}},
		{"tried again", retried, findings{}},
		{"tried again, out of order", func(h *history) { retried(h); h.messages[8], h.messages[9] = h.messages[9], h.messages[8] }, count(disorder, 1)},
		{"tried again where nobody asked", func(h *history) { retried(h); h.wishes = nil }, count(disorder, 1)},
		{"tried again, and confirmed too early", func(h *history) { retried(h); h.samples = append(h.samples, sample{at(3), 950, 0, false}) }, count(early, 7)}, // e4 to e9, and e3
		{"replayed", replayed, findings{}},
		{"replayed twice", func(h *history) { replayed(h); h.messages = append(h.messages, h.messages[10]) }, count(duplicate, 1)},
		{"replay lost", func(h *history) { replayed(h); h.messages = h.messages[:10] }, count(lost, 1)},
		{"replayed in another run", func(h *history) { replayed(h); h.messages[10].id = "e3:y" }, findings{lost: {count: 1}, phantom: {count: 1}}},
		{"replayed too soon", func(h *history) { replayed(h); h.messages[9], h.messages[10] = h.messages[10], h.messages[9] }, count(disorder, 1)},
		{"another body", func(h *history) { h.messages[5].body = digestOf([]byte("other")) }, count(altered, 1)},
		{"confirmed too early", func(h *history) { h.samples = append(h.samples, sample{at(3), 500, 0, false}) }, count(early, 2)}, // e4 and e5
		{"confirmed at the moment of storing", func(h *history) { h.samples = append(h.samples, sample{at(3), 399, 0, false}) }, findings{}},
		{"confirmed too early, then set back", func(h *history) {
			h.samples = append([]sample{{at(9), 1000, 0, false}, {at(10), 100, 0, false}}, h.samples...)
		}, count(early, 1)},
		{"marked before it was stored", func(h *history) { h.rows[3].published = at(3) }, count(wrongRow, 1)},
		{"marked in the microsecond of storing", func(h *history) {
			h.messages[3].stored = at(4).Add(900 * time.Nanosecond)
			h.rows[3].published = at(4)
		}, findings{}},
		{"not marked", func(h *history) { h.rows[3] = row{id: "e4", status: "pending"} }, count(wrongRow, 1)},
		{"failed, but stored", func(h *history) { h.rows[3].status = "failed" }, count(wrongRow, 1)},
		{"row gone", func(h *history) { h.rows = slices.Delete(h.rows, 3, 4) }, count(wrongRow, 1)},
		{"row from nowhere", func(h *history) { h.rows = append(h.rows, row{id: "x", status: "pending"}) }, count(wrongRow, 1)},
		{"deleted", func(h *history) { h.after, h.rows = "delete", nil }, findings{}},
		{"not deleted", func(h *history) { h.after, h.rows = "delete", h.rows[:1] }, count(wrongRow, 1)},
		{"lost and deleted", func(h *history) { h.after, h.rows, h.messages = "delete", nil, h.messages[1:] },
			findings{lost: {count: 1}, wrongRow: {count: 1}}},
		{"touched in keep", func(h *history) {
			h.after = "keep"
			for i := range h.rows[1:] {
				h.rows[i+1] = row{id: h.rows[i+1].id, status: "pending"}
			}
		}, count(wrongRow, 1)},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := flawless(10)
			test.harm(&h)
			got := check(h)
			for k := range got {
				if got[k].count != test.want[k].count {
					t.Errorf("%s: %d, want %d (%q)", kind(k), got[k].count, test.want[k].count, got[k].examples)
				}
			}
			if got.clean() != (test.want.String() == (&findings{}).String()) {
				t.Errorf("clean is %t of %s", got.clean(), &got)
			}
		})
	}
}

func count(k kind, n int) (f findings) {
	f[k].count = n
	return f
}
