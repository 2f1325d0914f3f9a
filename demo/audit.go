package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"outbox-relay/internal/wait"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go/jetstream"
)

// message is one message of the stream, as the audit sees it.
type message struct {
	id, position, payload string
}

// audit holds the whole stream against what the shop committed, and the tables
// of shop and consumers against both.
func audit(ctx context.Context, out *printer, s *servers, shop *shop) error {
	out.title("The audit: every message of the stream against every commit of the shop")
	if err := s.awaitRecorded(ctx); err != nil {
		return err
	}
	committed, err := s.committed(ctx)
	if err != nil {
		return err
	}
	messages, err := s.messages(ctx)
	if err != nil {
		return err
	}
	b, err := s.books(ctx)
	if err != nil {
		return err
	}
	v := judge(messages, committed)
	out.step("committed", "%d events, %d receipts", v.committed, shop.ledger.len())
	out.step("in the stream", "%d messages: lost %d, twice %d, out of order %d, never committed %d, changed %d",
		len(messages), v.lost, v.twice, v.outOfOrder, v.phantom, v.changed)
	out.step("in Postgres", "%d orders, %d events published, %d not; %d pieces sold, %d off the stock", b.orders, b.published, b.unpublished, b.sold, b.reserved)
	out.step("inventory", "packed %d orders in %d parcels, and took %d pieces off the shelf", b.packed, b.parcels, b.taken)
	out.step("email", "thanked for %d orders in %d mails", b.thanked, b.mails)

	if err := errors.Join(v.fault(), b.fault(), shop.ledger.fault(committed)); err != nil {
		return fmt.Errorf("the promise is broken: %w", err)
	}
	out.title("All is well. Next: run it beside your own Postgres, see README.md")
	return nil
}

// awaitRecorded waits until the last outcome is recorded, which the relay does
// apart from publishing.
func (s *servers) awaitRecorded(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("waited a minute in vain for every row to read published"))
	defer cancel()
	for {
		var waiting int
		err := s.sql.QueryRow(ctx, `select count(*) from events where status <> 'published'`).Scan(&waiting)
		if err != nil || waiting == 0 {
			return err
		}
		if err := wait.For(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

// committed returns the payloads of all events, by id.
func (s *servers) committed(ctx context.Context) (map[string]string, error) {
	rows, err := s.sql.Query(ctx, `select id, payload::text from events`)
	if err != nil {
		return nil, err
	}
	payloads := map[string]string{}
	var id, payload string
	_, err = pgx.ForEachRow(rows, []any{&id, &payload}, func() error {
		payloads[id] = payload
		return nil
	})
	return payloads, err
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
	orders, published, unpublished int
	sold, reserved                 int // pieces: in orders, and off the stock
	packed, parcels, taken         int // orders, parcels, and pieces off the shelf
	thanked, mails                 int // orders, mails
}

func (s *servers) books(ctx context.Context) (b books, err error) {
	err = s.sql.QueryRow(ctx, `select
		(select count(*) from orders),
		(select count(*) from events where status = 'published'),
		(select count(*) from events where status <> 'published'),
		(select coalesce(sum(quantity), 0) from orders),
		(select sum($1 - available) from stock where product <> $2),
		(select count(distinct order_id) from parcels),
		(select count(*) from parcels),
		(select sum($1 - count) from shelf),
		(select count(distinct order_id) from mails),
		(select count(*) from mails)`, stock, rare).Scan(
		&b.orders, &b.published, &b.unpublished, &b.sold, &b.reserved, &b.packed, &b.parcels, &b.taken, &b.thanked, &b.mails)
	return b, err
}

// fault tells whether each order was published, and handled once by each consumer.
func (b books) fault() error {
	all := books{b.orders, b.orders, 0, b.sold, b.sold, b.orders, b.orders, b.sold, b.orders, b.orders}
	if b != all {
		return errors.New("the books do not agree")
	}
	return nil
}

// fault tells whether the shop's receipts are those of the committed events.
func (l *ledger) fault(committed map[string]string) error {
	given := map[string]bool{}
	for _, r := range l.receipts {
		given[r.Event] = true
		if _, ok := committed[r.Event]; !ok {
			return fmt.Errorf("the shop gave a receipt for order %d, whose event %s is not there", r.Order, r.Event)
		}
	}
	if len(given) != len(committed) {
		return fmt.Errorf("%d events have a receipt, of %d", len(given), len(committed))
	}
	return nil
}
