package sink

import (
	"context"
	"math"
)

// Found tells which events of the slot already stand in the stream.
type Found struct {
	Proved    int            // events up to the last one that is stored
	Stored    map[int]uint64 // their sequences, by their place among the events, from 0
	Strangers []Stranger     // messages that are none of the events
	Lost      int            // sequences that are gone and were none of the events
}

// Stranger is a message that is none of the slot's events.
type Stranger struct {
	Sequence uint64
	ID       string // its Nats-Msg-Id, if it has one
}

// Events are those of the slot that follow the checkpoint.
type Events struct {
	IDs []string
	Old int // of the first ones, which can be stored: the others were committed when nobody published yet
}

// Overtaken returns the place of the first event that one behind it has overtaken,
// or -1: it is not stored yet, or at a later sequence.
func (f Found) Overtaken() int {
	first, least := -1, uint64(math.MaxUint64)
	for i := f.Proved - 1; i >= 0; i-- {
		sequence, stored := f.Stored[i]
		if !stored || sequence > least {
			first = i
		}
		if stored {
			least = min(least, sequence)
		}
	}
	return first
}

// Resume matches the messages after sequence with the events that follow the
// checkpoint. At most bound of these can be stored. foreign says that messages
// of others were ever seen in the stream.
//
// events is called when there is something to match. It returns the first events:
// at most limit, and no more than up to the one for whose id enough is true.
func (c *Client) Resume(ctx context.Context, s Stream, after uint64, foreign bool, bound int,
	events func(limit int, enough func(id string) bool) (Events, error)) (Found, error) {
	tail, err := c.tail(ctx, s, after, bound)
	if err != nil || len(tail) == 0 {
		return Found{}, err
	}
	read, err := events(max(bound, len(tail)), allFound(tail))
	if err != nil {
		return Found{}, err
	}
	candidates := make([]candidate, len(read.IDs))
	for i, id := range read.IDs {
		candidates[i] = candidate{id: id, maybe: i < min(bound, read.Old)}
	}
	v, ambiguity := match(tail, candidates, foreign)
	found := Found{Proved: v.proved, Stored: v.stored, Lost: v.lost}
	for _, m := range v.foreign {
		found.Strangers = append(found.Strangers, Stranger{Sequence: m.sequence, ID: m.id})
	}
	if ambiguity != nil {
		ambiguity.Stream = s.Name
		return found, ambiguity
	}
	return found, nil
}

// Message is what a sequence of the stream holds.
type Message struct {
	Sequence uint64
	ID       string // its Nats-Msg-Id, if it has one
	Gone     bool
}

// Tail reads what follows sequence in the stream: at most limit messages, and of
// those that are gone at the beginning no more than that either.
func (c *Client) Tail(ctx context.Context, s Stream, after uint64, limit int) ([]Message, error) {
	s.Last = min(s.Last, after+uint64(limit))
	tail, err := c.tail(ctx, s, after, limit)
	if err != nil {
		return nil, err
	}
	messages := make([]Message, len(tail))
	for i, m := range tail {
		messages[i] = Message{Sequence: m.sequence, ID: m.id, Gone: m.gone}
	}
	return messages, nil
}

// allFound returns a function that is told ids, and is true from the one on with
// which each message has its event. With a message gone it never is: any event
// may be that message's.
func allFound(tail []message) func(id string) bool {
	missing, gone := make(map[string]int, len(tail)), false // an id can be used again
	for _, m := range tail {
		missing[m.id]++
		gone = gone || m.gone
	}
	return func(id string) bool {
		if missing[id]--; missing[id] <= 0 {
			delete(missing, id)
		}
		return len(missing) == 0 && !gone
	}
}
