package sink

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"
)

// Usage is what a stream holds.
type Usage struct {
	Last     uint64 // sequence
	Messages uint64
	Bytes    uint64
}

// Usage asks the stream's leader. It makes no stream.
func (c *Client) Usage(ctx context.Context, stream string) (Usage, error) {
	info, err := c.info(ctx, stream)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return Usage{}, fmt.Errorf("stream %s does not exist: the first run makes it; later, restore it, or correct OUTBOX_STREAM or OUTBOX_NATS_DOMAIN", stream)
	case err != nil:
		return Usage{}, err
	}
	return Usage{Last: info.State.LastSeq, Messages: info.State.Msgs, Bytes: info.State.Bytes}, nil
}
