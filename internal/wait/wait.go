// Package wait waits for time to pass, or for a context to end.
package wait

import (
	"context"
	"time"
)

// For returns nil after d, or why ctx ended before.
func For(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}
