// Package inbox handles each event of a JetStream stream once, however often it
// comes: the event's id is kept in one transaction with its effect.
package inbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// ackWait is how long a message stays with a consumer that does not answer.
	// Nothing else is delivered meanwhile, so it is short.
	ackWait = 5 * time.Second
	// patience bounds the work for one message; it ends before the message comes again.
	patience = 4 * time.Second

	firstDelay, lastDelay = 100 * time.Millisecond, time.Minute
)

// ErrMalformed: the event can never be handled. Any other error is taken for one
// that passes.
var ErrMalformed = errors.New("malformed event")

// Event is what Do gets.
type Event struct {
	ID   string // the row's, the same each time the event comes
	Type string
	Data json.RawMessage // the payload
}

// Consumer is a durable consumer with an inbox. Several processes can run the same.
type Consumer struct {
	Name    string // of the durable consumer, and in the inbox
	Stream  string
	Subject string // wildcards allowed
	DB      *pgxpool.Pool
	Do      func(context.Context, pgx.Tx, Event) error
}

// Run handles events in commit order until ctx ends, and returns when the one at
// hand is done. The stream must be there: the relay makes it in its first run.
func (c *Consumer) Run(ctx context.Context, js jetstream.JetStream) error {
	durable, err := js.CreateOrUpdateConsumer(ctx, c.Stream, jetstream.ConsumerConfig{
		Durable: c.Name, FilterSubject: c.Subject, AckWait: ackWait,
		MaxAckPending: 1, // one at a time: in order
	})
	if err != nil {
		return fmt.Errorf("consumer %s of stream %s: %w", c.Name, c.Stream, err)
	}
	// A server that is away comes back: it is no error.
	messages, err := durable.Messages(jetstream.WithMessagesErrOnMissingHeartbeat(false))
	if err != nil {
		return fmt.Errorf("consumer %s: %w", c.Name, err)
	}
	defer messages.Stop()
	defer context.AfterFunc(ctx, messages.Drain)()
	slog.Info("consuming", "consumer", c.Name)
	for {
		msg, err := messages.Next()
		switch {
		case err == nil:
			c.take(context.WithoutCancel(ctx), msg)
		case errors.Is(err, jetstream.ErrMsgIteratorClosed) && ctx.Err() != nil:
			return nil
		default:
			return fmt.Errorf("consumer %s: %w", c.Name, err)
		}
	}
}

// take handles a message and answers it. An answer that is lost lets it come again.
func (c *Consumer) take(ctx context.Context, msg jetstream.Msg) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	event := Event{ID: msg.Headers().Get("ce-id"), Type: msg.Headers().Get("ce-type"), Data: msg.Data()}
	log := slog.With("consumer", c.Name, "event", event.ID)
	again, err := c.once(ctx, event)
	switch {
	case err == nil:
		log.Info("handled", "again", again)
		err = msg.DoubleAck(ctx)
	case errors.Is(err, ErrMalformed):
		log.Error("never handled", "subject", msg.Subject(), "error", err)
		err = msg.TermWithReason(err.Error())
	default:
		delay := delay(msg)
		log.Warn("not handled yet", "again_in", delay, "error", err)
		err = msg.NakWithDelay(delay)
	}
	if err != nil {
		log.Warn("the answer may be lost: the event comes again", "error", err)
	}
}

// once does the work for an event and keeps its id, both or neither. An event
// that comes again changes nothing, also while another process works for it.
func (c *Consumer) once(ctx context.Context, e Event) (again bool, err error) {
	if e.ID == "" {
		return false, fmt.Errorf("%w: it has no ce-id", ErrMalformed)
	}
	err = pgx.BeginFunc(ctx, c.DB, func(tx pgx.Tx) error {
		kept, err := tx.Exec(ctx, `insert into inbox (consumer, event_id) values ($1, $2) on conflict do nothing`, c.Name, e.ID)
		if err != nil {
			return err
		}
		if again = kept.RowsAffected() == 0; again {
			return nil
		}
		return c.Do(ctx, tx, e)
	})
	return again, err
}

// delay doubles with each delivery.
func delay(msg jetstream.Msg) time.Duration {
	meta, err := msg.Metadata()
	if err != nil {
		return lastDelay
	}
	return min(firstDelay<<min(meta.NumDelivered-1, 16), lastDelay)
}
