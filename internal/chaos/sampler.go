package chaos

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"outbox-relay/internal/wait"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
)

const samplePause = 200 * time.Millisecond

// sampler looks again and again how far the slot is confirmed.
type sampler struct {
	url, slot string

	mu      sync.Mutex
	samples []sample
	slots   []slotLife
}

// slotLife is one of the slots that a season has one after the other.
type slotLife struct {
	floor pglogrepl.LSN // what its predecessor was confirmed up to, or less: not yet its own
	late  bool          // it was made with rows in the table
	begin pglogrepl.LSN // the lowest LSN that was seen of it, 0: none
}

// next says that the slot is lost, while no relay runs, or that the first one is
// made with rows in the table.
func (s *sampler) next() {
	s.mu.Lock()
	defer s.mu.Unlock()
	life := slotLife{late: true}
	for _, one := range s.samples {
		life.floor = max(life.floor, one.confirmed)
	}
	s.slots = append(s.slots, life)
}

// begins lists where the slots begin: not later than seen at first.
func (s *sampler) begins() (all []pglogrepl.LSN) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, life := range s.slots {
		all = append(all, life.begin)
	}
	return all
}

// run samples until ctx ends, connecting again after each disturbance.
func (s *sampler) run(ctx context.Context) {
	for ctx.Err() == nil {
		s.session(ctx)
		wait.For(ctx, samplePause)
	}
}

func (s *sampler) session(ctx context.Context) {
	conn, err := pgx.Connect(ctx, s.url)
	if err != nil {
		return
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Close(ctx) // it may be broken
	}()
	for ctx.Err() == nil {
		if err := s.look(ctx, conn); err != nil {
			return
		}
		wait.For(ctx, samplePause)
	}
}

// look takes a sample, where there is a slot. The phase is read last: when a backfill has ended by then,
// all of it is stored.
func (s *sampler) look(ctx context.Context, conn *pgx.Conn) error {
	confirmed, err := confirmedLSN(ctx, conn, s.slot)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var backfill bool
	err = conn.QueryRow(ctx, `select exists (select from outbox_relay_checkpoints where slot = $1 and phase = 'backfilling')`, s.slot).Scan(&backfill)
	if err == nil {
		s.add(sample{taken: time.Now(), confirmed: confirmed, backfill: backfill})
	}
	return err
}

func (s *sampler) add(one sample) {
	s.mu.Lock()
	defer s.mu.Unlock()
	one.slot = len(s.slots) - 1
	life := &s.slots[one.slot]
	switch {
	case one.confirmed <= life.floor:
		return // the predecessor, as it was left
	case life.late && (life.begin == 0 || one.confirmed < life.begin):
		life.begin = one.confirmed
	}
	s.samples = append(s.samples, one)
}

func (s *sampler) all() []sample {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.samples)
}

func confirmedLSN(ctx context.Context, conn *pgx.Conn, slot string) (pglogrepl.LSN, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var text string
	err := conn.QueryRow(ctx, `select confirmed_flush_lsn::text from pg_replication_slots where slot_name = $1 and confirmed_flush_lsn is not null`, slot).Scan(&text)
	if err != nil {
		return 0, err
	}
	return pglogrepl.ParseLSN(text)
}
