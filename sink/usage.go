package sink

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/fault"
)

// Usage is what a stream holds.
type Usage struct {
	Last     uint64 // sequence
	Messages uint64
	Bytes    uint64
	Fault    error // why it can't take the relay's messages at present; nil: it can, as far as is seen
}

// Usage asks the stream's leader. It makes no stream.
func (c *Client) Usage(ctx context.Context, owner StreamConfig) (Usage, error) {
	stream := owner.Name
	info, err := c.info(ctx, stream)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return Usage{}, fmt.Errorf("stream %s does not exist: the first run makes it; later, restore it, or correct OUTBOX_STREAM or OUTBOX_NATS_DOMAIN", stream)
	case err != nil:
		return Usage{}, err
	}
	faults := streamFaults(info.Config, owner)
	if owner.Subjects == "" { // the caller does not ask for them
		faults.Subjects = nil
	}
	return Usage{Last: info.State.LastSeq, Messages: info.State.Msgs, Bytes: info.State.Bytes,
		Fault: cmp.Or(faults.Kind, faults.Subjects, full(info.Config, info.State))}, nil
}

// full says that a stream takes no more. A message that is larger than what is left of its
// bytes is refused before all are used.
func full(c jetstream.StreamConfig, state jetstream.StreamState) error {
	if c.Discard != jetstream.DiscardNew {
		return nil
	}
	f := &fault.Error{Remedy: "raise its limits, or have consumers take messages: the relay waits"}
	switch {
	case c.MaxMsgs > 0 && state.Msgs >= uint64(c.MaxMsgs):
		f.What = fmt.Sprintf("stream %s is full: it has %d messages, and takes no more", c.Name, state.Msgs)
	case c.MaxBytes > 0 && state.Bytes >= uint64(c.MaxBytes-c.MaxBytes/100):
		f.What = fmt.Sprintf("stream %s is full, or nearly: it has %d bytes of at most %d, and takes no more", c.Name, state.Bytes, c.MaxBytes)
	default:
		return nil
	}
	return f
}
