package sink

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"

	"outbox-relay/outbox/event"
)

// ErrForgotten says that the stream ends before what it has acknowledged, or
// is another one than it was.
var ErrForgotten = errors.New("the stream has forgotten acknowledged messages")

// ErrStrangers says that the stream holds messages that are not in the window:
// of others, or events of this outbox that were not read yet. Another relay sent
// those with its last breath, frozen and woken, or they were under way when it
// died. Only the slot tells which: the session must resume anew.
var ErrStrangers = errors.New("the stream holds messages that this session has not sent")

// errStarting keeps a chain from sending before it hears answers.
var errStarting = errors.New("the chain does not run yet")

// Outcomes hears what becomes of the events of a chain.
type Outcomes interface {
	// Stored is called in the order of the events, and must not call the chain.
	// stop says that the checkpoint can stop at the event: it can't where a
	// foreign message let events overtake each other. e is valid until it
	// returns; sent is when the copy that was answered left, zero where the
	// event was found in the stream, and answered when its answer came.
	Stored(index, sequence uint64, stop bool, e *event.Event, sent, answered time.Time)
	// Rejected is called when the server says that it can never store the
	// event, with all before it stored. It returns when the event may be left
	// behind; an error ends the chain. e is valid until it returns.
	Rejected(ctx context.Context, index uint64, e *event.Event, reason string) error
	// Foreign is called before the chain passes over messages of others.
	Foreign(ctx context.Context, messages int) error
	// Resync is called when the chain breaks, with why.
	Resync(Reason)
}

// Chain publishes events so that each carries the sequence that it must follow:
// the server refuses whatever would leave a gap, come out of order or come from
// a second relay, with thousands of publishes in flight.
//
// A publish is good when its ack names our stream and the expected sequence.
// After any other outcome the chain is broken: nothing is sent until Run has
// learned from the stream's leader what is stored, and sent the rest again.
//
// The sequence says which event is stored, so the acks of one server come on one
// subject, which it then finds in its cache. Any other answer on that names no event:
// what is sent again after it has a name, a reply subject of its own. So has what is
// sent alone, and what goes to a stream that is known to have replicas: a new leader
// refuses messages and loses acks at once.
//
// One goroutine calls Publish and Drain, another one Run.
type Chain struct {
	client   *Client
	log      *slog.Logger
	stream   Stream
	outcomes Outcomes
	message  MessageConfig
	limit    int    // of a message, in bytes
	inbox    string // prefix of the subjects that this chain's acks come on

	heritage  Heritage
	began     time.Time
	lookEvery time.Duration

	sending chan struct{} // holds a token while messages are sent, and for the whole of a resync
	builder *builder      // whoever has the token
	reply   []byte        // likewise

	mu         sync.Mutex
	changed    sync.Cond
	ring       []entry // capacity is a power of two; number n lives at n&mask
	memory     arena   // what the events in the window point into
	head, tail uint64  // numbers of the first and one past the last event in the window
	bytes      int
	last       uint64    // up to it the stream's messages are accounted for
	next       uint64    // the sequence that the next message must follow
	generation uint64    // counts how often the window was sent
	replicated bool      // all that is sent has a name
	named      uint64    // so have events before this number, in this generation
	lots       []lot     // oldest first
	unanswered int       // copies in the window that are not known to be answered
	quiet      time.Time // when something was last sent, answered or reconnected
	heard      time.Time // when something was last answered
	foreign    bool      // messages of others were seen
	outage     outage
	probing    bool // the event in the window is alone until it is answered
	broken     error
	trouble    chan struct{}
	back       chan struct{} // the connection is: a resync need not wait any longer
}

// entry is an event in the window.
type entry struct {
	index    uint64 // the outcomes' name for it
	event    event.Event
	size     int
	sequence uint64 // at which it must be, or is, stored
	sent     time.Time
	copies   int  // sent and not known to be answered
	nameless bool // one of them is, the first that was sent: see lot
	stored   bool
	blurred  bool   // was overtaken, or overtook: no place for the checkpoint to stop
	refused  string // why the server can never store it
	twin     uint64 // sequence at which an answer has named a copy of it, where another was expected
}

