package main

import (
	"context"
	"errors"
	"os"
	"syscall"
	"testing"
	"time"
)

// What does not end by itself behind the first signal is left at the end of the grace, or
// at a second signal; its error counts where it does.
func TestObey(t *testing.T) {
	failed := errors.New("failed")
	hang := func(context.Context) error { select {} }
	orderly := func(ctx context.Context) error { <-ctx.Done(); return failed }
	for name, c := range map[string]struct {
		signals int
		grace   time.Duration
		do      func(context.Context) error
		want    error
	}{
		"no signal":            {0, 0, func(context.Context) error { return failed }, failed},
		"ends in order":        {1, time.Hour, orderly, failed},
		"hangs":                {1, time.Millisecond, hang, errGrace},
		"hangs, second signal": {2, time.Hour, hang, errSignal},
	} {
		signals := make(chan os.Signal, 2)
		for range c.signals {
			signals <- syscall.SIGTERM
		}
		if err := obey(signals, c.grace, c.do); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}
