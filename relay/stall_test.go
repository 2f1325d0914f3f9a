package relay

import (
	"strings"
	"testing"
	"time"
)

// What is a stall and what is none, by samples a second apart with a limit of ten.
func TestStall(t *testing.T) {
	steady := func(s sample) func(int) sample { return func(int) sample { return s } }
	for name, c := range map[string]struct {
		at   func(second int) sample
		want string // of the judgement after 15 s; empty: no stall
	}{
		"nothing to do":            {steady(sample{read: 5, settled: 5, recorded: 5}), ""},
		"nobody answers":           {steady(sample{read: 5, settled: 5, recorded: 4}), "Postgres has not answered the recorder"},
		"nobody answers an outage": {steady(sample{read: 5, settled: 4, recorded: 4, waits: true}), "Postgres has not answered the recorder"},
		"nothing moves":            {func(s int) sample { return sample{read: 5, settled: 4, recorded: 4, rounds: uint64(s)} }, "no event was read, stored or recorded"},
		"an outage":                {func(s int) sample { return sample{read: 5, recorded: 4, rounds: uint64(s), waits: true} }, ""},
		"events are read":          {func(s int) sample { return sample{read: uint64(5 + s), recorded: 4, rounds: uint64(s)} }, ""},
		"events are stored":        {func(s int) sample { return sample{read: 99, settled: uint64(s), rounds: uint64(s)} }, ""},
		"events are recorded":      {func(s int) sample { return sample{read: 99, recorded: uint64(s), rounds: uint64(s)} }, ""},
		"a move, and then nothing": {func(s int) sample { return sample{read: 99, recorded: uint64(min(s, 3)), rounds: uint64(s)} }, "for 12s no event"},
		"a move a moment ago":      {func(s int) sample { return sample{read: 99, recorded: uint64(s / 8), rounds: uint64(s)} }, ""},
		"an outage that just ended": {func(s int) sample {
			return sample{read: 99, recorded: uint64(s / 14), rounds: uint64(s), waits: s < 14}
		}, ""},
	} {
		began := time.Now()
		w := newWatch(10*time.Second, began)
		var got string
		for second := range 16 {
			got = w.look(began.Add(time.Duration(second)*time.Second), c.at(second))
		}
		if c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
}

// A session that starts under load has events to record before Postgres has
// answered, and is not stalled.
func TestNoStallAtTheStart(t *testing.T) {
	began := time.Now()
	w := newWatch(time.Minute, began)
	for _, at := range []time.Duration{0, time.Minute} {
		if why := w.look(began.Add(at), sample{read: 1}); why != "" {
			t.Errorf("after %s: %s", at, why)
		}
	}
}
