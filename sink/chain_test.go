package sink

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
	"outbox-relay/outbox/event"
)

// indifferent takes every outcome.
type indifferent struct{}

func (indifferent) Stored(uint64, uint64, bool, *event.Event, time.Time, time.Time) {}
func (indifferent) Rejected(context.Context, uint64, *event.Event, string) error    { return nil }
func (indifferent) Foreign(context.Context, int) error                              { return nil }
func (indifferent) Resync(Reason)                                                   {}

// chainConfig is that of a chain whose stream the relay makes.
func chainConfig(server string, replicas int) Config {
	config := Config{Servers: []string{server}, Stream: owner, MaxInflight: 100, MaxBytes: 1 << 20,
		Message: MessageConfig{Subject: []Token{{Literal: "events"}, {Column: "aggregate_type"}, {Column: "event_type"}}}}
	config.Stream.Create, config.Stream.Replicas = true, replicas
	return config
}

// runChain runs a chain behind the stream's last message until the function that
// it returns is called, which waits for its end.
func runChain(t testing.TB, c *Client, heritage Heritage, outcomes Outcomes) (chain *Chain, stop func() error) {
	t.Helper()
	stream, err := c.OpenStream(t.Context(), c.config.Stream)
	if err != nil {
		t.Fatal(err)
	}
	chain = c.NewChain(Origin{Stream: stream, Message: c.config.Message, Heritage: heritage}, outcomes)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- chain.Run(ctx) }()
	return chain, func() error { cancel(); return <-ended }
}

// A session that ends by a fault of Postgres leaves publishes that were not
// written yet. They must not be written by its successor, which reads what the
// stream holds before it publishes.
func TestNothingIsLeftToTheNextChain(t *testing.T) {
	server := testenv.NATS(t, testenv.NATSOptions{})
	client := connectTo(t, chainConfig(server.URL(), 1))

	first, stop := runChain(t, client, Heritage{}, indifferent{})
	e := sample()
	e.ID = []byte("unwritten")
	if err := first.Publish(t.Context(), 0, e); err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != context.Canceled {
		t.Fatal(err)
	}

	second, stop := runChain(t, client, Heritage{}, indifferent{})
	e.ID = []byte("written")
	if err := second.Publish(t.Context(), 0, e); err != nil {
		t.Fatal(err)
	}
	drained := make(chan error, 1)
	go func() { drained <- second.Drain(t.Context()) }()
	testenv.Eventually(t, "a message", func() bool {
		id, err := client.MessageID(t.Context(), owner.Name, 1)
		if err == nil && id != "written" {
			t.Fatalf("the stream holds %q", id)
		}
		return err == nil
	})
	if err := <-drained; err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != context.Canceled {
		t.Fatal(err)
	}
}

// A copy that an earlier chain sent can land when this one has begun, and be
// consumed at once: what is gone then was the event, which is not to be sent
// again. Of an event that no earlier chain can have sent it was somebody else's.
func TestLateCopiesThatAreGone(t *testing.T) {
	for name, c := range map[string]struct {
		heritage Heritage
		want     uint64 // the stream's last sequence
	}{
		"inherited":        {Heritage{Events: 10, End: 100}, 1},
		"clean stop":       {Heritage{Events: 0, End: 100}, 2},
		"committed later":  {Heritage{Events: 10, End: 50}, 2},
		"beyond the bound": {Heritage{Events: 3, End: 100}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			server := testenv.NATS(t, testenv.NATSOptions{})
			client := connectTo(t, chainConfig(server.URL(), 1))
			chain, stop := runChain(t, client, c.heritage, indifferent{})

			js, err := jetstream.New(client.nc)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := js.Publish(t.Context(), "events.late.copy", nil); err != nil {
				t.Fatal(err)
			}
			stream, err := js.Stream(t.Context(), owner.Name)
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.DeleteMsg(t.Context(), 1); err != nil {
				t.Fatal(err)
			}
			e := sample()
			e.Position.Commit = 70
			if err := chain.Publish(t.Context(), 5, e); err != nil {
				t.Fatal(err)
			}
			if err := chain.Drain(t.Context()); err != nil {
				t.Fatal(err)
			}
			info, err := stream.Info(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if info.State.LastSeq != c.want {
				t.Fatalf("the stream ends at %d, want %d", info.State.LastSeq, c.want)
			}
			if err := stop(); err != context.Canceled {
				t.Fatal(err)
			}
		})
	}
}

