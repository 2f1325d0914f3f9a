package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"

	"golang.org/x/sync/errgroup"

	"outbox-relay/internal/pgserver"
)

var products = []string{"espresso cup", "tea pot", "coffee mill"}

const (
	stock = 1_000_000 // of each product, at first
	rare  = "samovar" // of which the shop has fewer than anyone orders
)

var errSoldOut = errors.New("sold out")

// shop is where the demo orders: examples/orders, by HTTP.
type shop struct {
	url    string
	client *http.Client
	ledger ledger
}

// order is what a customer wants.
type order struct {
	Customer string `json:"customer"`
	Product  string `json:"product"`
	Quantity int    `json:"quantity"`
}

// receipt is the shop's word that an order is committed.
type receipt struct {
	Order int64  `json:"order"`
	Event string `json:"event"`
}

// openShop makes the tables of the example, fills stock and shelf, and starts the
// shop.
func openShop(ctx context.Context, s *servers) (*shop, error) {
	if _, err := s.sql.Exec(ctx, s.tables); err != nil {
		return nil, fmt.Errorf("examples/orders/tables.sql: %w", err)
	}
	_, err := s.sql.Exec(ctx, fmt.Sprintf(`insert into stock values ('%s', 3)`, rare))
	for _, product := range products {
		if err == nil {
			_, err = s.sql.Exec(ctx, `with shop as (insert into stock values ($1, $2)) insert into shelf values ($1, $2)`, product, stock)
		}
	}
	if err != nil {
		return nil, err
	}
	port, err := pgserver.FreePort()
	if err != nil {
		return nil, err
	}
	address := fmt.Sprintf("127.0.0.1:%d", port)
	if _, err := s.startOrders(ctx, "shop", "serving", "ADDRESS="+address); err != nil {
		return nil, err
	}
	return &shop{url: "http://" + address + "/orders", client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: clerks}}}, nil
}

func (s *shop) close() { s.client.CloseIdleConnections() }

// place orders. errSoldOut: the shop rolled back.
func (s *shop) place(ctx context.Context, o order) (r receipt, err error) {
	body, err := json.Marshal(o)
	if err != nil {
		return r, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url, bytes.NewReader(body))
	if err != nil {
		return r, err
	}
	response, err := s.client.Do(request)
	if err != nil {
		return r, err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		return r, err
	case response.StatusCode == http.StatusConflict:
		return r, errSoldOut
	case response.StatusCode != http.StatusCreated:
		return r, fmt.Errorf("the shop answers %s: %s", response.Status, answer)
	}
	if err := json.Unmarshal(answer, &r); err != nil {
		return r, fmt.Errorf("the shop's receipt: %w", err)
	}
	s.ledger.add(r)
	return r, nil
}

// rush lets clerks place that many orders each, at once, and now and then one
// beside them that is rolled back.
func (s *shop) rush(ctx context.Context, clerks, orders int) error {
	group, ctx := errgroup.WithContext(ctx)
	for clerk := range clerks {
		group.Go(func() error {
			for n := range orders {
				o := order{Customer: fmt.Sprintf("customer %d of clerk %d", n, clerk), Product: products[n%len(products)], Quantity: 1 + n%3}
				if _, err := s.place(ctx, o); err != nil {
					return err
				}
				if n%50 != 49 {
					continue
				}
				o.Product, o.Quantity = rare, 5
				if _, err := s.place(ctx, o); !errors.Is(err, errSoldOut) {
					return fmt.Errorf("5 of 3 pieces were sold: %w", err)
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// ledger holds the receipts. Safe for concurrent use.
type ledger struct {
	mu       sync.Mutex
	receipts []receipt
}

func (l *ledger) add(r receipt) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.receipts = append(l.receipts, r)
}

func (l *ledger) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.receipts)
}