// lot is the nameless copies of one sending of the window. They were placed one behind
// the other, so that the sequence in a good answer says whose it is.
type lot struct {
	generation uint64
	begin, end uint64 // numbers of the first event, and one past the last
	sequence   uint64 // at which the first is to be stored
	pending    int    // copies that were not answered
	refused    bool   // there were other answers than good ones: they name no event
}

// event returns the number of the event that was to be stored at the sequence.
func (l *lot) event(sequence uint64) (number uint64, ok bool) {
	number = l.begin + (sequence - l.sequence)
	return number, sequence >= l.sequence && number < l.end
}

// probeAfter is how long the stream may be silent before the next event is sent
// alone.
const probeAfter = 10 * time.Millisecond

// lookEvery is how often the stream is looked at while all goes well: it may have been
// changed into one that acknowledges what it does not keep.
const lookEvery = 30 * time.Second

// Heritage is what an earlier chain may have sent that has not landed yet: the
// first events behind the checkpoint, at most so many, up to an LSN.
type Heritage struct {
	Events int
	End    pglogrepl.LSN
}

// lateWait is how long a copy of an earlier chain may be under way: in buffers of
// a connection that has ended, and in the server's queue. Where a link was cut,
// copies landed three seconds later.
const lateWait = 30 * time.Second

// Origin is where a chain begins.
type Origin struct {
	Stream   Stream // the first message must follow its last one
	Message  MessageConfig
	Foreign  bool // messages of others were ever seen in the stream
	Heritage Heritage
}

// NewChain returns a chain. What an earlier chain has not written yet is dropped: it
// must not land behind the messages that were read from the stream since.
func (c *Client) NewChain(from Origin, outcomes Outcomes) *Chain {
	ch := &Chain{
		client: c, log: c.log, stream: from.Stream, outcomes: outcomes,
		message: from.Message,
		inbox:   c.config.InboxPrefix + "." + nuid.Next() + ".",
		sending: make(chan struct{}, 1),
		builder: newBuilder(from.Message),
		ring:    make([]entry, 64),
		last:    from.Stream.Last, next: from.Stream.Last,
		foreign: from.Foreign, heritage: from.Heritage, began: time.Now(), lookEvery: lookEvery,
		broken:  errStarting,
		trouble: make(chan struct{}, 1),
		back:    make(chan struct{}, 1),
	}
	ch.takeConfig(from.Stream)
	ch.changed.L = &ch.mu
	c.wire.discard()
	return ch
}

// Run settles whatever goes wrong until ctx ends. Any other error is final:
// ErrStream, ErrForgotten, ErrStrangers, ErrClosed, *AmbiguousError, or what Outcomes
// returned.
func (ch *Chain) Run(ctx context.Context) error {
	acks, err := ch.client.nc.Subscribe(ch.inbox+">", ch.answer)
	if err != nil {
		return fmt.Errorf("subscribe to acks: %w", err)
	}
	defer func() { _ = acks.Unsubscribe() }()
	if err := acks.SetPendingLimits(-1, -1); err != nil {
		return fmt.Errorf("subscribe to acks: %w", err)
	}
	ch.client.chain.Store(ch)
	defer ch.client.chain.CompareAndSwap(ch, nil)
	ch.begin(ch.client.nc.FlushTimeout(requestTimeout))
	tick, look := time.NewTicker(time.Second), time.NewTicker(ch.lookEvery)
	defer tick.Stop()
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
			ch.checkSilence(time.Now())
		case <-look.C:
			if err := ch.Refresh(ctx); errors.Is(err, ErrStream) && !errors.Is(err, ErrNoStream) {
				return err
			}
		case <-ch.trouble:
			if ch.Broken() == nil {
				continue // settled by the resync before
			}
			if err := ch.resync(ctx); err != nil {
				return err
			}
		}
	}
}

