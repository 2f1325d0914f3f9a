package main

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go/jetstream"
)

// consumer is a service that listens to the shop. It can get a message again, and
// does its work once for each id.
type consumer struct {
	name string
	did  func(order) string // what it says of an order
	work func(ctx context.Context, id string, e event) error
	done func() // when it stops

	consuming jetstream.ConsumeContext
	mu        sync.Mutex
	got       map[string]time.Time // by event id: when it first came
	changed   chan struct{}        // closed and replaced by each one, and by a failure
	failed    error
}

// event is the payload.
type event struct {
	Order    int64  `json:"order"`
	Customer string `json:"customer"`
	Product  string `json:"product"`
	Quantity int    `json:"quantity"`
}

func openConsumers(ctx context.Context, s *servers, shop *shop) (inventory, mail *consumer, err error) {
	conn, err := pgx.Connect(ctx, shop.url)
	if err != nil {
		return nil, nil, err
	}
	inventory = &consumer{name: "inventory", work: reserve(conn), done: func() { _ = conn.Close(context.Background()) }, did: func(o order) string {
		return fmt.Sprintf("reserves %d × %s", o.quantity, o.product)
	}}
	mail = &consumer{name: "e-mail", work: func(context.Context, string, event) error { return nil }, done: func() {}, did: func(o order) string {
		return fmt.Sprintf("thanks %s for %d × %s", o.customer, o.quantity, o.product)
	}}
	for _, c := range []*consumer{inventory, mail} {
		if err := c.start(ctx, s.js); err != nil {
			return nil, nil, fmt.Errorf("start consumer %s: %w", c.name, err)
		}
	}
	return inventory, mail, nil
}

// reserve takes what was ordered from the stock. The event's id stands in the
// same transaction: a second time changes nothing.
func reserve(conn *pgx.Conn) func(context.Context, string, event) error {
	return func(ctx context.Context, id string, e event) error {
		_, err := conn.Exec(ctx, `with new as (
				insert into reservations values ($1, $2, $3) on conflict do nothing returning product, quantity)
			update stock set count = count - new.quantity from new where stock.product = new.product`, id, e.Product, e.Quantity)
		return err
	}
}

func (c *consumer) start(ctx context.Context, js jetstream.JetStream) error {
	c.got, c.changed = map[string]time.Time{}, make(chan struct{})
	durable, err := js.CreateConsumer(ctx, stream, jetstream.ConsumerConfig{
		Durable: c.name, FilterSubject: "events.order.>", AckPolicy: jetstream.AckExplicitPolicy})
	if err != nil {
		return err
	}
	c.consuming, err = durable.Consume(func(m jetstream.Msg) { c.take(ctx, m) })
	return err
}

func (c *consumer) stop() {
	c.consuming.Stop()
	<-c.consuming.Closed()
	c.done()
}

// count is how many events have come, each counted once.
func (c *consumer) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.got)
}

func (c *consumer) take(ctx context.Context, m jetstream.Msg) {
	at := time.Now()
	id := m.Headers().Get("Nats-Msg-Id")
	var e event
	err := json.Unmarshal(m.Data(), &e)
	if err == nil {
		err = c.work(ctx, id, e)
	}
	if err == nil {
		err = m.Ack()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.failed = fmt.Errorf("%s: event %s: %w", c.name, id, err)
	} else if _, again := c.got[id]; !again {
		c.got[id] = at
	}
	close(c.changed)
	c.changed = make(chan struct{})
}

// await waits for an event and returns when it came.
func (c *consumer) await(ctx context.Context, id string) (time.Time, error) {
	var at time.Time
	err := c.until(ctx, "event "+id, func() (there bool) {
		at, there = c.got[id]
		return there
	})
	return at, err
}

// awaitAll waits for as many events as the shop has committed.
func (c *consumer) awaitAll(ctx context.Context, shop *shop) error {
	return c.until(ctx, "all events", func() bool { return len(c.got) >= shop.ledger.len() })
}

func (c *consumer) until(ctx context.Context, what string, done func() bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, fmt.Errorf("%s waited a minute in vain for %s", c.name, what))
	defer cancel()
	for {
		c.mu.Lock()
		enough, failed, changed := done(), c.failed, c.changed
		c.mu.Unlock()
		if enough || failed != nil {
			return failed
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-changed:
		}
	}
}
