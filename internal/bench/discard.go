package main

import (
	"context"

	"outbox-relay/internal/discard"
)

// readAndDiscard measures the best reader that is known, from the first event to
// the last.
func (d *database) readAndDiscard(ctx context.Context, w Workload) (float64, error) {
	read, err := discard.Read(ctx, discard.Reading{URL: d.url, Slot: d.slot("discard"), Publication: publication, Events: w.Events})
	return w.rate(read.Took), err
}
