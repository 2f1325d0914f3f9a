// Package shop takes orders.
package shop

import (
	"context"
	"errors"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// ErrSoldOut: the product's stock does not suffice, or it has none.
var ErrSoldOut = errors.New("sold out")

// Order is what a customer wants.
type Order struct {
	Customer string `json:"customer"`
	Product  string `json:"product"`
	Quantity int    `json:"quantity"` // at least 1
}

// OrderPlaced is the payload of the event.
type OrderPlaced struct {
	ID int64 `json:"order"`
	Order
}

// Receipt tells what was committed: the order's id and the event's.
type Receipt struct {
	Order int64  `json:"order"`
	Event string `json:"event"`
}

// Place writes the order, its event and the reservation in one transaction: all
// or nothing. Where the stock does not suffice, it is nothing: ErrSoldOut.
func Place(ctx context.Context, db *pgxpool.Pool, o Order) (r Receipt, err error) {
	err = pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		err := tx.QueryRow(ctx, `insert into orders (customer, product, quantity) values ($1, $2, $3) returning id`,
			o.Customer, o.Product, o.Quantity).Scan(&r.Order)
		if err != nil {
			return err
		}
		err = tx.QueryRow(ctx, `insert into events (aggregate_type, aggregate_id, event_type, payload)
			values ('order', $1, 'placed', $2) returning id`,
			strconv.FormatInt(r.Order, 10), OrderPlaced{r.Order, o}).Scan(&r.Event)
		if err != nil {
			return err
		}
		// Last, because here all orders for one product wait for each other.
		reserved, err := tx.Exec(ctx, `update stock set available = available - $2 where product = $1 and available >= $2`,
			o.Product, o.Quantity)
		if err == nil && reserved.RowsAffected() == 0 {
			err = ErrSoldOut
		}
		return err
	})
	return r, err
}
