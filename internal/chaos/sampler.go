package chaos

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
)

const samplePause = 200 * time.Millisecond

// sampler looks again and again how far the slot is confirmed.
type sampler struct {
	url, slot string

	mu      sync.Mutex
	samples []sample
}

// run samples until ctx ends, connecting again after each disturbance.
func (s *sampler) run(ctx context.Context) {
	for ctx.Err() == nil {
		s.session(ctx)
		pause(ctx, samplePause)
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
		confirmed, err := confirmedLSN(ctx, conn, s.slot)
		if err != nil {
			return
		}
		s.add(sample{time.Now(), confirmed})
		pause(ctx, samplePause)
	}
}

func (s *sampler) add(one sample) {
	s.mu.Lock()
	defer s.mu.Unlock()
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
	err := conn.QueryRow(ctx, `select confirmed_flush_lsn::text from pg_replication_slots where slot_name = $1`, slot).Scan(&text)
	if err != nil {
		return 0, err
	}
	return pglogrepl.ParseLSN(text)
}
