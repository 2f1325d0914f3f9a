// Command orders is a shop of three services, to copy from:
//
//	orders shop        takes orders: order, reservation and event in one transaction
//	orders inventory   takes what was ordered off the shelf, once for each order
//	orders email       writes a mail, once for each order
//
// Before it, create the tables of tables.sql, and run the relay. It reads
// DATABASE_URL, NATS_URL, and the shop ADDRESS (127.0.0.1:8000). SIGTERM lets each
// finish what it has begun.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay-examples/orders/inbox"
	"outbox-relay-examples/orders/shop"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err := run(ctx, os.Args[1:]); err != nil {
		slog.Error("stopped", "error", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("want one of shop, inventory, email; got %q", args)
	}
	db, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		return fmt.Errorf("DATABASE_URL: %w", err)
	}
	defer db.Close()
	consumer := inbox.Consumer{Name: args[0], Stream: "EVENTS", Subject: "events.order.placed", DB: db}
	switch args[0] {
	case "shop":
		return shop.Serve(ctx, variable("ADDRESS", "127.0.0.1:8000"), db)
	case "inventory":
		consumer.Do = pack
	case "email":
		consumer.Do = thank
	default:
		return fmt.Errorf("want one of shop, inventory, email; got %q", args[0])
	}
	return consume(ctx, &consumer)
}

func consume(ctx context.Context, c *inbox.Consumer) error {
	nc, err := nats.Connect(variable("NATS_URL", nats.DefaultURL), nats.MaxReconnects(-1))
	if err != nil {
		return fmt.Errorf("NATS_URL: %w", err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	return c.Run(ctx, js)
}

func variable(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}
