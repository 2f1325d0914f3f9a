package relay

import (
	"fmt"
	"sync/atomic"
	"time"
)

// Reason is what is in a relay's way, as the metrics have it.
type Reason string

const (
	Waiting     Reason = "waiting"      // no session runs, or one takes long to begin
	NoTakeover  Reason = "no_takeover"  // the relay stands by, and could not take over
	Interrupted Reason = "interrupted"  // publishing to the stream is
	Refused     Reason = "refused"      // Postgres refuses to record outcomes
	Invisible   Reason = "invisible"    // events wait for their transaction to be visible
	SlowRecord  Reason = "slow_record"  // Postgres takes long to answer the recorder
	Housekept   Reason = "housekeeping" // it holds the recorder up
	Unrecorded  Reason = "unrecorded"   // as many events as may be are not recorded
)

// Reasons are all of them.
var Reasons = []Reason{Waiting, NoTakeover, Interrupted, Refused, Invisible, SlowRecord, Housekept, Unrecorded}

// Trouble is what is in the relay's way at present, as far as is known. The zero value:
// nothing, or there is nothing to do.
type Trouble struct {
	Reason Reason
	Why    string
}

// slowAfter is how long a step may take before it is called a trouble: a statement of
// the recorder, a housekeeping step that holds it up, or the start of a session.
const slowAfter = 5 * time.Second

// work is a step that can take long. Safe for concurrent use.
type work struct{ now atomic.Pointer[step] }

// step is what is done at present.
type step struct {
	what  string
	since time.Time
}

func (w *work) begin(what string) { w.now.Store(&step{what, time.Now()}) }
func (w *work) end()              { w.now.Store(nil) }

// taken returns what is done, and for how long by now; 0: nothing is.
func (w *work) taken() (what string, d time.Duration) {
	if s := w.now.Load(); s != nil {
		return s.what, time.Since(s.since)
	}
	return "", 0
}

// Trouble says what is in the relay's way. Safe for concurrent use.
func (r *Relay) Trouble() Trouble {
	p := r.pipeline.Load()
	switch state := r.State(); {
	case state == Starting || state == Halted:
		return r.startTrouble()
	case state == Standby:
		return trouble(NoTakeover, r.takeover.Load().couldNot())
	case state != Streaming && state != Backfilling || p == nil:
		return Trouble{}
	}
	if why := interruption(p); why != "" {
		return Trouble{Interrupted, why}
	}
	if r.refused.Load() {
		return Trouble{Refused, "Postgres refuses to record outcomes"}
	}
	if slow := r.slowRecord(); slow.Why != "" {
		return slow
	}
	if r.invisible.Load() {
		return Trouble{Invisible, "a transaction with events is committed and can't be seen yet: is a synchronous standby missing?"}
	}
	if why := r.full.Load(); why != nil {
		return Trouble{Unrecorded, *why}
	}
	return Trouble{}
}

// trouble is none where there is no reason why.
func trouble(reason Reason, why string) Trouble {
	if why == "" {
		return Trouble{}
	}
	return Trouble{reason, why}
}

// startTrouble says why no session runs.
func (r *Relay) startTrouble() Trouble {
	if why := r.waiting.Load(); why != nil {
		return Trouble{Waiting, *why}
	}
	if what, taken := r.starting.taken(); taken > slowAfter {
		return Trouble{Waiting, fmt.Sprintf("%s has taken %s by now", what, rough(taken))}
	}
	return Trouble{}
}

// slowRecord says what holds the recorder up.
func (r *Relay) slowRecord() Trouble {
	_, taken := r.recording.taken()
	if taken <= slowAfter {
		return Trouble{}
	}
	chore, kept := r.housework.taken()
	if kept > slowAfter {
		return Trouble{Housekept, fmt.Sprintf("housekeeping (%s) has held the recorder up for %s: it goes on by itself; look what application \"outbox-relay housekeeper\" waits for in pg_stat_activity", chore, rough(taken))}
	}
	return Trouble{SlowRecord, fmt.Sprintf("Postgres has not answered the recorder for %s: look what application \"outbox-relay recorder\" waits for in pg_stat_activity", rough(taken))}
}

// rough rounds a duration that goes on, so that what is said of it changes rarely.
func rough(d time.Duration) time.Duration {
	if d < time.Minute {
		return d.Round(5 * time.Second)
	}
	return d.Round(time.Minute)
}

// interruption says why nothing is stored at present; empty: it is.
func interruption(p *pipeline) string {
	if since, why := p.chain.Interrupted(); why != nil {
		return fmt.Sprintf("publishing to the stream is interrupted: %s (for %s)", why, rough(time.Since(since)))
	}
	return ""
}
