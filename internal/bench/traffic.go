package main

import (
	"context"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
)

const (
	writers = 16     // connections that insert
	fastest = 40_000 // inserts a second that are made at most
)

// traffic is single inserts and when they arrived. An event carries its number as
// its aggregate's id.
type traffic struct {
	interval time.Duration // from one insert to the next; 0: none waits
	length   time.Duration
	begin    time.Time

	next     atomic.Int64 // number of the next insert
	inserted atomic.Int64
	arrived  atomic.Int64
	inserts  []insert
}

type insert struct {
	sent      time.Time
	committed time.Time
	arrived   time.Time
}

func paced(rate float64, length time.Duration) *traffic {
	n := int(rate * length.Seconds())
	return &traffic{interval: time.Duration(float64(time.Second) / rate), length: 2 * length, inserts: make([]insert, n)}
}

func unpaced(length time.Duration) *traffic {
	return &traffic{length: length, inserts: make([]insert, int(fastest*length.Seconds()))}
}

// drive inserts, and waits until a consumer has got all.
func (d *database) drive(ctx context.Context, b *broker, t *traffic) error {
	consumer, err := b.js.OrderedConsumer(ctx, stream, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverNewPolicy})
	if err != nil {
		return err
	}
	consuming, err := consumer.Consume(t.arrive)
	if err != nil {
		return err
	}
	defer consuming.Stop()
	conns := make([]*pgx.Conn, writers)
	for i := range conns {
		if conns[i], err = pgx.Connect(ctx, d.url); err != nil {
			return err
		}
		defer conns[i].Close(context.WithoutCancel(ctx))
	}
	t.begin = time.Now()
	group, writing := errgroup.WithContext(ctx)
	for _, conn := range conns {
		group.Go(func() error { return t.write(writing, conn) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return await(ctx, "the consumer", time.Millisecond, func() (bool, error) { return t.arrived.Load() == t.inserted.Load(), nil })
}

// write inserts what comes next until all are made or the time is up.
func (t *traffic) write(ctx context.Context, conn *pgx.Conn) error {
	const text = `{"order": 42, "line": 1, "text": "` + pad + `"}`
	for time.Since(t.begin) < t.length {
		number := t.next.Add(1) - 1
		if number >= int64(len(t.inserts)) {
			return nil
		}
		time.Sleep(time.Until(t.begin.Add(time.Duration(number) * t.interval)))
		i := &t.inserts[number]
		i.sent = time.Now()
		_, err := conn.Exec(ctx, `insert into events (aggregate_type, aggregate_id, event_type, payload) values ('order', $1, 'created', $2)`,
			strconv.FormatInt(number, 10), text)
		if err != nil {
			return err
		}
		i.committed = time.Now()
		t.inserted.Add(1)
	}
	return nil
}

// pad makes a payload of about 200 bytes.
const pad = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef" +
	"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// arrive is called for one message after the other.
func (t *traffic) arrive(msg jetstream.Msg) {
	number, err := strconv.Atoi(msg.Headers().Get("ce-subject"))
	if err != nil {
		return // not ours: it is waited for in vain
	}
	t.inserts[number].arrived = time.Now()
	t.arrived.Add(1)
}

// made are the inserts that were made: numbers are taken in order, and what is
// taken is inserted.
func (t *traffic) made() []insert { return t.inserts[:t.inserted.Load()] }

// rate is of insert and arrival together, a second.
func (t *traffic) rate() float64 {
	end := t.begin
	for _, i := range t.made() {
		if i.arrived.After(end) {
			end = i.arrived
		}
	}
	return float64(len(t.made())) / end.Sub(t.begin).Seconds()
}

func (t *traffic) summary() LatencyRun {
	commit := t.sorted(func(i insert) time.Duration { return i.committed.Sub(i.sent) })
	arrival := t.sorted(func(i insert) time.Duration { return i.arrived.Sub(i.sent) })
	return LatencyRun{
		Rate: t.rate(), Commit: quantile(commit, 0.5), CommitP99: quantile(commit, 0.99),
		P50: quantile(arrival, 0.5), P99: quantile(arrival, 0.99), P999: quantile(arrival, 0.999),
	}
}

func (t *traffic) sorted(figure func(insert) time.Duration) []time.Duration {
	var all []time.Duration
	for _, i := range t.made() {
		all = append(all, figure(i))
	}
	slices.Sort(all)
	return all
}

// quantile is in milliseconds.
func quantile(sorted []time.Duration, q float64) float64 {
	return float64(sorted[int(q*float64(len(sorted)-1))].Microseconds()) / 1e3
}