// The acks of one server come on one subject, but for events that are sent alone, as
// the first is; those of several on one for each event.
func TestSubjectsOfAcks(t *testing.T) {
	const events = 200
	binary := testenv.NATSBinary(t, "")
	single, cluster := testenv.NATSProcesses(t, binary, 1)[0], testenv.NATSProcesses(t, binary, 3)[0]
	for name, c := range map[string]struct {
		server   string
		replicas int
	}{"one server": {single.URL(), 1}, "three replicas": {cluster.URL(), 3}} {
		t.Run(name, func(t *testing.T) {
			client := connectTo(t, chainConfig(c.server, c.replicas))
			testenv.Eventually(t, "JetStream", func() bool {
				_, err := client.OpenStream(t.Context(), client.config.Stream)
				return err == nil
			})
			acks := make(chan *nats.Msg, 10*events) // what finds no room is dropped
			if _, err := client.nc.ChanSubscribe(client.config.InboxPrefix+".>", acks); err != nil {
				t.Fatal(err)
			}
			chain, stop := runChain(t, client, Heritage{}, indifferent{})
			for i := range uint64(events) {
				e := sample()
				e.ID = fmt.Appendf(nil, "event_%d", i)
				if err := chain.Publish(t.Context(), i, e); err != nil {
					t.Fatal(err)
				}
			}
			if err := chain.Drain(t.Context()); err != nil {
				t.Fatal(err)
			}
			nameless, subjects := 0, map[string]bool{}
			for got := 0; got < events; {
				subject := (<-acks).Subject
				to, ok := parseReply(chain.inbox, subject)
				if !ok {
					continue // of another request
				}
				got++
				subjects[subject] = true
				if !to.named {
					nameless++
				}
			}
			alone := len(subjects) // events with a subject of their own
			if nameless > 0 {
				alone--
			}
			if alone != events-nameless || alone == 0 || c.replicas > 1 && nameless > 0 || c.replicas == 1 && nameless < events/2 {
				t.Errorf("acks came on %d subjects, %d of them on that of all", len(subjects), nameless)
			}
			if err := stop(); !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
		})
	}
}

// settled notes what becomes of the events.
type settled struct {
	indifferent
	mu               sync.Mutex
	stored, rejected []uint64
}

func (s *settled) Stored(index, _ uint64, _ bool, _ *event.Event, _, _ time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stored = append(s.stored, index)
}

func (s *settled) Rejected(_ context.Context, index uint64, _ *event.Event, _ string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rejected = append(s.rejected, index)
	return nil
}

