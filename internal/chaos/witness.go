package chaos

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"outbox-relay/internal/wait"

	"github.com/nats-io/nats.go/jetstream"
)

const streamName = "EVENTS"

// witness reads the stream as it grows, whatever happens to its servers, and
// keeps what it saw: later it may be consumed, purged or expired. It looks at
// sequences, so a delivery again is not a duplicate. Safe for concurrent use.
type witness struct {
	js        jetstream.JetStream
	workQueue bool // it is the queue's consumer, and acknowledges

	mu       sync.Mutex
	messages map[uint64]message
	ids      map[string]bool
	seen     uint64   // the highest sequence
	faults   []string // what no relay can do: a stream that changes, messages gone unseen
}

func newWitness(js jetstream.JetStream, workQueue bool) *witness {
	return &witness{js: js, workQueue: workQueue, messages: map[uint64]message{}, ids: map[string]bool{}}
}

// run reads until ctx ends, with a new consumer after each disturbance.
func (w *witness) run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := w.read(ctx); err != nil {
			wait.For(ctx, 100*time.Millisecond)
		}
	}
}

// read makes a consumer behind what was seen and reads as long as that gives
// something without a gap.
func (w *witness) read(ctx context.Context) error {
	consumer, err := w.consumer(ctx)
	if err != nil {
		return err
	}
	for delivered := uint64(0); ; {
		n, err := w.fetch(consumer, &delivered)
		if err != nil || n == 0 {
			return err
		}
	}
}

func (w *witness) consumer(ctx context.Context) (jetstream.Consumer, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if w.workQueue {
		return w.js.CreateOrUpdateConsumer(ctx, streamName, jetstream.ConsumerConfig{
			Durable: "witness", AckPolicy: jetstream.AckExplicitPolicy, AckWait: 5 * time.Second, MaxAckPending: 20_000,
		})
	}
	seen, _ := w.progress()
	return w.js.CreateConsumer(ctx, streamName, jetstream.ConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: seen + 1,
		AckPolicy: jetstream.AckNonePolicy, InactiveThreshold: 10 * time.Second, MemoryStorage: true, Replicas: 1,
	})
}

var errDeliveryGap = errors.New("deliveries were lost on their way")

// fetch takes a batch of messages and returns their number. delivered counts
// what this consumer has delivered.
func (w *witness) fetch(consumer jetstream.Consumer, delivered *uint64) (n int, err error) {
	batch, err := consumer.Fetch(500, jetstream.FetchMaxWait(500*time.Millisecond))
	if err != nil {
		return 0, err
	}
	for msg := range batch.Messages() {
		meta, err := msg.Metadata()
		if err != nil {
			return n, err
		}
		if *delivered++; !w.workQueue && meta.Sequence.Consumer != *delivered {
			return n, errDeliveryGap
		}
		w.record(message{meta.Sequence.Stream, msg.Headers().Get("Nats-Msg-Id"), digestOf(msg.Data()), meta.Timestamp, msg.Headers().Get("Outbox-Position")})
		n++
		if w.workQueue {
			_ = msg.Ack() // one that is lost lets the message come again
		}
	}
	return n, batch.Error()
}

func (w *witness) record(m message) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if before, again := w.messages[m.sequence]; again {
		if before.id != m.id || before.body != m.body {
			w.fault("message %d was %s and is %s", m.sequence, before.id, m.id)
		}
		return
	}
	if !w.workQueue && m.sequence != w.seen+1 {
		w.fault("messages %d to %d were gone before they were seen", w.seen+1, m.sequence-1)
	}
	w.messages[m.sequence] = m
	w.ids[m.id] = true
	w.seen = max(w.seen, m.sequence)
}

func (w *witness) fault(format string, args ...any) {
	if len(w.faults) < maxExamples {
		w.faults = append(w.faults, fmt.Sprintf(format, args...))
	}
}

// progress returns the highest sequence seen and the number of messages.
func (w *witness) progress() (seen uint64, messages int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen, len(w.messages)
}

// has tells whether a message with that id was seen.
func (w *witness) has(id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ids[id]
}

// statement is what the witness saw, by sequence, and what it takes exception to.
func (w *witness) statement() ([]message, []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	messages := make([]message, 0, len(w.messages))
	for _, m := range w.messages {
		messages = append(messages, m)
	}
	slices.SortFunc(messages, func(a, b message) int { return cmp.Compare(a.sequence, b.sequence) })
	return messages, slices.Clone(w.faults)
}
