// Package relay is the pipeline from a replication slot to a stream, and its
// supervision: replication -> decoder -> sink, and back by checkpoint to the
// slot.
package relay

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"outbox-relay/internal/repeat"
	"outbox-relay/internal/wait"
	"outbox-relay/outbox"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// Config is what a relay needs to know.
type Config struct {
	Postgres func() (string, error) // the URL; asked again for each connection
	Table    outbox.Table
	Sink     func(replication.System) sink.Config // told who Postgres is
	Halt     bool                                 // before an event that can never be stored, instead of parking it
	// ConfirmDelay holds the slot back behind the checkpoint, so that what the
	// broker forgets can be read again.
	ConfirmDelay time.Duration
	Grace        time.Duration // for the last events when the relay is stopped
	Backfill     bool          // publish the rows that were pending before the slot
	Housekeeping Housekeeping
	Tracer       Tracer                           // nil: none
	Bar          func(what string, total int) Bar // where somebody sits at a terminal; nil: the log tells
	StallAfter   time.Duration                    // without a move, for no known reason, before Relay.Stalled says so; 0: a minute
}

// unrecordedBound is how many events may be stored and not recorded. It bounds
// what a crash leaves to be matched, and is part of the checkpoint.
const unrecordedBound = 1 << 16

// State is where the relay stands.
type State string

const (
	Starting    State = "starting"    // connecting, checking, matching
	Standby     State = "standby"     // another relay has the slot
	Backfilling State = "backfilling" // publishing the rows that do not come out of the slot
	Streaming   State = "streaming"   // reading and publishing
	Stopping    State = "stopping"    // draining
	Halted      State = "halted"      // ended by an error that waiting does not mend
)

// Relay publishes the events of one outbox.
type Relay struct {
	config  Config
	log     *slog.Logger // says nothing of how well a session begins while they end again and again
	metrics *Metrics
	causes  *causes

	state      atomic.Value                // State
	streamed   bool                        // a session has streamed: what is wrong now was right before
	client     atomic.Pointer[sink.Client] // nil: not connected to NATS yet
	pipeline   atomic.Pointer[pipeline]    // nil: no session streams
	waiting    atomic.Pointer[string]      // why a session ended and another is to begin; nil: one runs
	refused    atomic.Bool                 // Postgres refuses to record outcomes
	invisible  atomic.Bool                 // for long now, events wait for their transaction to be visible
	stalled    atomic.Pointer[string]      // why the pipeline is; nil: it is not
	unreadable atomic.Pointer[unreadable]  // a slot from which nothing more can be read
	vitals     vitals                      // of the slot
}

// New returns a relay; nothing runs before Run.
func New(config Config, log *slog.Logger, metrics *Metrics) *Relay {
	config.StallAfter = cmp.Or(config.StallAfter, time.Minute)
	r := &Relay{config: config, metrics: metrics, causes: newCauses(log)}
	r.log = slog.New(repeat.Quiet(log.Handler(), r.causes.session))
	r.state.Store(Starting)
	metrics.observe(r)
	return r
}

// State returns where the relay stands. Safe for concurrent use.
func (r *Relay) State() State { return r.state.Load().(State) }

// reconnects counts those to NATS. Safe for concurrent use.
func (r *Relay) reconnects() float64 {
	if client := r.client.Load(); client != nil {
		return float64(client.Reconnects())
	}
	return 0
}

// Trouble says why the relay gets nowhere at present, as far as is known: what
// it waits for, or why it has halted. Empty: it gets on, or there is nothing to
// get on with. Safe for concurrent use.
func (r *Relay) Trouble() string {
	p := r.pipeline.Load()
	switch state := r.State(); {
	case state == Starting || state == Halted:
		if why := r.waiting.Load(); why != nil {
			return *why
		}
	case state != Streaming && state != Backfilling || p == nil:
	case interruption(p) != "":
		return interruption(p)
	case r.refused.Load():
		return "Postgres refuses to record outcomes"
	case r.invisible.Load():
		return "a transaction with events is committed and can't be seen yet: is a synchronous standby missing?"
	}
	return ""
}

// interruption says why nothing is stored at present; empty: it is.
func interruption(p *pipeline) string {
	if _, why := p.chain.Interrupted(); why != nil {
		return "publishing to the stream is interrupted: " + why.Error()
	}
	return ""
}

// Run relays until ctx ends, which is a clean stop (nil): what was read is
// published, recorded and confirmed within the grace. It waits for whatever can
// pass, and returns an error for what can't.
func (r *Relay) Run(ctx context.Context) error {
	defer func() {
		if client := r.client.Load(); client != nil {
			client.Close()
		}
	}()
	defer context.AfterFunc(ctx, r.causes.session.Forget)() // how it stops is told
	for attempt := 0; ; attempt++ {
		began := time.Now()
		err := r.session(ctx)
		switch {
		case ctx.Err() != nil && !isFatal(err):
			return nil
		case err == nil:
			return nil
		case r.fatal(err):
			err = withGrants(err)
			r.because(err)
			r.state.Store(Halted)
			return err
		}
		r.metrics.sessions.Inc()
		if time.Since(began) > time.Minute || errors.Is(err, sink.ErrStrangers) {
			attempt = 0
		}
		if errors.Is(err, errSlotFree) {
			continue
		}
		r.enter(err)
		if wait.For(ctx, retryDelay(err, attempt)) != nil {
			return nil
		}
	}
}

// enter says why the relay waits.
func (r *Relay) enter(err error) {
	if errors.Is(err, replication.ErrSlotInUse) {
		r.standBy()
		return
	}
	r.because(err)
	r.state.Store(Starting)
	r.causes.session.Again("waiting to start again", "error", err)
}

// because keeps why no session runs.
func (r *Relay) because(err error) {
	why := err.Error()
	r.waiting.Store(&why)
}

// standBy says, once, that another relay has the slot.
func (r *Relay) standBy() {
	if r.state.Swap(Standby) != Standby {
		r.log.Info("standing by: another relay has the slot", "slot", r.config.Table.Slot)
	}
}

func (r *Relay) fatal(err error) bool {
	if distrust(err) {
		return !r.streamed
	}
	return isFatal(err)
}

func isFatal(err error) bool {
	return err != nil && !passes(err) && !distrust(err) && !errors.Is(err, context.Canceled)
}

// retryDelay is the pause before the next session. A slot that is in use is
// asked for at an even pace, so that a successor takes over within a second.
func retryDelay(err error, attempt int) time.Duration {
	if errors.Is(err, replication.ErrSlotInUse) {
		return standbyPause
	}
	return time.Duration(float64(sink.Backoff(attempt)) * (0.5 + rand.Float64()/2))
}
