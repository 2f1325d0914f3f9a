package sink

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// tailOf makes the messages from sequence 11 on: "-" is gone, "?" foreign,
// anything else an id.
func tailOf(s string) []message {
	var tail []message
	for i, word := range strings.Fields(s) {
		m := message{sequence: uint64(11 + i), id: word}
		switch word {
		case "-":
			m.id, m.gone = "", true
		case "?":
			m.id = "stranger"
		case "''":
			m.id = ""
		}
		tail = append(tail, m)
	}
	return tail
}

// eventsOf makes candidates; "!" behind an id says that every copy was refused, "~"
// that every copy may have been.
func eventsOf(s string) []candidate {
	var events []candidate
	for _, word := range strings.Fields(s) {
		id, refused := strings.CutSuffix(word, "!")
		id, doubtful := strings.CutSuffix(id, "~")
		events = append(events, candidate{id: id, maybe: !refused, doubtful: doubtful})
	}
	return events
}

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		name         string
		tail, events string
		foreignSeen  bool
		stored       map[int]uint64
		proved       int
		foreign      int
		lost         int
		ambiguous    string // first and last sequence
	}{
		{name: "nothing", stored: map[int]uint64{}},
		{name: "nothing stored", events: "a b", stored: map[int]uint64{}},
		{name: "all stored", tail: "a b c", events: "a b c", stored: map[int]uint64{0: 11, 1: 12, 2: 13}, proved: 3},
		{name: "a prefix stored", tail: "a b", events: "a b c d", stored: map[int]uint64{0: 11, 1: 12}, proved: 2},
		{name: "consumed before one that stands", tail: "- - c", events: "a b c d", stored: map[int]uint64{0: 11, 1: 12, 2: 13}, proved: 3},
		{name: "consumed between", tail: "a - c - e", events: "a b c d e", stored: map[int]uint64{0: 11, 1: 12, 2: 13, 3: 14, 4: 15}, proved: 5},
		{name: "consumed at the end", tail: "a - -", events: "a b c d", stored: map[int]uint64{0: 11, 1: 12, 2: 13}, proved: 3},
		{name: "all consumed", tail: "- -", events: "a b", stored: map[int]uint64{0: 11, 1: 12}, proved: 2},
		{name: "more gone at the end than events", tail: "- - -", events: "a b", ambiguous: "11-13"},
		{name: "gone at the end, foreign ones once seen", tail: "a -", events: "a b", foreignSeen: true, ambiguous: "12-12", stored: map[int]uint64{0: 11}, proved: 1},
		{name: "gone at the end, a foreign one stands", tail: "? -", events: "a b", foreign: 1, ambiguous: "12-12"},
		{name: "gone at the end, nothing can be ours", tail: "- -", events: "a! b!", foreignSeen: true, stored: map[int]uint64{}, lost: 2},
		{name: "gone at the end, no event is left", tail: "a - -", events: "a", stored: map[int]uint64{0: 11}, proved: 1, lost: 2},
		{name: "gone at the end, the next was refused", tail: "a -", events: "a b! c", stored: map[int]uint64{0: 11}, proved: 1, lost: 1},
		{name: "gone at the end, up to a refused one", tail: "- -", events: "a b! c", ambiguous: "11-12"},
		{name: "gone before one that stands, too many", tail: "- - - c", events: "a b c", ambiguous: "11-13"},
		{name: "gone before one that stands, too few", tail: "- c", events: "a b c", ambiguous: "11-11"},
		{name: "gone before the first", tail: "- a", events: "a b", stored: map[int]uint64{0: 12}, proved: 1, lost: 1},
		{name: "gone before one that stands, a refused one between", tail: "- c", events: "a b! c", stored: map[int]uint64{0: 11, 2: 12}, proved: 3},
		{name: "gone before one that stands, and may be another's", tail: "- c", events: "a~ b! c", ambiguous: "11-11"},
		{name: "gone at the end, and may be another's", tail: "a - -", events: "a b c~", ambiguous: "12-13"},
		{name: "in doubt behind what is gone", tail: "a -", events: "a b c! d~", stored: map[int]uint64{0: 11, 1: 12}, proved: 2},
		{name: "in doubt, nothing gone", tail: "a b", events: "a~ b~ c~", stored: map[int]uint64{0: 11, 1: 12}, proved: 2},
		{name: "foreign ones among ours", tail: "? a ? b ''", events: "a b", stored: map[int]uint64{0: 12, 1: 14}, proved: 2, foreign: 3},
		{name: "foreign ones once seen, nothing gone", tail: "a b", events: "a b", foreignSeen: true, stored: map[int]uint64{0: 11, 1: 12}, proved: 2},
		{name: "overtaken", tail: "? b", events: "a b c", stored: map[int]uint64{1: 12}, proved: 2, foreign: 1},
		{name: "an id used again", tail: "a b a c", events: "a b a c", stored: map[int]uint64{0: 11, 1: 12, 2: 13, 3: 14}, proved: 4},
		{name: "an id used again, not stored yet", tail: "a b", events: "a b a c", stored: map[int]uint64{0: 11, 1: 12}, proved: 2},
		{name: "overtaken, and sent again", tail: "? b a", events: "a b c", stored: map[int]uint64{0: 13, 1: 12}, proved: 2, foreign: 1},
		{name: "overtaken by many", tail: "? b c", events: "a b c", stored: map[int]uint64{1: 12, 2: 13}, proved: 3, foreign: 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			v, ambiguity := match(tailOf(c.tail), eventsOf(c.events), c.foreignSeen)
			span := ""
			if ambiguity != nil {
				span = fmt.Sprintf("%d-%d", ambiguity.First, ambiguity.Last)
			}
			if span != c.ambiguous {
				t.Fatalf("ambiguous %q, want %q", span, c.ambiguous)
			}
			if c.ambiguous != "" {
				var err error = ambiguity
				if !errors.As(err, &ambiguity) || ambiguity.Reason == "" {
					t.Errorf("no reason: %v", err)
				}
				if ambiguity.doubt != strings.Contains(c.events, "~") {
					t.Errorf("in doubt: %v", ambiguity.doubt)
				}
				return
			}
			if !maps.Equal(v.stored, c.stored) || v.proved != c.proved || len(v.foreign) != c.foreign || v.lost != c.lost {
				t.Errorf("got %v, %d proved, foreign %v, %d lost; want %v, %d, %d, %d",
					v.stored, v.proved, v.foreign, v.lost, c.stored, c.proved, c.foreign, c.lost)
			}
		})
	}
}

