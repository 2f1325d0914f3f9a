package sink

import (
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

// noting keeps why the chain broke.
type noting struct {
	indifferent
	reasons chan Reason
}

func (n *noting) Resync(reason Reason) {
	select {
	case n.reasons <- reason:
	default: // only the first one is asked for
	}
}

// broker is a server with the relay's stream, and who meddles with it.
type broker struct {
	*testing.T
	server *testenv.NATSServer
	js     jetstream.JetStream
}

func (b *broker) must(err error) {
	if err != nil {
		b.Helper()
		b.Fatal(err)
	}
}

func (b *broker) deleteStream() {
	b.Helper()
	b.must(b.js.DeleteStream(b.Context(), owner.Name))
}

func TestReasons(t *testing.T) {
	events := map[Reason]uint64{Disconnected: 0, Duplicate: 2, Unanswered: 1, OutOfOrder: 1, Refused: 1, Misrouted: 1}
	for want, meddle := range map[Reason]func(b *broker){
		Disconnected: func(b *broker) { b.server.Stop() },
		Unanswered:   func(b *broker) { b.deleteStream() },
		OutOfOrder:   func(b *broker) { _, err := b.js.Publish(b.Context(), "events.of.others", nil); b.must(err) },
		Duplicate:    func(*broker) {}, // the event is published twice
		Refused: func(b *broker) {
			stream, err := b.js.Stream(b.Context(), owner.Name)
			b.must(err)
			config := stream.CachedInfo().Config
			config.MaxMsgSize = 1
			_, err = b.js.UpdateStream(b.Context(), config)
			b.must(err)
		},
		Misrouted: func(b *broker) {
			b.deleteStream()
			_, err := b.js.CreateStream(b.Context(), jetstream.StreamConfig{Name: "OTHER", Subjects: []string{owner.Subjects}})
			b.must(err)
		},
	} {
		t.Run(string(want), func(t *testing.T) {
			server := testenv.NATS(t, testenv.NATSOptions{})
			client := connectTo(t, chainConfig(server.URL(), 1))
			outcomes := &noting{reasons: make(chan Reason, 1)}
			chain, stop := runChain(t, client, Heritage{}, outcomes)
			testenv.Eventually(t, "the chain to begin", func() bool { return chain.Broken() == nil })

			b := &broker{T: t, server: server}
			var err error
			b.js, err = jetstream.New(client.nc)
			b.must(err)
			meddle(b)
			for i := range events[want] {
				b.must(chain.Publish(t.Context(), i, sample()))
			}
			chain.Flush()
			if got := <-outcomes.reasons; got != want {
				t.Errorf("the chain broke for %s", got)
			}
			_ = stop() // the chain's end is not what is looked at
		})
	}
	if len(Reasons) != len(events) {
		t.Errorf("there are %d reasons", len(Reasons))
	}
}
