package sink

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
	"outbox-relay/outbox"
)

// indifferent takes every outcome.
type indifferent struct{}

func (indifferent) Stored(uint64, uint64, bool, *outbox.Event, time.Time, time.Time) {}
func (indifferent) Rejected(context.Context, uint64, *outbox.Event, string) error    { return nil }
func (indifferent) Foreign(context.Context, int) error                               { return nil }
func (indifferent) Resync(Reason)                                                    {}

// runChain runs a chain behind the stream's last message until the function that
// it returns is called, which waits for its end.
func runChain(t testing.TB, c *Client, heritage Heritage) (chain *Chain, stop func() error) {
	t.Helper()
	stream, err := c.OpenStream(t.Context(), c.config.Stream)
	if err != nil {
		t.Fatal(err)
	}
	chain = c.NewChain(Origin{Stream: stream, Message: c.config.Message, Heritage: heritage}, indifferent{})
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
	config := Config{Servers: []string{server.URL()}, Stream: owner, MaxInflight: 100, MaxBytes: 1 << 20,
		Message: MessageConfig{Subject: []Token{{Literal: "events"}, {Column: "aggregate_type"}, {Column: "event_type"}}}}
	config.Stream.Create = true
	client := connectTo(t, config)

	first, stop := runChain(t, client, Heritage{})
	e := event()
	e.ID = []byte("unwritten")
	if err := first.Publish(t.Context(), 0, e); err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != context.Canceled {
		t.Fatal(err)
	}

	second, stop := runChain(t, client, Heritage{})
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
			config := Config{Servers: []string{server.URL()}, Stream: owner, MaxInflight: 100, MaxBytes: 1 << 20,
				Message: MessageConfig{Subject: []Token{{Literal: "events"}, {Column: "aggregate_type"}, {Column: "event_type"}}}}
			config.Stream.Create = true
			client := connectTo(t, config)
			chain, stop := runChain(t, client, c.heritage)

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
			e := event()
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
