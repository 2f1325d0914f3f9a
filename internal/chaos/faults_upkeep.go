package chaos

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/wait"
)

// What a database's keepers do to it while everything goes on. They are drawn more
// often than others: each meets another state of the outbox.

var (
	analyze = fault{name: "ANALYZE", on: postgres, weight: 3, strike: func(s *season) injury {
		return s.keepUp(`analyze events`, `analyze`)
	}}
	vacuum = fault{name: "VACUUM", on: postgres, weight: 3, strike: func(s *season) injury {
		if s.random.IntN(3) == 0 {
			return s.keepUp(`vacuum (freeze, analyze) events`, `vacuum outbox_relay_checkpoints`)
		}
		return s.keepUp(`vacuum events`, `vacuum outbox_relay_checkpoints`, `vacuum outbox_relay_leftovers`, `vacuum outbox_relay_batches`)
	}}
)

var upkeepFaults = []fault{
	analyze,
	vacuum,
	{name: "REINDEX CONCURRENTLY", on: postgres, weight: 3, strike: func(s *season) injury {
		return s.keepUp(`reindex table concurrently events`, `reindex table concurrently outbox_relay_checkpoints`,
			`reindex table concurrently outbox_relay_leftovers`, `reindex table concurrently outbox_relay_batches`)
	}},
	{name: "snapshot held", on: postgres, weight: 3, strike: holdSnapshot},
}

// keepUp runs the statements in a session of their own. What strikes together with
// it meets it at work.
func (s *season) keepUp(statements ...string) injury {
	s.Helper()
	done := make(chan error, 1)
	go func() { done <- runEach(s.url, statements) }()
	return injury{0, func() {
		s.Helper()
		s.must(<-done)
	}}
}

// upkeepLimit leaves time to wait for transactions of others, and for a snapshot that is held.
const upkeepLimit = 5 * time.Minute

// runEach runs statements, each in a transaction of its own.
func runEach(url string, statements []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), upkeepLimit)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	for _, sql := range statements {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

// holdSnapshot opens a transaction that keeps its snapshot over the faults that
// come next, until some time has passed or Postgres ends.
func holdSnapshot(s *season) injury {
	s.Helper()
	var holder *pgx.Conn
	s.query(func(ctx context.Context, _ *pgx.Conn) (err error) {
		if holder, err = pgx.Connect(ctx, s.url); err != nil {
			return err
		}
		if _, err = holder.Exec(ctx, `begin isolation level repeatable read`); err == nil {
			_, err = holder.Exec(ctx, `select count(*) from outbox_relay_checkpoints`)
		}
		return err
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	held := s.between(20_000, 40_000)
	go func() {
		defer close(done)
		wait.For(ctx, held)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = holder.Close(ctx) // Postgres may have ended it
	}()
	s.Cleanup(func() { cancel(); <-done })
	return injury{}
}
