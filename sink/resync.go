package sink

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"outbox-relay/internal/wait"

	"github.com/nats-io/nats.go"
)

const (
	ackWait    = 5 * time.Second  // without any answer the chain counts as broken
	settleWait = time.Second      // of silence, after which copies in flight count as settled
	shiftWait  = 10 * time.Second // the same where a late copy could take another event's place
	forgetWait = 10 * time.Second // a leader may be behind for a moment
)

// resync finds out what is stored and sends the rest again, for ever: an outage
// of JetStream costs WAL, never events.
func (ch *Chain) resync(ctx context.Context) error {
	if err := ch.lockSending(ctx); err != nil {
		return err
	}
	defer func() { <-ch.sending }()
	why := ch.Broken()
	ch.outcomes.Resync(reasonOf(why))
	attempt := ch.interrupt(why)
	r := resyncer{Chain: ch}
	for ; ; attempt++ {
		if attempt > 0 {
			reconnected, err := ch.pause(ctx, jitter(Backoff(attempt-1)))
			if err != nil {
				return err
			}
			if reconnected {
				attempt = 1 // the server may not be ready yet, and will be soon
			}
		}
		done, err := r.try(ctx)
		switch {
		case done:
			ch.sentAgain(attempt + 1)
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case final(err):
			return err
		case err != nil:
			ch.tellInterrupted(err)
		}
	}
}

// pause returns after d, at once when the connection is back, or with why ctx ended.
func (ch *Chain) pause(ctx context.Context, d time.Duration) (reconnected bool, err error) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false, context.Cause(ctx)
	case <-ch.back:
		return true, nil
	case <-timer.C:
		return false, nil
	}
}

// outage is a time in which nothing is stored: it can take many resyncs, where
// the stream refuses what each of them sends again.
type outage struct {
	began    time.Time // zero: there is none
	why      error
	attempts int
}

// interrupt begins an outage, or goes on with it, and returns how many attempts
// were made to end it.
func (ch *Chain) interrupt(why error) (attempts int) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	ch.tell(why)
	return ch.outage.attempts
}

// sentAgain ends the outage if nothing was left to send; else the first event
// that is stored does.
func (ch *Chain) sentAgain(attempts int) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	ch.outage.attempts = attempts
	if ch.head == ch.tail {
		ch.goOn()
	}
}

// goOn ends an outage. ch.mu is held.
func (ch *Chain) goOn() {
	if ch.outage.began.IsZero() {
		return
	}
	ch.outage = outage{}
	ch.client.denied.Store(nil)
	ch.client.publishes()
}

// publishes says that nothing is in the way of publishing.
func (c *Client) publishes() {
	c.publishing.Over("publishing goes on")
	c.permission.Over("NATS denies no permission any more")
}

func (ch *Chain) tellInterrupted(err error) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	ch.tell(err)
}

// tell says why there is an outage. ch.mu is held.
func (ch *Chain) tell(err error) {
	if ch.outage.began.IsZero() {
		ch.outage.began = time.Now()
	}
	ch.outage.why = err
	ch.client.publishing.Again("publishing is interrupted", "error", ch.client.explain(err))
}

// explain adds why no answer came: the permission that NATS denied, or why it refuses
// the connection.
func (c *Client) explain(err error) error {
	if denied := c.denied.Load(); denied != nil {
		return fmt.Errorf("%w (%s)", err, *denied)
	}
	if last := c.nc.LastError(); last != nil && !c.nc.IsConnected() && !errors.Is(err, last) {
		return fmt.Errorf("%w (%w)", err, last)
	}
	return err
}

// jitter keeps relays that lost the same server from coming back at once.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2) }

func final(err error) bool {
	var ambiguous *AmbiguousError
	var outcome *outcomeError
	return errors.Is(err, ErrStream) || errors.Is(err, ErrForgotten) || errors.Is(err, ErrStrangers) || errors.Is(err, ErrClosed) || errors.As(err, &ambiguous) || errors.As(err, &outcome)
}

// outcomeError is an error of Outcomes, which ends the chain.
type outcomeError struct{ error }

func (e *outcomeError) Unwrap() error { return e.error }

// resyncer is one resync: it has the sending token.
type resyncer struct {
	*Chain
	behind      time.Time // since when the stream ends before what it acknowledged
	shiftWaited bool      // late copies had their time
}

