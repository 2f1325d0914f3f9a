package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"outbox-relay/internal/wait"

	"github.com/jackc/pgx/v5"
)

const writerCount = 8

// writers are applications that insert events in transactions of all kinds. A
// Postgres that dies ends their transactions, not them: they connect again, and
// what became of a commit without an answer they do not know.
type writers struct {
	url    string
	pacer  pacer
	rows   atomic.Int64 // of transactions that were committed, as far as is known
	cancel context.CancelFunc
	group  sync.WaitGroup
	last   atomic.Value // string: the last error
}

// newWriters starts writers that insert about rate rows a second altogether.
func newWriters(url string, rate int, seed uint64) *writers {
	ctx, cancel := context.WithCancel(context.Background())
	w := &writers{url: url, cancel: cancel}
	w.pacer.set(rate)
	for i := range writerCount {
		one := &writer{writers: w, random: rand.New(rand.NewPCG(seed, uint64(i))), lingers: i == 0}
		w.group.Go(func() { one.run(ctx) })
	}
	return w
}

// stop ends the writers behind their current transactions.
func (w *writers) stop() {
	w.cancel()
	w.group.Wait()
}

// writer is one application with one connection.
type writer struct {
	*writers
	random  *rand.Rand
	lingers bool // its transactions stay open for seconds
	conn    *pgx.Conn
}

func (w *writer) run(ctx context.Context) {
	defer w.hangUp()
	for ctx.Err() == nil {
		if err := w.step(ctx); err != nil {
			w.last.Store(err.Error())
			w.hangUp()
			wait.For(ctx, 100*time.Millisecond)
		}
	}
}

// step makes one transaction. It is never cut in the middle by ctx.
func (w *writer) step(ctx context.Context) error {
	whole, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	if w.conn == nil {
		var err error
		if w.conn, err = pgx.Connect(whole, w.url); err != nil {
			return err
		}
	}
	n, err := w.transaction(ctx, whole)
	w.rows.Add(int64(n))
	w.pacer.wait(ctx, max(n, 1))
	return err
}

func (w *writer) hangUp() {
	if w.conn != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = w.conn.Close(ctx) // it may be broken
		w.conn = nil
	}
}

// transaction makes one of the kinds of transactions and returns how many rows
// it committed.
func (w *writer) transaction(stop, ctx context.Context) (rows int, err error) {
	if w.lingers {
		return w.long(stop, ctx)
	}
	few := 1 + w.random.IntN(20)
	switch draw := w.random.IntN(1000); {
	case draw < 600:
		return 1, w.insert(ctx, w.conn, 1)
	case draw < 800:
		return few, w.inTransaction(ctx, few, nil)
	case draw < 804:
		return 1000, w.inTransaction(ctx, 1000, nil)
	case draw < 880:
		return 0, w.inTransaction(ctx, few, rollBack)
	case draw < 940:
		return few + 1, w.inTransaction(ctx, few, w.savepoint)
	default:
		return few, w.inTransaction(ctx, few, func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `set local synchronous_commit = off`)
			return err
		})
	}
}

var errRollBack = errors.New("roll back")

func rollBack(context.Context, pgx.Tx) error { return errRollBack }

// savepoint inserts some events in vain and one for good.
func (w *writer) savepoint(ctx context.Context, tx pgx.Tx) error {
	savepoint, err := tx.Begin(ctx)
	if err != nil {
		return err
	}
	if err := w.insert(ctx, savepoint, 5); err != nil {
		return err
	}
	if err := savepoint.Rollback(ctx); err != nil {
		return err
	}
	return w.insert(ctx, tx, 1)
}

// inTransaction inserts n events one after the other, or by one statement where
// they are many, does more, and commits.
func (w *writer) inTransaction(ctx context.Context, n int, more func(context.Context, pgx.Tx) error) error {
	err := pgx.BeginFunc(ctx, w.conn, func(tx pgx.Tx) error {
		statements, each := n, 1
		if n > 20 {
			statements, each = 1, n
		}
		for range statements {
			if err := w.insert(ctx, tx, each); err != nil {
				return err
			}
		}
		if more == nil {
			return nil
		}
		return more(ctx, tx)
	})
	if errors.Is(err, errRollBack) {
		return nil
	}
	return err
}

// long holds a transaction open for some seconds, or until the writers stop.
func (w *writer) long(stop, ctx context.Context) (rows int, err error) {
	return 4, w.inTransaction(ctx, 2, func(ctx context.Context, tx pgx.Tx) error {
		wait.For(stop, time.Duration(1000+w.random.IntN(4000))*time.Millisecond)
		return w.insert(ctx, tx, 2)
	})
}

// execer is a connection or a transaction.
type execer interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// insert inserts n events whose payloads would not survive a decoder: numbers
// beyond float64, quotes, escapes and text beyond ASCII.
func (w *writer) insert(ctx context.Context, on execer, n int) error {
	_, err := insertEvents(ctx, on, n, fmt.Sprintf(`{"big": 9007199254740993.10, "text": "it's \"quoted\" \\ \u00e9 𝄞", "pad": "%0*d", "nonce": %d}`,
		w.random.IntN(200), 0, w.random.Uint64()))
	return err
}

// insertEvents inserts n events by one statement and returns their ids.
func insertEvents(ctx context.Context, on execer, n int, payload string) ([]string, error) {
	rows, err := on.Query(ctx, `insert into events (aggregate_type, event_type, aggregate_id, payload)
		select 'order', (array['placed', 'paid', 'shipped'])[1 + i % 3], 'order-' || i, $2::jsonb || jsonb_build_object('n', i)
		from generate_series(1, $1) i returning id`, n, payload)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// pacer spreads what is paid for evenly over time. Safe for concurrent use.
type pacer struct {
	mu   sync.Mutex
	each time.Duration
	next time.Time
}

func (p *pacer) set(perSecond int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.each = time.Second / time.Duration(perSecond)
}

// wait pays for n and waits until ctx ends or what was paid before is over.
func (p *pacer) wait(ctx context.Context, n int) {
	p.mu.Lock()
	if now := time.Now(); p.next.Before(now) {
		p.next = now
	}
	until := p.next
	p.next = p.next.Add(time.Duration(n) * p.each)
	p.mu.Unlock()
	wait.For(ctx, time.Until(until))
}
