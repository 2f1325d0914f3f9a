package sink

import (
	"fmt"
	"slices"
)

// candidate is an event that may stand in the tail of the stream.
type candidate struct {
	id    string
	maybe bool // a copy of it may have been stored, of ours or of an earlier chain; false: every copy was refused
	// doubtful: every copy may have been refused, which happens where others publish:
	// what is gone may have been theirs.
	doubtful bool
}

// verdict is what the tail tells of the candidates.
type verdict struct {
	// sequences at which the candidates are stored, by their index.
	stored map[int]uint64
	// proved counts the candidates up to the last one that is stored. Those
	// among them that are not in stored were overtaken: a foreign message took
	// a sequence of the chain in flight.
	proved  int
	foreign []message // present, and none of ours
	lost    int       // sequences that are gone and were not ours
}

// AmbiguousError says that messages which are gone may have been ours or not,
// so that nobody can tell which events are stored.
type AmbiguousError struct {
	Stream string
	First  uint64 // of the sequences that are gone
	Last   uint64
	Reason string
	doubt  bool // it depends on which events were refused, which no other session can tell
}

func (e *AmbiguousError) Error() string {
	return fmt.Sprintf("messages %d to %d of stream %s are gone, and it cannot be told whether they were this relay's events: %s",
		e.First, e.Last, e.Stream, e.Reason)
}

// match holds the messages that follow the last known sequence against the
// events that follow the last known event, both in order.
//
// A message with an event's id proves it stored, and every event before it,
// since events are stored in order: each of those was stored at a sequence
// that is gone by now. A run of gone sequences at the end counts as the next
// events, one each, unless something else may have stood there.
func match(tail []message, events []candidate, foreignSeen bool) (verdict, *AmbiguousError) {
	v := verdict{stored: map[int]uint64{}}
	places := make(map[string][]int, len(events)) // more than one: an id was used again
	for i, event := range events {
		places[event.id] = append(places[event.id], i)
	}
	gone := make([]message, 0, 16) // since the last match
	for _, m := range tail {
		if m.gone {
			gone = append(gone, m)
			continue
		}
		i := v.place(places[m.id])
		if i < 0 || m.id == "" {
			v.foreign = append(v.foreign, m)
			continue
		}
		if i < v.proved { // overtaken, and sent again behind: proved by itself
			v.stored[i] = m.sequence
			continue
		}
		if err := v.before(events, i, gone); err != nil {
			return v, err
		}
		v.stored[i] = m.sequence
		v.proved = i + 1
		gone = gone[:0]
	}
	return v, v.trailing(events, gone, foreignSeen || len(v.foreign) > 0)
}

// place returns which of the events with a message's id is meant: the next one,
// or one that was overtaken; -1: there is none.
func (v *verdict) place(places []int) int {
	for _, i := range places {
		if i >= v.proved {
			return i
		}
	}
	if len(places) == 0 {
		return -1
	}
	return places[0]
}

// before settles the events between the last match and event i: each one that
// is stored was stored at one of the gone sequences. Where there is none for
// them they were overtaken.
func (v *verdict) before(events []candidate, i int, gone []message) *AmbiguousError {
	var maybe []int
	for k := v.proved; k < i; k++ {
		if events[k].maybe {
			maybe = append(maybe, k)
		}
	}
	switch {
	case len(gone) == 0:
	case len(maybe) == 0:
		v.lost += len(gone)
	case slices.ContainsFunc(events[v.proved:i], candidate.inDoubt):
		return doubted(gone, events[v.proved:i])
	case len(gone) != len(maybe):
		return ambiguous(gone, fmt.Sprintf("event %s, which is stored, follows %d events that may have been stored there", events[i].id, len(maybe)))
	default:
		for n, k := range maybe {
			v.stored[k] = gone[n].sequence
		}
	}
	return nil
}

// trailing settles the gone sequences behind the last match.
func (v *verdict) trailing(events []candidate, gone []message, foreign bool) *AmbiguousError {
	if len(gone) == 0 {
		return nil
	}
	maybe := 0
	for _, event := range events[v.proved:] {
		if !event.maybe {
			break
		}
		maybe++
	}
	switch {
	case maybe == 0:
		v.lost += len(gone)
		return nil
	case foreign:
		return ambiguous(gone, "other messages than this relay's were seen in the stream")
	case slices.ContainsFunc(events[v.proved:v.proved+maybe], candidate.inDoubt):
		return doubted(gone, events[v.proved:])
	case len(gone) > maybe:
		return ambiguous(gone, fmt.Sprintf("only %d events can have been stored there", maybe))
	}
	for _, m := range gone {
		v.stored[v.proved] = m.sequence
		v.proved++
	}
	return nil
}

func (c candidate) inDoubt() bool { return c.maybe && c.doubtful }

// doubted names the first of the events that may have been refused.
func doubted(gone []message, events []candidate) *AmbiguousError {
	first := slices.IndexFunc(events, candidate.inDoubt)
	err := ambiguous(gone, fmt.Sprintf("event %s was stored there or refused, and the answer to it was lost", events[first].id))
	err.doubt = true
	return err
}

func ambiguous(gone []message, reason string) *AmbiguousError {
	return &AmbiguousError{First: gone[0].sequence, Last: gone[len(gone)-1].sequence, Reason: reason}
}