// world is a random stream whose history is known: which messages were stored,
// by whom, and which are gone.
type world struct {
	tail   []message
	events []candidate
	at     map[int]uint64 // where each event truly was stored
}

// newWorld stores a prefix of the events in order, lets strangers take places
// before the first, between and behind, and takes any messages away again.
func newWorld(r *rand.Rand) world {
	w := world{at: map[int]uint64{}}
	events := r.IntN(7)
	stored := r.IntN(events + 1)
	strangers, gone := r.IntN(3), r.IntN(4)
	add := func(id string) {
		w.tail = append(w.tail, message{sequence: uint64(11 + len(w.tail)), id: id})
	}
	for i := range events {
		if i < stored {
			for strangers > 0 && r.IntN(4) == 0 {
				add("stranger")
				strangers--
			}
			w.at[i] = uint64(11 + len(w.tail))
			add(fmt.Sprint("e", i))
		}
		w.events = append(w.events, candidate{id: fmt.Sprint("e", i), maybe: i < stored || r.IntN(3) > 0})
	}
	for range strangers {
		if r.IntN(3) == 0 {
			add("stranger")
		}
	}
	for i := range w.tail {
		if r.IntN(4) < gone {
			w.tail[i].gone, w.tail[i].id = true, ""
		}
	}
	return w
}

// histories lists every way in which the events can have been stored, in order
// and without one left out, so that the tail looks as it does: as many of the
// gone places as it takes are ours. Strangers may have been at the others.
func (w world) histories(strangers bool) []map[int]uint64 {
	var all []map[int]uint64
	var place func(i int, next int, at map[int]uint64)
	place = func(i, next int, at map[int]uint64) {
		if next == len(w.tail) {
			all = append(all, maps.Clone(at))
			return
		}
		m := w.tail[next]
		ours := i < len(w.events) && w.events[i].maybe
		if ours && (m.gone || m.id == w.events[i].id) {
			at[i] = m.sequence
			place(i+1, next+1, at)
			delete(at, i)
		}
		if m.id == "stranger" || m.gone && strangers {
			place(i, next+1, at)
		}
	}
	place(0, 0, map[int]uint64{})
	return all
}