// try makes one attempt. Without an error and not done, it is to be called again.
func (r *resyncer) try(ctx context.Context) (done bool, err error) {
	switch {
	case r.client.Closed():
		return false, r.client.closed()
	case !r.client.Connected():
		return false, nats.ErrDisconnected
	}
	if err := r.settle(ctx, settleWait); err != nil {
		return false, err
	}
	stream, err := r.look(ctx)
	if err != nil {
		return false, err
	}
	shifted, err := r.account(ctx, stream)
	if err != nil || shifted {
		return false, err
	}
	if again, err := r.reject(ctx); err != nil || again {
		return false, err
	}
	return r.resend(stream)
}

// settle waits until every copy is answered, or nothing was heard for a while.
func (r *resyncer) settle(ctx context.Context, silence time.Duration) error {
	for {
		r.mu.Lock()
		left, quiet := r.unanswered, time.Since(r.quiet)
		r.mu.Unlock()
		if left == 0 || quiet >= silence {
			return nil
		}
		if err := wait.For(ctx, min(silence-quiet, 20*time.Millisecond)); err != nil {
			return err
		}
	}
}

// look reads the stream's state, and makes sure that it is the same stream and
// still holds, or held, all that it acknowledged.
func (r *resyncer) look(ctx context.Context) (Stream, error) {
	owner := r.client.config.Stream
	owner.Create = false // one that is gone was not ours to replace
	stream, err := r.client.OpenStream(ctx, owner)
	if err != nil {
		return stream, err
	}
	if !stream.Created.Equal(r.stream.Created) {
		return stream, fmt.Errorf("%w: stream %s says now that it was made at %s", ErrForgotten, stream.Name, stream.Created)
	}
	r.mu.Lock()
	last := r.last
	r.mu.Unlock()
	if stream.Last >= last {
		r.behind = time.Time{}
		return stream, nil
	}
	err = fmt.Errorf("%w: stream %s ends at sequence %d, and had acknowledged %d", ErrForgotten, stream.Name, stream.Last, last)
	if r.behind.IsZero() {
		r.behind = time.Now()
	}
	if stream.Replicated && time.Since(r.behind) < forgetWait {
		return stream, fmt.Errorf("wait for the stream's leader: %s", err) // not final yet
	}
	return stream, err
}

