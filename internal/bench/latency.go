package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"outbox-relay/internal/wait"
)

// share is of the most that can be inserted and relayed at once.
const share = 0.8

// responsiveness measures latency at each pace, and what an idle relay uses. Here
// commits are synced to disk, as in an application's Postgres.
func (s *servers) responsiveness(ctx context.Context, p plan, r *Report, progress io.Writer) (err error) {
	if len(p.paces) == 0 && p.idle == 0 {
		return nil
	}
	if err := s.sync(ctx); err != nil {
		return err
	}
	b, err := s.startBroker(ctx, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	for i := range p.rounds {
		for j := range r.Latency {
			l := &r.Latency[j]
			run, err := s.latency(ctx, b, l.Pace, p.pace)
			if err != nil {
				return fmt.Errorf("latency at %s: %w", l.Pace.Name, err)
			}
			l.Runs = append(l.Runs, run)
			fmt.Fprintf(progress, "round %d, latency at %s: %.0f/s, p50 %.2f ms, p99 %.2f ms\n", i+1, l.Pace.Name, run.Rate, run.P50, run.P99)
		}
		if p.idle == 0 {
			continue
		}
		idle, err := s.idle(ctx, b, p.idle)
		if err != nil {
			return fmt.Errorf("idle: %w", err)
		}
		r.Idle = append(r.Idle, idle)
	}
	return nil
}

func (s *servers) sync(ctx context.Context) error {
	_, err := s.sql.Exec(ctx, `alter system set fsync = on`)
	if err == nil {
		_, err = s.sql.Exec(ctx, `select pg_reload_conf()`)
	}
	return err
}

// withRelay runs use beside a relay that streams from a fresh outbox.
func (s *servers) withRelay(ctx context.Context, b *broker, afterPublish string, use func(*database, *relay) error) (err error) {
	d, err := s.newDatabase(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	r, err := d.startRelay(b, "OUTBOX_AFTER_PUBLISH="+afterPublish)
	if err != nil {
		return err
	}
	err = d.awaitStreaming(ctx, r)
	if err == nil {
		err = use(d, r)
	}
	err = errors.Join(err, r.stop())
	return errors.Join(err, b.js.DeleteStream(context.WithoutCancel(ctx), stream))
}

// idle watches a relay that has nothing to do.
func (s *servers) idle(ctx context.Context, b *broker, length time.Duration) (idle Idle, err error) {
	err = s.withRelay(ctx, b, "keep", func(_ *database, r *relay) error {
		if err := wait.For(ctx, 2*time.Second); err != nil { // what it does at its start is over
			return err
		}
		begin, err := look(r.Pid())
		if err != nil {
			return err
		}
		if err := wait.For(ctx, length); err != nil {
			return err
		}
		end, err := look(r.Pid())
		took := end.at.Sub(begin.at).Seconds()
		idle = Idle{CPU: 100 * (end.cpu - begin.cpu).Seconds() / took, WakeUps: float64(end.wakeUps-begin.wakeUps) / took}
		return err
	})
	return idle, err
}

// glance is what a process has used up to a moment.
type glance struct {
	at      time.Time
	cpu     time.Duration
	wakeUps int64
}

func look(pid int) (g glance, err error) {
	g.at = time.Now()
	if g.cpu, err = cpuTime(pid); err != nil {
		return g, err
	}
	g.wakeUps, err = wakeUps(pid)
	return g, err
}

// latency measures from before each insert is sent to when a consumer gets its
// event.
func (s *servers) latency(ctx context.Context, b *broker, pace Pace, length time.Duration) (run LatencyRun, err error) {
	err = s.withRelay(ctx, b, pace.AfterPublish, func(d *database, _ *relay) error {
		rate := float64(pace.Rate)
		if rate == 0 {
			most := unpaced(length / 2)
			if err := d.drive(ctx, b, most); err != nil {
				return err
			}
			rate = share * most.rate()
		}
		t := paced(rate, length)
		if err := d.drive(ctx, b, t); err != nil {
			return err
		}
		run = t.summary()
		return nil
	})
	return run, err
}