// match never says what may be wrong: whatever it says is so in every history
// that fits, provided that strangers which are gone were seen before. And it
// says something whenever there is but one history.
func TestMatchAgainstAllHistories(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	ambiguous := 0
	for range 20000 {
		w := newWorld(r)
		strangers := slices.ContainsFunc(w.tail, func(m message) bool { return m.id == "stranger" }) || len(w.tail) > len(w.at)
		v, ambiguity := match(w.tail, w.events, strangers)
		all := w.histories(strangers)
		same := !slices.ContainsFunc(all, func(h map[int]uint64) bool { return !maps.Equal(h, w.at) })
		if ambiguity != nil {
			ambiguous++
			if same && !strangers {
				t.Fatalf("seed %d: %v and %v have one history only, %v, and match says %v", seed, w.tail, w.events, w.at, ambiguity)
			}
			continue
		}
		if !maps.Equal(v.stored, w.at) || v.proved != len(w.at) {
			t.Fatalf("seed %d: %v and %v: match says %v, and it was %v", seed, w.tail, w.events, v.stored, w.at)
		}
	}
	if ambiguous == 0 || ambiguous > 15000 {
		t.Errorf("%d of 20000 ambiguous: the worlds are one-sided", ambiguous)
	}
}

// Whatever is said of events in doubt is so, too, where they were refused.
func TestMatchInDoubt(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	said := 0
	for range 20000 {
		w := newWorld(r)
		for i := range w.events {
			w.events[i].doubtful = r.IntN(3) == 0
		}
		v, ambiguity := match(w.tail, w.events, false)
		if ambiguity != nil {
			continue
		}
		refused := slices.Clone(w.events)
		for i := range refused {
			refused[i].maybe = refused[i].maybe && !refused[i].doubtful
		}
		other, ambiguity := match(w.tail, refused, false)
		if ambiguity != nil || !maps.Equal(v.stored, other.stored) {
			t.Fatalf("seed %d: %v and %v: match says %v, and %v (%v) of those refused", seed, w.tail, w.events, v.stored, other.stored, ambiguity)
		}
		said++
	}
	if said < 2000 {
		t.Errorf("something was said of %d in 20000: the worlds are one-sided", said)
	}
}

func TestAllFound(t *testing.T) {
	for _, c := range []struct {
		tail, events string
		want         int // how many events are enough; 0: all are wanted
	}{
		{"a b", "a b c", 2},
		{"b", "a b c", 2},
		{"a b a", "a b a c", 3},
		{"a ? b", "a b c", 0},
		{"a '' b", "a b c", 0},
		{"a -", "a b c", 0},
	} {
		enough, got := allFound(tailOf(c.tail)), 0
		for i, event := range eventsOf(c.events) {
			if enough(event.id) && got == 0 {
				got = i + 1
			}
		}
		if got != c.want {
			t.Errorf("%q in %q: %d, want %d", c.tail, c.events, got, c.want)
		}
	}
}

func TestOvertaken(t *testing.T) {
	for _, c := range []struct {
		name   string
		proved int
		stored map[int]uint64
		want   int
	}{
		{"none", 0, nil, -1},
		{"in order", 3, map[int]uint64{0: 4, 1: 5, 2: 9}, -1},
		{"one is missing", 3, map[int]uint64{0: 4, 2: 5}, 1},
		{"one came later", 3, map[int]uint64{0: 4, 1: 9, 2: 5}, 1},
		{"all but the last came later", 3, map[int]uint64{0: 6, 1: 7, 2: 5}, 0},
		{"the first is missing", 2, map[int]uint64{1: 5}, 0},
	} {
		if got := (Found{Proved: c.proved, Stored: c.stored}).Overtaken(); got != c.want {
			t.Errorf("%s: got %d, want %d", c.name, got, c.want)
		}
	}
}