// account holds what follows the last known sequence against the window. It
// returns true when late copies must be waited for, and all looked at again.
func (r *resyncer) account(ctx context.Context, stream Stream) (again bool, err error) {
	r.mu.Lock()
	last, window := r.last, int(r.tail-r.head)
	r.mu.Unlock()
	tail, err := r.client.tail(ctx, stream, last, window)
	if err != nil {
		return false, err
	}
	r.mu.Lock()
	base := r.head
	tail = r.unknown(tail)
	v, ambiguity := match(tail, r.candidates(), r.foreign)
	late := r.unanswered > 0
	r.mu.Unlock()

	switch {
	case len(v.foreign) > 0:
		return false, fmt.Errorf("%w: %d of them from sequence %d on", ErrStrangers, len(v.foreign), v.foreign[0].sequence)
	case ambiguity != nil && !ambiguity.doubt && r.young(): // more than the window may have landed
		return false, fmt.Errorf("%w: from sequence %d on, and they are gone", ErrStrangers, ambiguity.First)
	}
	if v.lost > 0 && late && !r.shiftWaited {
		// From here on the chain is shifted: a late copy of an event could fit
		// the place of the one before it.
		r.shiftWaited = true
		return true, r.settle(ctx, shiftWait)
	}
	if v.lost > 0 || ambiguity != nil {
		r.foreign = true
		if err := r.outcomes.Foreign(ctx, v.lost); err != nil {
			return false, &outcomeError{err}
		}
	}
	if ambiguity != nil {
		ambiguity.Stream = stream.Name
		return false, ambiguity
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.apply(base, v)
	r.last = max(r.last, stream.Last)
	return false, nil
}

// unknown returns the messages of the tail that no answer has accounted for
// meanwhile. A gone one that an answer names as an event's gets its id back.
// r.mu is held.
func (r *resyncer) unknown(tail []message) []message {
	for len(tail) > 0 && tail[0].sequence <= r.last {
		tail = tail[1:]
	}
	if len(tail) == 0 {
		return nil
	}
	first := tail[0].sequence
	for n := r.head; n < r.tail; n++ {
		en := r.at(n)
		at := en.twin
		if en.stored {
			at = en.sequence
		}
		if at < first || at-first >= uint64(len(tail)) {
			continue
		}
		if m := &tail[at-first]; m.gone {
			m.gone, m.id = false, en.event.MessageID()
		}
	}
	return tail
}

// candidates lists the window. r.mu is held.
func (r *resyncer) candidates() []candidate {
	events := make([]candidate, 0, r.tail-r.head)
	for n := r.head; n < r.tail; n++ {
		en := r.at(n)
		events = append(events, candidate{
			id: en.event.MessageID(), maybe: en.copies > 0 || en.stored || r.inherited(en),
			doubtful: en.nameless && en.copies == 1 && !en.stored && r.doubted(n),
		})
	}
	return events
}

// doubted reports whether the event's nameless copy may be one that was refused.
// r.mu is held.
func (r *resyncer) doubted(number uint64) bool {
	i := slices.IndexFunc(r.lots, func(l lot) bool { return number < l.end })
	return i >= 0 && r.lots[i].refused
}

// apply takes the verdict over into the window, whose head was base when it
// was judged. r.mu is held.
func (r *resyncer) apply(base uint64, v verdict) {
	overtaken := uint64(0)
	for i := range v.proved {
		n := base + uint64(i)
		if n < r.head {
			continue // answered meanwhile
		}
		en := r.at(n)
		if sequence, stored := v.stored[i]; stored {
			en.stored, en.sequence, en.sent = true, sequence, time.Time{}
		}
		if !en.stored && overtaken == 0 {
			overtaken = n + 1
		}
	}
	if overtaken > 0 {
		r.blur(overtaken-1, base+uint64(v.proved)-1)
	}
	r.pop()
}

// blur marks events that overtook each other: the checkpoint can stop only
// behind the last one. r.mu is held.
func (r *resyncer) blur(first, last uint64) {
	for n := first; n < last; n++ {
		r.at(n).blurred = true
	}
	r.log.Error("a message that is not this relay's took a place in the stream: events overtook others",
		"stream", r.stream.Name, "id", string(r.at(first).event.ID), "overtaken_by", string(r.at(last).event.ID),
		"remedy", "deny others to publish on the relay's subjects")
}

// reject leaves the head behind if the server can never store it. It returns
// true when late copies must be waited for first.
func (r *resyncer) reject(ctx context.Context) (again bool, err error) {
	for {
		r.mu.Lock()
		reason := ""
		var en *entry
		if r.head != r.tail {
			en = r.at(r.head)
			reason = r.rejection(en)
		}
		late := reason != "" && r.unanswered > 0 // of any event: the chain is shifted, and a copy could fit
		r.mu.Unlock()
		switch {
		case reason == "":
			return false, nil
		case late && !r.shiftWaited:
			r.shiftWaited = true
			return true, r.settle(ctx, shiftWait)
		}
		if err := r.outcomes.Rejected(ctx, en.index, &en.event, reason); err != nil {
			return false, &outcomeError{err}
		}
		r.mu.Lock()
		r.release(en)
		r.mu.Unlock()
	}
}

func (r *resyncer) rejection(en *entry) string {
	switch {
	case en.refused != "":
		return en.refused
	case en.twin != 0 && en.twin <= r.last:
		return fmt.Sprintf("its id is taken: message %d of stream %s bears it", en.twin, r.stream.Name)
	}
	return ""
}

// resend sends what is left of the window, behind the stream's last message.
func (r *resyncer) resend(stream Stream) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.generation++
	r.named = r.tail
	r.next = r.last // acks may have come since the stream was looked at
	r.probing = false
	r.broken = nil // an answer to what is sent now may break the chain again
	r.takeConfig(stream)
	for n := r.head; n < r.tail && r.broken == nil; n++ {
		en := r.at(n)
		if en.stored {
			continue
		}
		if err := r.builder.build(&en.event, r.limit); err != nil { // the limits have shrunk since it was sent
			en.refused = err.Error()
			r.broken = err
			break
		}
		to, sequence := r.place(n, time.Now())
		r.mu.Unlock() // the window can't grow, since the resync has the sending token
		err := r.send(to, sequence)
		r.mu.Lock()
		if err != nil {
			r.broken = err
		}
	}
	if err := r.client.wire.flush(); err != nil && r.broken == nil {
		r.broken = err
	}
	r.changed.Broadcast()
	return r.broken == nil, r.broken
}
