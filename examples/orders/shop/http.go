package shop

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// grace is the time that requests have to end.
const grace = 10 * time.Second

// Serve takes orders at addr, POST /orders, until ctx ends, and returns when the
// last is answered.
func Serve(ctx context.Context, addr string, db *pgxpool.Pool) error {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /orders", func(w http.ResponseWriter, r *http.Request) { placeOrder(w, r, db) })
	server := &http.Server{Handler: mux, ReadHeaderTimeout: grace}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	slog.Info("serving", "address", listener.Addr())
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	return server.Shutdown(ctx)
}

// placeOrder answers 201 with the Receipt, 400 for what is no order, 409 for what
// is sold out.
func placeOrder(w http.ResponseWriter, r *http.Request, db *pgxpool.Pool) {
	var o Order
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<16)).Decode(&o); err != nil || o.Customer == "" || o.Quantity < 1 {
		http.Error(w, `want {"customer": …, "product": …, "quantity": 1 or more}`, http.StatusBadRequest)
		return
	}
	receipt, err := Place(r.Context(), db, o)
	switch {
	case errors.Is(err, ErrSoldOut):
		http.Error(w, err.Error(), http.StatusConflict)
	case err != nil:
		slog.Error("order not placed", "error", err)
		http.Error(w, "try again later", http.StatusInternalServerError)
	default:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(receipt) // who does not wait for it, has ordered all the same
	}
}
