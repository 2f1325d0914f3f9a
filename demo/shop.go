package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

var products = []string{"espresso cup", "tea pot", "coffee mill"}

const stock = 1_000_000 // of each product, at first

// shop is the application: its orders, and the database that they stand in.
type shop struct {
	url     string
	counter *pgx.Conn // where single orders are placed
	ledger  *ledger
}

// order is what a customer wants.
type order struct {
	customer, product string
	quantity          int
	declined          bool // by the bank, when all is written: the shop rolls back
}

// placed is a committed order.
type placed struct {
	event string    // id
	at    time.Time // when the commit was sent
}

// openShop makes the tables of the shop, and those of its consumers.
func openShop(ctx context.Context, s *servers) (*shop, error) {
	shop := &shop{url: s.postgres.URL("postgres"), ledger: newLedger()}
	var err error
	if shop.counter, err = pgx.Connect(ctx, shop.url); err != nil {
		return nil, err
	}
	_, err = shop.counter.Exec(ctx, fmt.Sprintf(`
		create table orders (id bigint generated always as identity primary key, customer text, product text, quantity int);
		create table stock (product text primary key, count int);
		create table reservations (event_id text primary key, product text, quantity int);
		insert into stock select unnest(array['%s']), %d`, strings.Join(products, "', '"), stock))
	return shop, err
}

func (s *shop) close() { _ = s.counter.Close(context.Background()) }

// place writes the order and its event in one transaction: both or neither.
func (s *shop) place(ctx context.Context, conn *pgx.Conn, o order) (placed, error) {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return placed{}, err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	var id int64
	err = tx.QueryRow(ctx, `insert into orders (customer, product, quantity) values ($1, $2, $3) returning id`,
		o.customer, o.product, o.quantity).Scan(&id)
	if err != nil {
		return placed{}, err
	}
	var p placed
	var payload string
	err = tx.QueryRow(ctx, `insert into events (aggregate_type, aggregate_id, event_type, payload)
		values ('order', $1::bigint::text, 'placed', jsonb_build_object('order', $1::bigint, 'customer', $2::text, 'product', $3::text, 'quantity', $4::int))
		returning id, payload::text`, id, o.customer, o.product, o.quantity).Scan(&p.event, &payload)
	if err != nil || o.declined {
		return p, err
	}
	p.at = time.Now()
	if err := tx.Commit(ctx); err != nil {
		return p, err
	}
	s.ledger.add(p.event, payload)
	return p, nil
}

// rush lets clerks place that many orders each, at once.
func (s *shop) rush(ctx context.Context, clerks, orders int) error {
	group, ctx := errgroup.WithContext(ctx)
	for clerk := range clerks {
		group.Go(func() error {
			conn, err := pgx.Connect(ctx, s.url)
			if err != nil {
				return err
			}
			defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
			for n := range orders {
				o := order{customer: fmt.Sprintf("customer %d of clerk %d", n, clerk), product: products[n%len(products)], quantity: 1 + n%3}
				if n%50 == 49 { // beside the others
					o.declined = true
					if _, err := s.place(ctx, conn, o); err != nil {
						return err
					}
					o.declined = false
				}
				if _, err := s.place(ctx, conn, o); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// ledger is what the shop knows to be committed. Safe for concurrent use.
type ledger struct {
	mu       sync.Mutex
	payloads map[string]string // by event id
}

func newLedger() *ledger { return &ledger{payloads: map[string]string{}} }

func (l *ledger) add(event, payload string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.payloads[event] = payload
}

func (l *ledger) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.payloads)
}
