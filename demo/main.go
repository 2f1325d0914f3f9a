// Command demo shows the relay's main job on a machine where nothing else runs:
// the services of examples/orders, which are a shop and its two consumers, on a
// throw-away Postgres and an embedded NATS server, and the relay between them. In
// the rush hour the relay is killed.
//
// It ends by itself, also on Ctrl-C, and leaves only the cache of Postgres's
// binaries, where it had to fetch them. Exit code 0: every event was checked;
// 1: something is wrong, and said; 130: interrupted.
//
// With arguments it is only the two servers, for as long as the command runs that
// these are: `go run ./demo bash` gives a shell in which OUTBOX_POSTGRES_URL,
// OUTBOX_NATS_URL and NATS_URL lead to them.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"outbox-relay/internal/wait"
)

const (
	evenOrders = 300 // placed one by one, for the latency
	evenPace   = 5 * time.Millisecond
	clerks     = 8   // of the rush hour
	rushOrders = 750 // of each
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	out := newPrinter(os.Stdout)
	err := run(ctx, out, os.Args[1:])
	switch {
	case ctx.Err() != nil:
		out.line("", "interrupted: everything is stopped and removed")
		os.Exit(130)
	case err != nil:
		out.bad("%v", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out *printer, command []string) (err error) {
	if len(command) == 0 {
		out.title("outbox-relay: a shop changes its database and tells the world in one step")
	}
	s, err := startServers(ctx, out)
	defer func() { err = errors.Join(err, s.close()) }()
	switch {
	case err != nil:
		return err
	case len(command) > 0:
		return s.lend(ctx, out, command)
	}
	return show(ctx, out, s)
}

// show is the demo.
func show(ctx context.Context, out *printer, s *servers) error {
	if err := s.prepare(ctx, out); err != nil {
		return err
	}
	shop, err := openShop(ctx, s)
	if err != nil {
		return err
	}
	defer shop.close()
	relay, err := s.startRelay(ctx)
	if err != nil {
		return err
	}
	out.step("relay", "streams from Postgres to JetStream (process %d)", relay.Pid())
	consumers, err := openConsumers(ctx, s)
	if err != nil {
		return err
	}
	out.step("services", "examples/orders: shop, inventory, email")

	if err := showOrders(ctx, out, shop, consumers); err != nil {
		return err
	}
	if err := showLatency(ctx, out, shop, consumers); err != nil {
		return err
	}
	if err := showRush(ctx, out, s, relay, shop, consumers); err != nil {
		return err
	}
	return audit(ctx, out, s, shop)
}

// showOrders places a few orders one by one, and shows what becomes of each.
func showOrders(ctx context.Context, out *printer, shop *shop, consumers []*consumer) error {
	out.title("Each order is one transaction with its event")
	for i, o := range []order{
		{"Ada", products[0], 2},
		{"Ben", products[1], 1},
		{"Eve", rare, 5},
		{"Cem", products[2], 1},
		{"Dai", products[0], 3},
	} {
		r, err := shop.place(ctx, o)
		if err != nil && !errors.Is(err, errSoldOut) {
			return err
		}
		out.step(fmt.Sprintf("order %d", i+1), "%s: %d × %s", o.Customer, o.Quantity, o.Product)
		if err != nil {
			out.detail("sold out", "rolled back, event and all: nobody will hear of it")
			continue
		}
		for _, c := range consumers {
			did, took, err := c.await(ctx, r)
			if err != nil {
				return err
			}
			out.detail(c.service, "%-44s %6.1f ms after the commit", did, took)
		}
		if err := wait.For(ctx, 300*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// showLatency places orders at an even pace.
func showLatency(ctx context.Context, out *printer, shop *shop, consumers []*consumer) error {
	out.title(fmt.Sprintf("%d more, one every %s", evenOrders, evenPace))
	tick := time.NewTicker(evenPace)
	defer tick.Stop()
	var first, last receipt
	for n := range evenOrders {
		var err error
		if last, err = shop.place(ctx, order{"Fay", products[1], 1}); err != nil {
			return err
		}
		if n == 0 {
			first = last
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	for _, c := range consumers {
		if err := c.awaitAll(ctx, shop); err != nil {
			return err
		}
		took, err := c.times(ctx, first, last)
		if err != nil {
			return err
		}
		out.step(c.service, "from the order's commit to its own: half within %.1f ms, 99 of 100 within %.1f ms", took[0], took[1])
	}
	return nil
}

// showRush lets many clerks place orders at once, and kills the relay meanwhile.
func showRush(ctx context.Context, out *printer, s *servers, relay *program, shop *shop, consumers []*consumer) error {
	out.title(fmt.Sprintf("Rush hour: %d clerks place %d orders, and the relay is killed", clerks, clerks*rushOrders))
	began := time.Now()
	done := make(chan error, 1)
	go func() { done <- shop.rush(ctx, clerks, rushOrders) }()
	if err := s.awaitStored(ctx, evenOrders+clerks*rushOrders/3); err != nil {
		return errors.Join(err, <-done)
	}
	relay.kill()
	stored, err := s.stored(ctx)
	if err != nil {
		return errors.Join(err, <-done)
	}
	out.step("kill -9", "with %d events in the stream, of %d committed", stored, shop.ledger.len())
	if relay, err = s.startRelay(ctx); err != nil {
		return errors.Join(err, <-done)
	}
	out.step("relay", "a new one (process %d) looks what the stream has, and goes on behind it", relay.Pid())
	if err := <-done; err != nil {
		return err
	}
	placed := time.Since(began)
	if err := s.awaitStored(ctx, uint64(shop.ledger.len())); err != nil {
		return err
	}
	out.step("stream", "has every order %.1f s after the first, and %.0f ms after the last", time.Since(began).Seconds(), milliseconds(time.Since(began)-placed))
	for _, c := range consumers {
		if err := c.awaitAll(ctx, shop); err != nil {
			return err
		}
	}
	took := time.Since(began)
	out.step("consumers", "both have handled every order after %.1f s: %.0f orders/s", took.Seconds(), float64(clerks*rushOrders)/took.Seconds())
	return nil
}
