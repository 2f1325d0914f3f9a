package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/jackc/pgx/v5"

	"outbox-relay-examples/orders/inbox"
)

// placed is what the consumers need of an order.
type placed struct {
	Order    int64
	Customer string
	Product  string
	Quantity int
}

func read(e inbox.Event) (p placed, err error) {
	if err := json.Unmarshal(e.Data, &p); err != nil {
		return p, fmt.Errorf("%w: %w", inbox.ErrMalformed, err)
	}
	if p.Order == 0 || p.Customer == "" || p.Product == "" || p.Quantity < 1 {
		return p, fmt.Errorf("%w: order, customer, product or quantity is missing", inbox.ErrMalformed)
	}
	return p, nil
}

// pack takes what was ordered off the shelf, into a parcel.
func pack(ctx context.Context, tx pgx.Tx, e inbox.Event) error {
	p, err := read(e)
	if err != nil {
		return err
	}
	taken, err := tx.Exec(ctx, `update shelf set count = count - $2 where product = $1`, p.Product, p.Quantity)
	if err != nil {
		return err
	}
	if taken.RowsAffected() == 0 {
		return fmt.Errorf("no shelf has a %s: put one up", p.Product) // until then the event comes again
	}
	_, err = tx.Exec(ctx, `insert into parcels (order_id, product, quantity) values ($1, $2, $3)`, p.Order, p.Product, p.Quantity)
	return err
}

// thank writes a mail. What sends it, reads the table: sending cannot be rolled
// back, so it has no place in this transaction.
func thank(ctx context.Context, tx pgx.Tx, e inbox.Event) error {
	p, err := read(e)
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `insert into mails (order_id, recipient, body) values ($1, $2, $3)`,
		p.Order, p.Customer, fmt.Sprintf("Thank you, %s: %d × %s", p.Customer, p.Quantity, p.Product))
	return err
}
