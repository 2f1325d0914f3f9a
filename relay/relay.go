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
	"sync"
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
	CheckEvery   time.Duration                    // between two looks of a standby whether it could take over; 0: a minute
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
	streamed   bool                        // a session has streamed: what surrounds the relay was right once
	rehearsed  atomic.Bool                 // so it was when the relay stood by
	recorded   atomic.Bool                 // an event's outcome was recorded: the role had the rights
	client     atomic.Pointer[sink.Client] // nil: not connected to NATS yet
	pipeline   atomic.Pointer[pipeline]    // nil: no session streams
	waiting    atomic.Pointer[string]      // why a session ended and another is to begin; nil: one runs
	refused    atomic.Bool                 // Postgres refuses to record outcomes
	invisible  atomic.Bool                 // for long now, events wait for their transaction to be visible
	full       atomic.Pointer[string]      // why as many events as may be are not recorded, and go slowly; nil: they are not
	starting   work                        // how the present session begins
	recording  work                        // what the recorder waits for
	housework  work                        // the housekeeper's step
	unclean    atomic.Bool                 // the relay before this process has not ended in order
	stalled    atomic.Pointer[string]      // why the pipeline is; nil: it is not
	unreadable atomic.Pointer[unreadable]  // a slot from which nothing more can be read
	vitals     vitals                      // of the slot
	stands     chan struct{}               // receives when the relay begins to stand by
	takeover   atomic.Pointer[takeover]    // whether it could take over then
}

// New returns a relay; nothing runs before Run.
func New(config Config, log *slog.Logger, metrics *Metrics) *Relay {
	config.StallAfter = cmp.Or(config.StallAfter, time.Minute)
	config.CheckEvery = cmp.Or(config.CheckEvery, time.Minute)
	r := &Relay{config: config, metrics: metrics, causes: newCauses(log), stands: make(chan struct{}, 1)}
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
	rehearsing, stop := context.WithCancel(ctx)
	var rehearsals sync.WaitGroup
	rehearsals.Go(func() { r.rehearse(rehearsing) })
	defer rehearsals.Wait()
	defer stop()
	for attempt := 0; ; attempt++ {
		began := time.Now()
		err := withGrants(r.session(ctx))
		switch {
		case err == nil, ctx.Err() != nil && !r.fatal(err):
			return nil
		case r.fatal(err):
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
	if r.State() != Standby {
		r.takeover.Store(nil)
		r.state.Store(Standby)
		select {
		case r.stands <- struct{}{}:
		default:
		}
		r.log.Info("standing by: another relay has the slot", "slot", r.config.Table.Slot)
		r.causes.session.Over("no session is needed: another relay has the slot")
	}
}

// fatal reports whether the error ends the relay: what no waiting mends, and what is
// wrong with its surroundings at the first start, when it is a mistake.
func (r *Relay) fatal(err error) bool {
	switch {
	case err == nil, errors.Is(err, context.Canceled):
		return false
	case surroundings(err):
		return !r.streamed && !r.rehearsed.Load()
	case lacksRight(err):
		return !r.recorded.Load()
	}
	return !passes(err)
}

// retryDelay is the pause before the next session. A slot that is in use is
// asked for at an even pace, so that a successor takes over within a second.
func retryDelay(err error, attempt int) time.Duration {
	if errors.Is(err, replication.ErrSlotInUse) {
		return standbyPause
	}
	return time.Duration(float64(sink.Backoff(attempt)) * (0.5 + rand.Float64()/2))
}
