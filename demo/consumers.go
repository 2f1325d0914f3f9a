package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// consumer is a service of examples/orders that listens to the shop. What it did
// is told by its tables.
type consumer struct {
	*program
	sql     *pgx.Conn
	service string // its name in the inbox, too
	effect  string // SQL: what it did for order $1, in words
}

func openConsumers(ctx context.Context, s *servers) (consumers []*consumer, err error) {
	for _, c := range []*consumer{
		{service: "inventory", effect: `select format('packs %s × %s', quantity, product) from parcels where order_id = $1`},
		{service: "email", effect: `select format('writes "%s"', body) from mails where order_id = $1`},
	} {
		c.sql = s.sql
		if c.program, err = s.startOrders(ctx, c.service, "consuming"); err != nil {
			return nil, err
		}
		consumers = append(consumers, c)
	}
	return consumers, nil
}

// await waits until the consumer has committed its work for an order. It returns
// what that was, and the milliseconds since the order's own commit.
func (c *consumer) await(ctx context.Context, r receipt) (did string, took float64, err error) {
	err = c.until(ctx, time.Millisecond, fmt.Sprintf("order %d", r.Order), `select count(*) = 1 from inbox where consumer = $1 and event_id = $2`, c.service, r.Event)
	if err != nil {
		return "", 0, err
	}
	if err := c.sql.QueryRow(ctx, c.effect, r.Order).Scan(&did); err != nil {
		return "", 0, err
	}
	times, err := c.times(ctx, r, r)
	return did, times[0], err
}

// awaitAll waits for as many events as the shop has committed.
func (c *consumer) awaitAll(ctx context.Context, shop *shop) error {
	return c.until(ctx, 20*time.Millisecond, "all orders", `select count(*) >= $2 from inbox where consumer = $1`, c.service, shop.ledger.len())
}

// times returns the median and the 99th percentile of the milliseconds from the
// commits of the orders from first to last to the commits of the consumer.
func (c *consumer) times(ctx context.Context, first, last receipt) (times [2]float64, err error) {
	err = c.sql.QueryRow(ctx, `select percentile_disc(0.5) within group (order by ms), percentile_disc(0.99) within group (order by ms)
		from (select 1000 * extract(epoch from pg_xact_commit_timestamp(i.xmin) - pg_xact_commit_timestamp(o.xmin))::float8 as ms
			from orders as o join events as e on e.aggregate_id = o.id::text join inbox as i on i.event_id = e.id and i.consumer = $1
			where o.id between $2 and $3) as took`,
		c.service, first.Order, last.Order).Scan(&times[0], &times[1])
	return times, err
}

// until asks again and again, at that pace, until Postgres says yes.
func (c *consumer) until(ctx context.Context, pace time.Duration, what, question string, args ...any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, fmt.Errorf("%s waited a minute in vain for %s", c.name, what))
	defer cancel()
	for {
		var yes bool
		err := c.sql.QueryRow(ctx, question, args...).Scan(&yes)
		if ctx.Err() != nil {
			return errors.Join(context.Cause(ctx), err)
		}
		if err != nil || yes {
			return err
		}
		select {
		case <-c.Done():
			return c.ended()
		case <-ctx.Done():
		case <-time.After(pace):
		}
	}
}