// What the stream refuses for good is left behind, and nothing else is: the answers
// name no event at first.
func TestTheRefusedEventIsFound(t *testing.T) {
	server := testenv.NATS(t, testenv.NATSOptions{})
	client := connectTo(t, chainConfig(server.URL(), 1))
	outcomes := &settled{}
	chain, stop := runChain(t, client, Heritage{}, outcomes)

	// The limit is lowered behind the chain's back, so that the server finds them.
	js := admin(t, server)
	info, err := js.Stream(t.Context(), owner.Name)
	if err != nil {
		t.Fatal(err)
	}
	config := info.CachedInfo().Config
	config.MaxMsgSize = 2000
	if _, err := js.UpdateStream(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	tooLarge := []uint64{7, 8, 31}
	var want []uint64
	for i := range uint64(50) {
		e := sample()
		e.ID = fmt.Appendf(nil, "event_%d", i)
		if slices.Contains(tooLarge, i) {
			e.Payload = fmt.Appendf(nil, `"%03000d"`, i)
		} else {
			want = append(want, i)
		}
		var rejection *RejectedError
		err := chain.Publish(t.Context(), i, e)
		if errors.As(err, &rejection) { // the chain knows the limit by now
			if err := outcomes.Rejected(t.Context(), i, e, ""); err != nil {
				t.Fatal(err)
			}
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := chain.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := stop(); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if !slices.Equal(outcomes.stored, want) || !slices.Equal(outcomes.rejected, tooLarge) {
		t.Errorf("stored %v, rejected %v; want %v and %v", outcomes.stored, outcomes.rejected, want, tooLarge)
	}
	for i, index := range want {
		if id, err := client.MessageID(t.Context(), owner.Name, uint64(i+1)); err != nil || id != fmt.Sprint("event_", index) {
			t.Errorf("message %d is %s, want event %d (%v)", i+1, id, index, err)
		}
	}
}

// Answers that name no event: what they tell of the copies in the window.
func TestNamelessAnswers(t *testing.T) {
	const (
		refusal   = `{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 13"},"stream":"EVENTS","seq":0}`
		elsewhere = `{"stream":"OTHERS","seq":12}`
		duplicate = `{"stream":"EVENTS","seq":12,"duplicate":true}`
	)
	good := func(sequence int) string { return fmt.Sprintf(`{"stream":"EVENTS","seq":%d}`, 10+sequence) }
	server := testenv.NATS(t, testenv.NATSOptions{})
	client := connectTo(t, chainConfig(server.URL(), 1))
	stream, err := client.OpenStream(t.Context(), client.config.Stream)
	if err != nil {
		t.Fatal(err)
	}
	stream.Last = 10
	for _, c := range []struct {
		name       string
		answers    []string // to three events, which are to be stored at 11, 12 and 13
		settled    uint64
		unanswered int
		doubtful   int
		broken     Reason
	}{
		{name: "none", unanswered: 3},
		{name: "all are stored", answers: []string{good(1), good(2), good(3)}, settled: 3},
		{name: "out of turn", answers: []string{good(3), good(1)}, settled: 1, unanswered: 1},
		{name: "all are refused", answers: []string{refusal, refusal, refusal}, broken: OutOfOrder},
		{name: "one is refused, and some are unanswered", answers: []string{good(1), refusal}, settled: 1, unanswered: 2, doubtful: 2, broken: OutOfOrder},
		{name: "one is refused, the others stored", answers: []string{good(1), refusal, good(3)}, settled: 1, broken: OutOfOrder},
		{name: "one is refused, before the others are stored", answers: []string{refusal, good(2), good(3)}, broken: OutOfOrder},
		{name: "a duplicate, where another is expected", answers: []string{good(1), duplicate}, settled: 1, unanswered: 2, doubtful: 2, broken: Duplicate},
		{name: "stored where none is expected", answers: []string{good(4)}, unanswered: 3, doubtful: 3, broken: Duplicate},
		{name: "stored before any is expected", answers: []string{good(-5)}, unanswered: 3, doubtful: 3, broken: Duplicate},
		{name: "another stream's counts for no copy", answers: []string{elsewhere, good(1), good(2)}, settled: 2, unanswered: 1, doubtful: 1, broken: Misrouted},
		{name: "no answer of a stream", answers: []string{""}, unanswered: 3, broken: Unanswered},
	} {
		t.Run(c.name, func(t *testing.T) {
			chain := client.NewChain(Origin{Stream: stream, Message: client.config.Message}, indifferent{})
			chain.broken = nil
			for i := range uint64(3) {
				chain.mu.Lock()
				e := sample()
				chain.place(chain.append(i, e, e.Size()), time.Now())
				chain.mu.Unlock()
			}
			for _, answer := range c.answers {
				chain.answer(&nats.Msg{Subject: chain.inbox + "0", Data: []byte(answer)})
			}
			r := resyncer{Chain: chain}
			r.mu.Lock()
			defer r.mu.Unlock()
			doubtful, copies := 0, 0
			for n, event := range r.candidates() {
				copies += r.at(r.head + uint64(n)).copies
				if event.doubtful {
					doubtful++
				}
			}
			if chain.head != c.settled || chain.unanswered != c.unanswered || copies != c.unanswered || doubtful != c.doubtful {
				t.Errorf("%d settled, %d unanswered, %d copies, %d doubtful; want %d, %d, %d", chain.head, chain.unanswered, copies, doubtful,
					c.settled, c.unanswered, c.doubtful)
			}
			if chain.broken == nil != (c.broken == "") || c.broken != "" && reasonOf(chain.broken) != c.broken {
				t.Errorf("broken: %v, want %q", chain.broken, c.broken)
			}
		})
	}
}

// Answers to copies that were sent again meanwhile. A good one names its event, by its
// sequence if by nothing else, and that event's message; a refusal without a name may be
// that of any of them, until all are answered.
func TestLateAnswers(t *testing.T) {
	const refusal = `{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 1"},"stream":"EVENTS","seq":0}`
	server := testenv.NATS(t, testenv.NATSOptions{})
	client := connectTo(t, chainConfig(server.URL(), 1))
	stream, err := client.OpenStream(t.Context(), client.config.Stream)
	if err != nil {
		t.Fatal(err)
	}
	var r resyncer
	answer := func(to reply, data string) {
		t.Helper()
		r.heard = time.Time{}
		r.answer(&nats.Msg{Subject: string(to.append(nil, r.inbox)), Data: []byte(data)})
		if r.heard.IsZero() {
			t.Error("an answer was not heard")
		}
	}
	good := func(sequence int) string { return fmt.Sprintf(`{"stream":"EVENTS","seq":%d}`, sequence) }
	require := func(what string, maybe, doubtful string) {
		t.Helper()
		var gotMaybe, gotDoubtful string
		sign := map[bool]string{true: "+", false: "-"}
		for _, c := range r.candidates() {
			gotMaybe += sign[c.maybe]
			gotDoubtful += sign[c.doubtful]
		}
		if gotMaybe != maybe || gotDoubtful != doubtful {
			t.Errorf("%s: maybe stored %s, in doubt %s; want %s, %s", what, gotMaybe, gotDoubtful, maybe, doubtful)
		}
	}
	sendAgain := func() (first, second reply) {
		r.generation++
		r.named, r.next = r.tail, r.last
		first, _ = r.place(0, time.Now())
		second, _ = r.place(1, time.Now())
		return first, second
	}
	begin := func() (first, second reply) { // a window of two events, to be stored at 1 and 2
		r = resyncer{Chain: client.NewChain(Origin{Stream: stream, Message: client.config.Message}, indifferent{})}
		r.broken = nil
		first, _ = r.place(r.append(0, sample(), sample().Size()), time.Now())
		second, _ = r.place(r.append(1, sample(), sample().Size()), time.Now())
		return first, second
	}

	nameless, _ := begin()
	require("sent", "++", "--")
	first, second := sendAgain()
	answer(nameless, refusal)
	require("sent again, and one of the first copies was refused", "++", "--")
	answer(first, refusal)
	answer(second, refusal)
	require("the second copies were refused, too", "++", "++")
	answer(nameless, refusal)
	require("all copies were refused", "--", "--")

	nameless, _ = begin()
	first, second = sendAgain()
	answer(first, refusal)
	answer(second, refusal)
	answer(nameless, refusal)
	require("one of two unnamed was refused", "++", "++")
	answer(nameless, good(2))
	require("the other one was stored", "--", "--")
	sendAgain()
	if tail := r.unknown([]message{{sequence: 1, gone: true}, {sequence: 2, gone: true}}); !tail[0].gone || tail[1].gone {
		t.Errorf("the message at 2 alone is the second event's: %+v", tail)
	}
	r.last = 2
	sendAgain()
	if r.at(1).twin != 0 {
		t.Error("a message that was accounted for is still to be looked for")
	}

	begin()
	first, _ = sendAgain()
	sendAgain()
	answer(first, good(1))
	if tail := r.unknown([]message{{sequence: 1, gone: true}}); tail[0].gone || tail[0].id != string(sample().ID) {
		t.Errorf("message 1 is not the event's: %+v", tail[0])
	}
}

// A stream that is changed under a running chain into one that keeps nothing, and
// acknowledges all the same, ends it.
func TestStreamMadeUnfit(t *testing.T) {
	server := testenv.NATS(t, testenv.NATSOptions{})
	client := connectTo(t, chainConfig(server.URL(), 1))
	stream, err := client.OpenStream(t.Context(), client.config.Stream)
	if err != nil {
		t.Fatal(err)
	}
	chain := client.NewChain(Origin{Stream: stream, Message: client.config.Message}, indifferent{})
	chain.lookEvery = 10 * time.Millisecond
	ended := make(chan error, 1)
	go func() { ended <- chain.Run(t.Context()) }()
	if err := chain.Publish(t.Context(), 0, sample()); err != nil {
		t.Fatal(err)
	}
	if err := chain.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	js := admin(t, server)
	s, err := js.Stream(t.Context(), owner.Name)
	if err != nil {
		t.Fatal(err)
	}
	config := s.CachedInfo().Config
	config.Retention = jetstream.InterestPolicy
	if _, err := js.UpdateStream(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, ErrStream) {
		t.Errorf("the chain ended with %v", err)
	}
}

// A stream of the same name in another JetStream domain takes the same messages, by way
// of a leaf node. Its answers are not the stream's.
func TestAnswersOfAnotherDomain(t *testing.T) {
	port := testenv.FreePort(t)
	hub := testenv.NATS(t, testenv.NATSOptions{Edit: func(o *server.Options) {
		o.ServerName, o.JetStreamDomain = "hub", "hub"
		o.LeafNode.Host, o.LeafNode.Port = "127.0.0.1", port
	}})
	leaf := testenv.NATS(t, testenv.NATSOptions{Edit: func(o *server.Options) {
		o.ServerName, o.JetStreamDomain = "leaf", "leaf"
		o.LeafNode.Remotes = []*server.RemoteLeafOpts{{URLs: []*url.URL{{Scheme: "nats", Host: fmt.Sprintf("127.0.0.1:%d", port)}}}}
	}})
	other := connectTo(t, chainConfig(hub.URL(), 1))
	elsewhere, err := other.OpenStream(t.Context(), other.config.Stream)
	if err != nil {
		t.Fatal(err)
	}
	client := connectTo(t, chainConfig(leaf.URL(), 1))
	stream, err := client.OpenStream(t.Context(), client.config.Stream)
	if err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, "the hub's stream to take what is published at the leaf", func() bool {
		answer, err := client.nc.Request("events.order.placed", nil, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if elsewhere, err = other.OpenStream(t.Context(), other.config.Stream); err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(answer.Data), "EVENTS") && elsewhere.Last > 0
	})
	// Both end at the same sequence, so that each takes the next event.
	if err := admin(t, leaf).DeleteStream(t.Context(), owner.Name); err != nil {
		t.Fatal(err)
	}
	stream.Last = elsewhere.Last
	chain := client.NewChain(Origin{Stream: stream, Message: client.config.Message}, indifferent{})
	ended := make(chan error, 1)
	go func() { ended <- chain.Run(t.Context()) }()
	if err := chain.Publish(t.Context(), 0, sample()); err != nil {
		t.Fatal(err)
	}
	chain.Flush()
	if err := <-ended; !errors.Is(err, ErrNoStream) || chain.Settled() != 0 {
		t.Errorf("the chain ended with %v, and has settled %d events", err, chain.Settled())
	}
	if elsewhere, err = other.OpenStream(t.Context(), other.config.Stream); err != nil || elsewhere.Last != stream.Last+1 {
		t.Errorf("the other stream has not taken the event: %+v, %v", elsewhere, err)
	}
}