// begin lets events be sent, once the server has the subscription to their
// acks. Where that is not known, a resync asks it something behind that.
func (ch *Chain) begin(err error) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	ch.broken = nil
	if err != nil {
		ch.breakWith(Disconnected, fmt.Errorf("subscribe to acks: %w", err))
	} else {
		ch.client.publishes() // a chain before may have ended while it was interrupted
	}
	ch.changed.Broadcast()
}

// Publish sends the event; its outcome comes later. It blocks while the window
// is full or the chain is broken. A *RejectedError says that no message can
// carry the event: nothing was sent. e is copied.
func (ch *Chain) Publish(ctx context.Context, index uint64, e *event.Event) error {
	size := e.Size()
	for {
		if err := ch.room(ctx, size); err != nil {
			return err
		}
		if err := ch.lockSending(ctx); err != nil {
			return err
		}
		sent, err := ch.publish(index, e, size)
		<-ch.sending
		if sent || err != nil {
			return err
		}
	}
}

// publish sends the event unless the chain broke meanwhile.
func (ch *Chain) publish(index uint64, e *event.Event, size int) (sent bool, err error) {
	if err := ch.builder.build(e, ch.limit); err != nil {
		return false, err
	}
	ch.mu.Lock()
	if ch.broken != nil {
		ch.mu.Unlock()
		return false, nil
	}
	number := ch.append(index, e, size)
	to, sequence := ch.place(number, time.Now())
	ch.mu.Unlock()
	if err := ch.send(to, sequence); err != nil {
		ch.fail(fmt.Errorf("publish to %s: %w", ch.builder.subject, err))
	}
	return true, nil
}

// Flush writes what was published to the connection. To be called before the
// publisher waits for anything: until then, or until enough has gathered, it is
// only kept.
func (ch *Chain) Flush() {
	if err := ch.client.wire.flush(); err != nil {
		ch.fail(fmt.Errorf("publish: %w", err))
	}
}

// Drain waits until every event has its outcome.
func (ch *Chain) Drain(ctx context.Context) error {
	ch.Flush()
	ch.mu.Lock()
	defer ch.mu.Unlock()
	return ch.wait(ctx, func() bool { return ch.head == ch.tail })
}

// InFlight returns how many events, and bytes of them, have no outcome yet.
func (ch *Chain) InFlight() (events, bytes int) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	return int(ch.tail - ch.head), ch.bytes
}

// Settled counts the events of the chain that have their outcome.
func (ch *Chain) Settled() uint64 {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	return ch.head
}

// Oldest returns when the first event that has no outcome was committed; zero:
// there is none, or it did not come out of the slot.
func (ch *Chain) Oldest() time.Time {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if ch.head == ch.tail {
		return time.Time{}
	}
	return ch.at(ch.head).event.Commit
}

// Broken returns why nothing is sent at present, or nil.
func (ch *Chain) Broken() error {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	return ch.broken
}

// Refresh asks for the limits of what the server and the stream take: they may
// have been raised since the last resync.
func (ch *Chain) Refresh(ctx context.Context) error {
	owner := ch.client.config.Stream
	owner.Create = false
	stream, err := ch.client.OpenStream(ctx, owner)
	if err != nil {
		return err
	}
	if err := ch.lockSending(ctx); err != nil {
		return err
	}
	defer func() { <-ch.sending }()
	ch.mu.Lock()
	defer ch.mu.Unlock()
	ch.takeConfig(stream)
	return nil
}

// takeConfig is called with the sending token and ch.mu held.
func (ch *Chain) takeConfig(stream Stream) {
	ch.replicated, ch.stream.Domain = stream.Replicated, stream.Domain
	ch.limit = int(ch.client.nc.MaxPayload())
	if stream.MaxMsgSize >= 0 {
		ch.limit = min(ch.limit, stream.MaxMsgSize)
	}
}

