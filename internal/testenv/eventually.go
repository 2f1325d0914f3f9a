package testenv

import (
	"testing"
	"time"
)

// patience is the limit of every wait: far more than a slow machine needs.
const patience = 3 * time.Minute

// Eventually waits until cond holds, and fails the test, naming what, when that
// takes more than three minutes. cond runs in the caller's goroutine, every 10 ms at
// first, then more rarely.
func Eventually(tb testing.TB, what string, cond func() bool) {
	tb.Helper()
	EventuallyWithin(tb, patience, what, cond)
}

// EventuallyWithin is Eventually with a limit of its own.
func EventuallyWithin(tb testing.TB, limit time.Duration, what string, cond func() bool) {
	tb.Helper()
	deadline := time.Now().Add(limit)
	for pause := 10 * time.Millisecond; !cond(); pause = min(2*pause, 100*time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("waited %s in vain for %s", limit, what)
		}
		time.Sleep(pause)
	}
}
