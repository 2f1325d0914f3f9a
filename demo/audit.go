package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/nats-io/nats.go/jetstream"
)

// message is one message of the stream, as the audit sees it.
type message struct {
	id, position, payload string
}

// audit holds the whole stream against what the shop committed, and the tables
// against both.
func audit(ctx context.Context, out *printer, s *servers, shop *shop, inventory, mail *consumer) error {
	out.title("The audit: every message of the stream against every commit of the shop")
	messages, err := s.messages(ctx)
	if err != nil {
		return err
	}
	v := judge(messages, shop.ledger.payloads)
	out.step("committed", "%d events", v.committed)
	out.step("in the stream", "%d messages: lost %d, twice %d, out of order %d, never committed %d, changed %d",
		len(messages), v.lost, v.twice, v.outOfOrder, v.phantom, v.changed)
	books, err := shop.books(ctx)
	if err != nil {
		return err
	}
	out.step("in Postgres", "%d orders, %d events published, %d not; %d reserved, %d off the stock", books.orders, books.published, books.unpublished, books.reserved, books.taken)
	out.step("consumers", "inventory did its work for %d events, e-mail for %d", inventory.count(), mail.count())

	if err := errors.Join(v.fault(), books.fault(v.committed)); err != nil {
		return fmt.Errorf("the promise is broken: %w", err)
	}
	out.title("All is well. Next: run it beside your own Postgres, see README.md")
	return nil
}

// messages reads the stream from its first message to its last.
func (s *servers) messages(ctx context.Context) ([]message, error) {
	last, err := s.stored(ctx)
	if err != nil {
		return nil, err
	}
	reader, err := s.js.OrderedConsumer(ctx, stream, jetstream.OrderedConsumerConfig{})
	if err != nil {
		return nil, err
	}
	var messages []message
	for uint64(len(messages)) < last {
		m, err := reader.Next()
		if err != nil {
			return nil, fmt.Errorf("read the stream: %w", err)
		}
		messages = append(messages, message{m.Headers().Get("Nats-Msg-Id"), m.Headers().Get("Outbox-Position"), string(m.Data())})
	}
	return messages, nil
}

// verdict counts what is wrong with a stream.
type verdict struct {
	committed, lost, twice, outOfOrder, phantom, changed int
}

func (v verdict) fault() error {
	if v.lost+v.twice+v.outOfOrder+v.phantom+v.changed > 0 {
		return errors.New("the stream is not what was committed")
	}
	return nil
}

// judge holds messages against the payloads of the committed events, by id.
func judge(messages []message, committed map[string]string) verdict {
	v := verdict{committed: len(committed)}
	seen := map[string]bool{}
	before := ""
	for _, m := range messages {
		payload, known := committed[m.id]
		switch {
		case !known:
			v.phantom++
		case seen[m.id]:
			v.twice++
		case payload != m.payload:
			v.changed++
		}
		seen[m.id] = true
		if !precedes(before, m.position) {
			v.outOfOrder++
		}
		before = m.position
	}
	for id := range committed {
		if !seen[id] {
			v.lost++
		}
	}
	return v
}

// precedes compares positions, "<timeline>/<commit LSN>/<ordinal>", of one
// timeline.
func precedes(a, b string) bool {
	if a == "" {
		return true
	}
	commitA, ordinalA := parsePosition(a)
	commitB, ordinalB := parsePosition(b)
	return commitA < commitB || commitA == commitB && ordinalA < ordinalB
}

func parsePosition(s string) (commit pglogrepl.LSN, ordinal int) {
	parts := strings.Split(s, "/")
	if len(parts) != 4 {
		return 0, 0
	}
	commit, err := pglogrepl.ParseLSN(parts[1] + "/" + parts[2])
	if err != nil {
		return 0, 0
	}
	fmt.Sscan(parts[3], &ordinal)
	return commit, ordinal
}

// books is what Postgres says at the end.
type books struct {
	orders, published, unpublished, reserved, taken int
}

// books waits until the last outcome is recorded, which the relay does apart
// from publishing.
func (s *shop) books(ctx context.Context) (b books, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("waited a minute in vain for every row to read published"))
	defer cancel()
	for {
		err = s.counter.QueryRow(ctx, `select
			(select count(*) from orders),
			(select count(*) from events where status = 'published'),
			(select count(*) from events where status <> 'published'),
			(select coalesce(sum(quantity), 0) from reservations),
			(select sum($1 - count) from stock)`, stock).Scan(&b.orders, &b.published, &b.unpublished, &b.reserved, &b.taken)
		if err != nil || b.unpublished == 0 {
			return b, err
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return b, err
		}
	}
}

func (b books) fault(committed int) error {
	if b.orders != committed || b.published != committed || b.unpublished != 0 || b.reserved != b.taken {
		return errors.New("the books do not agree")
	}
	return nil
}