// Fits returns a *RejectedError where no message can carry the event as the limits
// are now. Safe for concurrent use.
func (ch *Chain) Fits(e *event.Event) error {
	ch.mu.Lock()
	limit := ch.limit
	ch.mu.Unlock()
	return newBuilder(ch.message).build(e, limit)
}

// Interrupted returns since when nothing can be stored, and why; nil: it can.
func (ch *Chain) Interrupted() (since time.Time, why error) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if ch.outage.began.IsZero() {
		return time.Time{}, nil
	}
	return ch.outage.began, ch.client.explain(ch.outage.why)
}

// room waits until an event of that size fits into the window. One event always
// fits into an empty one. After a pause it is alone there until it is answered:
// had others published meanwhile, it would be refused, and the one behind it
// would fit the place of the other's message and overtake it.
func (ch *Chain) room(ctx context.Context, size int) error {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	config := &ch.client.config
	if ch.head == ch.tail && time.Since(ch.heard) > probeAfter {
		ch.probing = true
	}
	fits := func(messages, bytes int) bool {
		n := int(ch.tail - ch.head)
		return ch.broken == nil && (n == 0 || !ch.probing && n < messages && ch.bytes+size <= bytes)
	}
	if fits(config.MaxInflight, config.MaxBytes) {
		return nil
	}
	ch.mu.Unlock()
	ch.Flush()
	ch.mu.Lock()
	// A full window empties by a quarter before it is filled again: with an ack
	// for each place, each message would be a write of its own.
	return ch.wait(ctx, func() bool { return fits(config.MaxInflight-config.MaxInflight/4, config.MaxBytes-config.MaxBytes/4) })
}

// wait blocks until done holds or ctx ends. ch.mu is held.
func (ch *Chain) wait(ctx context.Context, done func() bool) error {
	stop := context.AfterFunc(ctx, func() {
		ch.mu.Lock()
		defer ch.mu.Unlock()
		ch.changed.Broadcast()
	})
	defer stop()
	for !done() {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		ch.changed.Wait()
	}
	return nil
}

