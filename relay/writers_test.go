package relay_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"regexp"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"outbox-relay/internal/testenv"
)

// oracle is an independent slot of test_decoding: what was committed, in commit
// order.
type oracle struct {
	*bundle
	slot string
}

func (b *bundle) oracle() *oracle {
	b.Helper()
	o := &oracle{b, b.slot() + "_oracle"}
	b.exec(`select pg_create_logical_replication_slot($1, 'test_decoding')`, o.slot)
	return o
}

var insertedID = regexp.MustCompile(`^table public\.events: INSERT: id\[text\]:'([^']+)'`)

// committed returns the ids of all events committed since the oracle was made.
func (o *oracle) committed() []string {
	o.Helper()
	rows, err := o.sql.Query(o.Context(), `select data from pg_logical_slot_peek_changes($1, null, null)`, o.slot)
	o.must(err)
	var ids []string
	var data string
	_, err = pgx.ForEachRow(rows, []any{&data}, func() error {
		if m := insertedID.FindStringSubmatch(data); m != nil {
			ids = append(ids, m[1])
		}
		return nil
	})
	o.must(err)
	return ids
}

// writers are applications that insert events in transactions of all kinds,
// until they are stopped.
type writers struct {
	b      *bundle
	cancel context.CancelFunc
	group  errgroup.Group
	rows   atomic.Int64 // inserted, also where the transaction was rolled back
}

func (b *bundle) write(n int) *writers {
	b.Helper()
	ctx, cancel := context.WithCancel(b.Context())
	w := &writers{b: b, cancel: cancel}
	for i := range n {
		conn := b.connect()
		random := rand.New(rand.NewPCG(uint64(i), 42))
		w.group.Go(func() error {
			for ctx.Err() == nil {
				if err := w.transaction(conn, random); err != nil {
					return err
				}
			}
			return nil
		})
	}
	b.Cleanup(func() { cancel(); _ = w.group.Wait() })
	return w
}

// stop ends the writers behind their current transactions.
func (w *writers) stop() {
	w.b.Helper()
	w.cancel()
	w.b.must(w.group.Wait())
}

// abandon ends the writers, whose server is gone.
func (w *writers) abandon() {
	w.cancel()
	_ = w.group.Wait() // the loss of the connection
}

// await waits until n more rows were inserted, for as long as any is: how fast that goes is
// the machine's affair.
func (w *writers) await(n int) {
	w.b.Helper()
	target := w.rows.Load() + int64(n)
	for rows := w.rows.Load(); rows < target; rows = w.rows.Load() {
		testenv.Eventually(w.b, fmt.Sprintf("more than %d rows inserted", rows), func() bool { return w.rows.Load() > rows })
	}
}

// transaction inserts some events, one in five times in vain, one in five with
// a savepoint that is rolled back.
func (w *writers) transaction(conn *pgx.Conn, random *rand.Rand) error {
	ctx := context.Background() // a transaction is never cut in the middle
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(ctx) }()
	if err := w.insert(ctx, tx, 1+random.IntN(20)); err != nil {
		return err
	}
	switch random.IntN(5) {
	case 0:
		return tx.Rollback(ctx)
	case 1:
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
		if err := w.insert(ctx, tx, 1); err != nil {
			return err
		}
	}
	return tx.Commit(ctx)
}

func (w *writers) insert(ctx context.Context, tx pgx.Tx, n int) error {
	w.rows.Add(int64(n))
	_, err := tx.Exec(ctx, `insert into events (aggregate_type, event_type, aggregate_id, payload, headers)
		select 'order', (array['placed', 'paid', 'shipped'])[1 + i % 3], 'order-' || i, jsonb_build_object('n', i, 'at', clock_timestamp()), '{"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}'
		from generate_series(1, $1) i`, n)
	return err
}

func TestCommitOrderAcrossWriters(t *testing.T) {
	b := setup(t)
	b.streaming()
	o := b.oracle()
	w := b.write(8)
	w.await(20_000)
	w.stop()
	ids := o.committed()
	messages := b.requireStream(ids)
	b.requireStatus("published", ids)
	for _, m := range messages {
		b.requireContract(m)
	}
}

// requireContract compares a message with its row.
func (b *bundle) requireContract(m message) {
	b.Helper()
	var payload, eventType, aggregateID, at string
	b.must(b.sql.QueryRow(b.Context(), `select payload::text, event_type, aggregate_id,
		to_char(created_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US') from events where id = $1`, m.id).
		Scan(&payload, &eventType, &aggregateID, &at))
	if string(m.Data) != payload {
		b.Fatalf("message %s has body %s, want %s", m.id, m.Data, payload)
	}
	if want := "events.order." + eventType; m.Subject != want {
		b.Fatalf("message %s has subject %s, want %s", m.id, m.Subject, want)
	}
	for name, want := range map[string]string{
		"ce-specversion": "1.0", "ce-id": m.id, "ce-source": b.source(), "ce-type": eventType,
		"ce-subject": aggregateID, "ce-aggregatetype": "order", "ce-eventversion": "0", "content-type": "application/json",
		"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
	} {
		if got := m.Header.Get(name); got != want {
			b.Fatalf("message %s has header %s: %q, want %q", m.id, name, got, want)
		}
	}
	if got := m.Header.Get("ce-time"); !sameTime(got, at) {
		b.Fatalf("message %s has ce-time %q, want %q", m.id, got, at)
	}
	if got := m.Header.Get("Outbox-Position"); !positionForm.MatchString(got) {
		b.Fatalf("message %s has Outbox-Position %q", m.id, got)
	}
}

var positionForm = regexp.MustCompile(`^1/[0-9A-F]+/[0-9A-F]+/[1-9][0-9]*$`)
var trailingZeros = regexp.MustCompile(`\.?0*$`)

// sameTime compares but for trailing zeros of the fraction, which Postgres
// leaves out.
func sameTime(got, want string) bool {
	return len(got) > 0 && got[len(got)-1] == 'Z' && got[:len(got)-1] == trailingZeros.ReplaceAllString(want, "")
}
