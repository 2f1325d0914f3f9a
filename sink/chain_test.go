package sink

import (
	"context"
	"testing"
	"time"

	"outbox-relay/internal/testenv"
	"outbox-relay/outbox"
)

// indifferent takes every outcome.
type indifferent struct{}

func (indifferent) Stored(uint64, uint64, bool, *outbox.Event, time.Time)         {}
func (indifferent) Rejected(context.Context, uint64, *outbox.Event, string) error { return nil }
func (indifferent) Foreign(context.Context, int) error                            { return nil }
func (indifferent) Resync(error)                                                  {}

// runChain runs a chain behind the stream's last message until the function that
// it returns is called, which waits for its end.
func runChain(t *testing.T, c *Client) (chain *Chain, stop func() error) {
	t.Helper()
	stream, err := c.OpenStream(t.Context(), c.config.Stream)
	if err != nil {
		t.Fatal(err)
	}
	chain = c.NewChain(stream, false, indifferent{})
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

	first, stop := runChain(t, client)
	e := event()
	e.ID = []byte("unwritten")
	if err := first.Publish(t.Context(), 0, e); err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != context.Canceled {
		t.Fatal(err)
	}

	second, stop := runChain(t, client)
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