func (ch *Chain) lockSending(ctx context.Context) error {
	select {
	case ch.sending <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// append adds a copy of the event to the window. ch.mu is held.
func (ch *Chain) append(index uint64, e *event.Event, size int) uint64 {
	if int(ch.tail-ch.head) == len(ch.ring) {
		ch.grow()
	}
	number := ch.tail
	en := ch.at(number)
	en.index, en.size = index, size
	e.CopyTo(&en.event, ch.memory.take(size))
	ch.tail++
	ch.bytes += size
	return number
}

// place gives the event its place in the chain, and its answer a subject. Those from
// ch.named on are placed one behind the other, the last one at ch.next. ch.mu is held.
func (ch *Chain) place(number uint64, now time.Time) (to reply, sequence uint64) {
	en := ch.at(number)
	ch.next++
	en.sequence, en.sent, en.refused = ch.next, now, ""
	if en.twin <= ch.last { // one behind that has landed since the stream was looked at
		en.twin = 0
	}
	en.copies++
	ch.unanswered++
	ch.quiet = now
	to = reply{generation: ch.generation, number: number, named: ch.replicated || ch.probing || number < ch.named}
	if !to.named {
		en.nameless = true
		ch.enlot(number, en.sequence)
	}
	return to, en.sequence
}

// enlot adds a nameless copy to those of this generation. ch.mu is held.
func (ch *Chain) enlot(number, sequence uint64) {
	l := ch.lot(ch.generation)
	if l == nil {
		ch.lots = append(ch.lots, lot{generation: ch.generation, begin: number, sequence: sequence})
		l = &ch.lots[len(ch.lots)-1]
	}
	l.end = number + 1
	l.pending++
}

// lot returns the nameless copies of a generation; nil: there are none, or their
// events are settled. ch.mu is held.
func (ch *Chain) lot(generation uint64) *lot {
	for i := len(ch.lots) - 1; i >= 0; i-- {
		if ch.lots[i].generation == generation {
			return &ch.lots[i]
		}
	}
	return nil
}

// send hands the message that was built to the connection, for the next flush.
// Whoever calls it has the sending token.
func (ch *Chain) send(to reply, sequence uint64) error {
	ch.reply = to.append(ch.reply[:0], ch.inbox)
	return ch.client.wire.publish(ch.builder, ch.reply, sequence-1)
}

// answer takes one answer to a publish.
func (ch *Chain) answer(msg *nats.Msg) {
	to, ok := parseReply(ch.inbox, msg.Subject)
	if !ok {
		return
	}
	a, err := parseAck(msg.Data)
	reason := Misrouted
	if len(msg.Data) == 0 {
		err, reason = nats.ErrNoResponders, Unanswered
	}
	now := time.Now()
	ch.mu.Lock()
	defer ch.mu.Unlock()
	latest := to.generation == ch.generation
	switch {
	case to.named && (to.number < ch.head || to.number >= ch.tail):
		return
	case err != nil: // not an answer of the stream: the copy stays unknown
		if to.named || latest {
			ch.breakWith(reason, err)
		}
		return
	}
	ch.quiet, ch.heard = now, now
	if to.named {
		ch.judge(ch.at(to.number), a, latest)
	} else if l := ch.lot(to.generation); l != nil {
		ch.takeNameless(l, a, latest)
	}
	ch.changed.Broadcast()
}

// answered notes that a copy of the event is. ch.mu is held.
func (ch *Chain) answered(en *entry) {
	if en.copies > 0 {
		en.copies--
		ch.unanswered--
	}
}

// judge takes an answer to a copy of the event. Where one that was sent again
// meanwhile has been stored, its message is known for the event's, even when it is gone.
// ch.mu is held.
func (ch *Chain) judge(en *entry, a ack, latest bool) {
	ch.answered(en)
	switch {
	case latest:
		ch.take(en, a)
	case ch.good(a) && a.sequence > ch.last:
		en.twin = a.sequence
	}
}

// takeNameless takes an answer to one of the copies of a lot. ch.mu is held.
func (ch *Chain) takeNameless(l *lot, a ack, latest bool) {
	if ch.ours(a) {
		l.pending--
	}
	number, ok := ch.expecting(l, a)
	switch {
	case !ok: // whose it is will be known when it comes again
		l.refused = true
		if latest {
			ch.breakWith(ch.complaint(a, 0))
		}
	case number >= ch.head:
		en := ch.at(number)
		en.nameless = false
		ch.judge(en, a, latest)
	}
	if !l.refused || l.pending != 0 {
		return
	}
	for n := max(ch.head, l.begin); n < l.end; n++ { // whichever were refused: all are answered
		if en := ch.at(n); en.nameless {
			en.nameless = false
			ch.answered(en)
		}
	}
}

// expecting returns the event that a good ack without a name answers. A copy that is
// stored is the one that could be: it alone follows the sequence before. What a
// duplicate is stored at was never asked for. ch.mu is held.
func (ch *Chain) expecting(l *lot, a ack) (number uint64, ok bool) {
	if !ch.good(a) || a.duplicate {
		return 0, false
	}
	return l.event(a.sequence)
}

// take judges an answer to the latest copy of an event. ch.mu is held.
func (ch *Chain) take(en *entry, a ack) {
	if reason, err := ch.complaint(a, en.sequence); err != nil {
		switch {
		case a.permanent():
			en.refused = fmt.Sprintf("the stream refuses it: %s (JetStream error %d)", a.text, a.code)
		case reason == Duplicate:
			en.twin = a.sequence
		}
		ch.breakWith(reason, err)
		return
	}
	en.stored = true
	ch.probing = false
	ch.pop()
}

// ours reports whether our stream has answered. An error does not say of which domain.
func (ch *Chain) ours(a ack) bool {
	return string(a.stream) == ch.stream.Name && (a.code != 0 || string(a.domain) == ch.stream.Domain)
}

// good reports whether the answer says that our stream has the message.
func (ch *Chain) good(a ack) bool { return a.code == 0 && ch.ours(a) }

// complaint says what is wrong with the answer to a message that was to be stored at
// the sequence.
func (ch *Chain) complaint(a ack, sequence uint64) (Reason, error) {
	switch {
	case a.code != 0:
		return a.reason(), fmt.Errorf("the stream refuses a message: %s (JetStream error %d)", a.text, a.code)
	case !ch.ours(a):
		return Misrouted, fmt.Errorf("a publish was answered by stream %q of domain %q instead of %q of %q", a.stream, a.domain, ch.stream.Name, ch.stream.Domain)
	case a.sequence != sequence:
		return Duplicate, fmt.Errorf("a message is stored at sequence %d, where it was not expected", a.sequence)
	}
	return "", nil
}

// pop lets the stored events at the head go. ch.mu is held.
func (ch *Chain) pop() {
	for ch.head != ch.tail {
		en := ch.at(ch.head)
		if !en.stored {
			return
		}
		ch.last = max(ch.last, en.sequence)
		if ch.broken == nil { // else it answers what was sent before the outage
			ch.goOn()
		}
		ch.outcomes.Stored(en.index, en.sequence, !en.blurred, &en.event, en.sent, ch.heard)
		ch.release(en)
	}
}

// release removes the head. ch.mu is held.
func (ch *Chain) release(en *entry) {
	ch.unanswered -= en.copies
	ch.bytes -= en.size
	clear(en.event.Extra) // nothing keeps the memory that the event pointed into
	*en = entry{event: event.Event{Extra: en.event.Extra}}
	ch.memory.release()
	ch.head++
	for len(ch.lots) > 0 && ch.lots[0].end <= ch.head && ch.lots[0].generation != ch.generation {
		ch.lots = ch.lots[1:]
	}
	ch.changed.Broadcast()
}

// checkSilence breaks the chain when answers are overdue.
func (ch *Chain) checkSilence(now time.Time) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if ch.head == ch.tail || ch.broken != nil {
		return
	}
	if now.Sub(ch.at(ch.head).sent) > ackWait && now.Sub(ch.heard) > ackWait {
		ch.breakWith(Unanswered, fmt.Errorf("no answer from the stream for %s", ackWait))
	}
}

// reconnected gives copies on the old connection a moment more to land, and ends the
// pause of a resync.
func (ch *Chain) reconnected() {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	ch.quiet = time.Now()
	select {
	case ch.back <- struct{}{}:
	default:
	}
}

// fail says that the connection is lost, or does not take a message.
func (ch *Chain) fail(err error) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	ch.breakWith(Disconnected, err)
}

// breakWith stops sending until a resync. ch.mu is held.
func (ch *Chain) breakWith(reason Reason, err error) {
	if ch.broken != nil {
		return
	}
	ch.broken = &breakage{reason, err}
	select {
	case ch.trouble <- struct{}{}:
	default:
	}
}

// young reports whether copies of an earlier chain can still land.
func (ch *Chain) young() bool { return ch.heritage.Events > 0 && time.Since(ch.began) < lateWait }

// inherited reports whether an earlier chain may have sent the event.
func (ch *Chain) inherited(en *entry) bool {
	return ch.young() && en.index < uint64(ch.heritage.Events) && en.event.Position.Commit < ch.heritage.End
}

func (ch *Chain) at(number uint64) *entry { return &ch.ring[number&uint64(len(ch.ring)-1)] }

func (ch *Chain) grow() {
	bigger := make([]entry, 2*len(ch.ring))
	for n := ch.head; n < ch.tail; n++ {
		bigger[n&uint64(len(bigger)-1)] = *ch.at(n)
	}
	ch.ring = bigger
}
