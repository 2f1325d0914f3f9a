package main

import (
	"context"
	"errors"
	"os"
	"time"
)

var (
	errGrace  = errors.New("OUTBOX_SHUTDOWN_GRACE is over")
	errSignal = errors.New("a second signal ended it before all was done: the next start takes it up")
)

// obey runs do, whose context the first signal ends: it then has the grace to end by
// itself, whatever hangs. When that is over (errGrace), and at a second signal
// (errSignal), obey returns at once, for the process to end. What is left then is as
// after a crash.
func obey(signals <-chan os.Signal, grace time.Duration, do func(context.Context) error) error {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	done := make(chan error, 1)
	go func() { done <- do(ctx) }()
	select {
	case err := <-done:
		return err
	case <-signals:
		stop()
	}
	over := time.NewTimer(grace)
	defer over.Stop()
	select {
	case err := <-done:
		return err
	case <-signals:
		return errSignal
	case <-over.C:
		return errGrace
	}
}
