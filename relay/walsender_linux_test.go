package relay_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"outbox-relay/internal/testenv"
)

// silence is how old the walsender's last word from the relay may be: half of
// wal_sender_timeout, as the relay sets it.
const silence = 5 * time.Second

// load is what an application inserts while NATS is down: so many rows in one
// transaction at first, and then rows every so often.
type load struct {
	first, rows int
	every       time.Duration
}

var (
	trickle = load{rows: 40, every: 350 * time.Millisecond}
	flood   = load{first: 30_000, rows: 200, every: 100 * time.Millisecond}
)

// apply inserts on a connection of its own until stop is called, which returns when
// the last transaction has ended.
func (b *bundle) apply(l load) (stop func()) {
	b.Helper()
	ctx, cancel := context.WithCancel(b.Context())
	conn := b.connect()
	var group errgroup.Group
	group.Go(func() error {
		tick := time.NewTicker(l.every)
		defer tick.Stop()
		for rows := max(l.first, l.rows); ; rows = l.rows {
			_, err := conn.Exec(ctx, `insert into events (aggregate_type, event_type, payload)
				select 'order', 'created', jsonb_build_object('text', repeat('x', 300)) from generate_series(1, $1)`, rows)
			if err != nil {
				return err
			}
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
			}
		}
	})
	return func() {
		b.Helper()
		cancel()
		if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
			b.Fatal(err)
		}
	}
}

// heard samples how old the walsender's last word from the relay is.
type heard struct {
	*bundle
	name      string
	walsender int
	oldest    time.Duration // that was seen
}

func (b *bundle) listen(name string) *heard {
	b.Helper()
	return &heard{bundle: b, name: name, walsender: b.walsender()}
}

// sample fails the test where the walsender has ended, or has heard nothing for too
// long.
func (h *heard) sample() {
	h.Helper()
	var age float64
	err := h.sql.QueryRow(h.Context(), `select extract(epoch from clock_timestamp() - reply_time)
		from pg_stat_replication where pid = $1`, h.walsender).Scan(&age)
	if errors.Is(err, pgx.ErrNoRows) {
		h.Fatalf("%s: walsender %d has ended in the outage, which had heard nothing for %s; Postgres's log:\n%s",
			h.name, h.walsender, h.oldest, h.cluster.LogTail())
	}
	h.must(err)
	if h.oldest = max(h.oldest, time.Duration(age*float64(time.Second))); h.oldest > silence {
		h.Fatalf("%s: the walsender has heard nothing from the relay for %s", h.name, h.oldest)
	}
}

// through samples for as long as an outage lasts, by Postgres's clock.
func through(lasts time.Duration, all ...*heard) {
	b := all[0]
	b.Helper()
	began := b.now()
	testenv.EventuallyWithin(b, lasts+time.Minute, "the end of the outage", func() bool {
		for _, h := range all {
			h.sample()
		}
		return b.now().Sub(began) > lasts
	})
}

// requireHeld drains what has piled up, and looks that the walsender is the same and
// each event is stored once, in the order of commit.
func (h *heard) requireHeld(o *oracle) {
	h.Helper()
	h.requireStream(o.committed())
	if pid := h.walsender; pid != h.bundle.walsender() {
		h.Errorf("%s: the session was lost", h.name)
	}
	h.Logf("%s: the walsender had heard nothing for %s at the most", h.name, h.oldest.Round(time.Millisecond))
}

// While NATS is down the relay reads no further. The walsender hears from it all the
// same, however long that lasts: with a trickle of small transactions, which fills the
// receive buffer by what its segments take in the kernel rather than by their bytes,
// and with a flood.
func TestWalsenderHearsFromTheRelay(t *testing.T) {
	for name, l := range map[string]load{"trickle": trickle, "flood": flood} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			o := b.oracle()
			b.streaming(noWindow, "MAX_INFLIGHT=64")
			b.requireStream(b.insert(1000))
			h := b.listen(name)
			b.nats.Stop()
			stop := b.apply(l)
			through(2*time.Minute, h)
			b.nats.Restart()
			stop()
			h.requireHeld(o)
		})
	}
}
