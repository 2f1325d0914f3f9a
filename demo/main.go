// Command demo shows the relay's main job on a machine where nothing else runs:
// a shop that places orders in a throw-away Postgres, the relay, an embedded NATS
// server, and two consumers. In the rush hour the relay is killed.
//
// It ends by itself, also on Ctrl-C, and leaves only the cache of Postgres's
// binaries, where it had to fetch them. Exit code 0: every event was checked;
// 1: something is wrong, and said; 130: interrupted.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

const (
	evenOrders = 300 // placed one by one, for the latency
	clerks     = 8   // of the rush hour
	rushOrders = 1250
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	out := newPrinter(os.Stdout)
	err := run(ctx, out)
	switch {
	case ctx.Err() != nil:
		out.line("", "interrupted: everything is stopped and removed")
		os.Exit(130)
	case err != nil:
		out.bad("%v", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out *printer) (err error) {
	out.title("outbox-relay: a shop changes its database and tells the world in one step")
	s, err := startServers(ctx, out)
	defer func() { err = errors.Join(err, s.close()) }()
	if err != nil {
		return err
	}
	shop, err := openShop(ctx, s)
	if err != nil {
		return err
	}
	defer shop.close()
	if err := s.startRelay(ctx); err != nil {
		return err
	}
	out.step("relay", "streams from Postgres to JetStream (process %d)", s.relay.Pid())
	inventory, mail, err := openConsumers(ctx, s, shop)
	if err != nil {
		return err
	}
	defer inventory.stop()
	defer mail.stop()

	if err := showOrders(ctx, out, shop, inventory, mail); err != nil {
		return err
	}
	if err := showLatency(ctx, out, shop, inventory, mail); err != nil {
		return err
	}
	if err := showRush(ctx, out, s, shop, inventory, mail); err != nil {
		return err
	}
	return audit(ctx, out, s, shop, inventory, mail)
}

// showOrders places a few orders one by one, and shows what becomes of each.
func showOrders(ctx context.Context, out *printer, shop *shop, consumers ...*consumer) error {
	out.title("Each order is one transaction with its event")
	for i, o := range []order{
		{customer: "Ada", product: products[0], quantity: 2},
		{customer: "Ben", product: products[1], quantity: 1},
		{customer: "Eve", product: products[2], quantity: 5, declined: true},
		{customer: "Cem", product: products[2], quantity: 1},
		{customer: "Dai", product: products[0], quantity: 3},
	} {
		placed, err := shop.place(ctx, shop.counter, o)
		if err != nil {
			return err
		}
		out.step(fmt.Sprintf("order %d", i+1), "%s: %d × %s", o.customer, o.quantity, o.product)
		if o.declined {
			out.detail("card declined", "rolled back, event and all: nobody will hear of it")
			continue
		}
		for _, c := range consumers {
			got, err := c.await(ctx, placed.event)
			if err != nil {
				return err
			}
			out.detail(c.name, "%-42s %6.1f ms after the commit", c.did(o), milliseconds(got.Sub(placed.at)))
		}
		if err := pause(ctx, 300*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// showLatency places orders at an even pace.
func showLatency(ctx context.Context, out *printer, shop *shop, consumers ...*consumer) error {
	out.title(fmt.Sprintf("%d more, one every 5 ms", evenOrders))
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	var orders []placed
	for range evenOrders {
		p, err := shop.place(ctx, shop.counter, order{customer: "Fay", product: products[1], quantity: 1})
		if err != nil {
			return err
		}
		orders = append(orders, p)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	for _, c := range consumers {
		var took []time.Duration
		for _, p := range orders {
			got, err := c.await(ctx, p.event)
			if err != nil {
				return err
			}
			took = append(took, got.Sub(p.at))
		}
		out.step(c.name, "from commit to consumer: half within %.1f ms, 99 of 100 within %.1f ms", percentile(took, 50), percentile(took, 99))
	}
	return nil
}

// showRush lets many clerks place orders at once, and kills the relay meanwhile.
func showRush(ctx context.Context, out *printer, s *servers, shop *shop, consumers ...*consumer) error {
	out.title(fmt.Sprintf("Rush hour: %d clerks place %d orders, and the relay is killed", clerks, clerks*rushOrders))
	began := time.Now()
	done := make(chan error, 1)
	go func() { done <- shop.rush(ctx, clerks, rushOrders) }()
	if err := s.awaitStored(ctx, uint64(clerks*rushOrders/3)); err != nil {
		return errors.Join(err, <-done)
	}
	s.killRelay()
	stored, committed, err := s.progress(ctx, shop)
	if err != nil {
		return errors.Join(err, <-done)
	}
	out.step("kill -9", "with %d events in the stream, of %d committed", stored, committed)
	if err := s.startRelay(ctx); err != nil {
		return errors.Join(err, <-done)
	}
	out.step("relay", "a new one (process %d) looks what the stream has, and goes on behind it", s.relay.Pid())
	if err := <-done; err != nil {
		return err
	}
	for _, c := range consumers {
		if err := c.awaitAll(ctx, shop); err != nil {
			return err
		}
	}
	took := time.Since(began)
	out.step("done", "every order has reached both consumers after %.1f s: %.0f orders/s", took.Seconds(), float64(clerks*rushOrders)/took.Seconds())
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
