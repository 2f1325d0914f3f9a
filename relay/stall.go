package relay

import (
	"context"
	"fmt"
	"time"

	"outbox-relay/internal/wait"
)

// waitingAfter is how long events may wait for a transaction to become visible
// before that is called a trouble: a commit is visible within milliseconds, but
// where a synchronous standby is missing.
const waitingAfter = 10 * time.Second

// fullAfter is how long the pace is taken at which a full bound is recorded.
const fullAfter = 10 * time.Second

// Stalled says why the relay is stalled and what to do about it; empty: it is
// not. Safe for concurrent use.
//
// It is stalled when events were read and are not recorded, both ends can be
// reached as far as is known, and for Config.StallAfter either nothing moved (no
// event was read, stored or recorded), or the recorder had no answer from
// Postgres. What is known to pass, or to be mended elsewhere, is no stall: an
// interrupted stream, a Postgres that refuses to write, a transaction that waits
// for a synchronous standby. Nor is a relay that starts, that stands by, or that
// has nothing to do, such as while the walsender decodes what is not for it.
func (r *Relay) Stalled() string {
	if why := r.stalled.Load(); why != nil {
		return *why
	}
	return ""
}

// restartHelps reports whether a restart of a stalled relay is worth trying: not where it
// has been tried. Then the relay before this process did not end in order, as its
// checkpoint says, and this process has not recorded one event since.
func (r *Relay) restartHelps() bool { return !r.unclean.Load() || r.recorded.Load() }

// watch looks after a pipeline that could be stuck without an error.
type watch struct {
	limit time.Duration

	last     sample
	moved    time.Time // when events last did
	full     time.Time // since when as many events as may be are not recorded; zero: they are fewer
	recorded uint64    // events, then
	answered time.Time // when the recorder last had an answer
}

// newWatch begins now: nothing has been still, or silent, before.
func newWatch(limit time.Duration, now time.Time) *watch {
	return &watch{limit: limit, moved: now, answered: now}
}

// sample is how far a pipeline is.
type sample struct {
	read, settled, recorded uint64 // events
	rounds                  uint64 // answers that the recorder had
	waits                   bool   // for something that is known
}

func (p *pipeline) sample() sample {
	s := sample{settled: p.chain.Settled(), rounds: p.recorder.rounds.Load()}
	s.read, s.recorded = p.tracker.Progress()
	s.waits = interruption(p) != "" || p.relay.refused.Load() || p.recorder.waits()
	return s
}

// watch looks at the pipeline until ctx ends.
func (p *pipeline) watch(ctx context.Context) error {
	defer p.relay.stalled.Store(nil)
	defer p.relay.invisible.Store(false)
	defer p.relay.full.Store(nil)
	w := newWatch(p.relay.config.StallAfter, time.Now())
	for {
		now, sample := time.Now(), p.sample()
		p.tellStall(w.look(now, sample))
		p.relay.full.Store(w.fill(now, sample))
		p.relay.invisible.Store(p.recorder.waits() && now.Sub(w.moved) > waitingAfter)
		if err := wait.For(ctx, min(checkEvery, w.limit/4)); err != nil {
			return err
		}
	}
}

// look takes the next sample, and says why the pipeline is stalled, or nothing.
func (w *watch) look(now time.Time, s sample) string {
	idle := s.read == s.recorded
	if idle || s.read != w.last.read || s.settled != w.last.settled || s.recorded != w.last.recorded {
		w.moved = now
	}
	if idle || s.rounds != w.last.rounds {
		w.answered = now
	}
	w.last = s
	switch silent, still := now.Sub(w.answered), now.Sub(w.moved); {
	case silent > w.limit:
		return fmt.Sprintf("for %s Postgres has not answered the recorder, and events wait to be recorded: "+
			"look in pg_stat_activity what application \"outbox-relay recorder\" waits for, and end that; else restart the relay", silent.Round(time.Second))
	case still > w.limit && !s.waits:
		return fmt.Sprintf("for %s no event was read, stored or recorded, and there are some to be, with both ends connected: "+
			"keep the log, and restart the relay", still.Round(time.Second))
	}
	return ""
}

// fill takes the next sample, and says why events that are not recorded are in the way;
// nil: they are not. A flood fills the bound as well, and is no trouble while what
// fills it is recorded within a minute.
func (w *watch) fill(now time.Time, s sample) *string {
	if s.read-s.recorded < unrecordedBound {
		w.full = time.Time{}
		return nil
	}
	if w.full.IsZero() {
		w.full, w.recorded = now, s.recorded
	}
	lasted := now.Sub(w.full)
	if pace := float64(s.recorded-w.recorded) / lasted.Seconds(); lasted < fullAfter || pace*time.Minute.Seconds() >= unrecordedBound {
		return nil
	}
	why := fmt.Sprintf("%d events are read and not recorded, as many as may be, for %s: nothing more is read than Postgres records", unrecordedBound, rough(lasted))
	return &why
}

// tellStall makes the judgement known, and logs a change.
func (p *pipeline) tellStall(why string) {
	before := p.relay.Stalled()
	if why == "" {
		p.relay.stalled.Store(nil)
		if before != "" {
			p.relay.causes.stall.Over("goes on after a stall")
		}
		return
	}
	p.relay.stalled.Store(&why)
	p.relay.causes.stall.Fault("stalled", "reason", why)
}
