package chaos

import (
	"slices"
	"time"
)

// part is what a fault strikes; a set.
type part int

const (
	relay part = 1 << iota
	postgres
	broker // the NATS servers
	stream
	links
	slot // what it needs in the stream and in WAL
)

// fault is a kind of fault.
type fault struct {
	name    string
	prepare func(*season) // what it needs the relay for, before anything strikes
	strike  func(*season) injury
	on      part
	slow    bool // takes ten seconds or more: not for short runs
	weight  int  // how often it is drawn where others are once; 0: once
	fits    func(plan) bool
}

// injury is a fault that struck: how long it is to last, and what ends it.
type injury struct {
	hold time.Duration
	mend func()
}

// allows tells whether both can strike at once: what one needs the other must
// not have taken away.
func (f fault) allows(other fault) bool {
	together := f.on | other.on
	return f.on&other.on == 0 && together&(broker|stream) != broker|stream
}

// share is how often a fault struck in relation to what it is to.
func (f fault) share(struck int) float64 { return float64(struck) / float64(max(f.weight, 1)) }

// between is a random duration, in milliseconds.
func (s *season) between(least, most int) time.Duration {
	return time.Duration(least+s.random.IntN(most-least+1)) * time.Millisecond
}

// suffer lets faults strike together, ends them, and waits until the relay has
// got over them.
func (s *season) suffer(faults ...fault) {
	s.Helper()
	var injuries []injury
	var hold time.Duration
	for _, f := range faults {
		if f.prepare != nil {
			f.prepare(s)
		}
	}
	for _, f := range faults {
		one := f.strike(s)
		injuries = append(injuries, one)
		hold = max(hold, one.hold)
	}
	time.Sleep(hold)
	for _, one := range injuries {
		if one.mend != nil {
			one.mend()
		}
	}
	s.recover()
}

// recover waits for an event that is committed now, or for any: the next fault
// then meets a relay that still has a backlog.
func (s *season) recover() {
	s.Helper()
	if s.random.IntN(5) > 0 {
		s.awaitArrival(s.insertMarker(), true)
		return
	}
	_, before := s.witness.progress()
	s.await("any event", func() bool {
		_, now := s.witness.progress()
		return now > before
	})
}

func (s *season) await(what string, done func() bool) {
	s.Helper()
	for deadline := time.Now().Add(recovery); !done(); time.Sleep(10 * time.Millisecond) {
		s.requireAlive()
		if time.Now().After(deadline) {
			s.Fatalf("waited %s in vain for %s", recovery, what)
		}
	}
}

// allFaults lists every kind.
func allFaults() []fault {
	return slices.Concat(relayFaults, postgresFaults, brokerFaults, streamFaults, linkFaults(), tableFaults, upkeepFaults)
}
