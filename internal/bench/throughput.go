package main

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// throughput measures every workload, in rounds: what else the machine does falls
// on all of them.
func (s *servers) throughput(ctx context.Context, p plan, r *Report, progress io.Writer) error {
	for i := range p.rounds {
		for j := range r.Throughput {
			t := &r.Throughput[j]
			if t.Workload.Once && i < p.rounds-1 {
				continue
			}
			round, err := s.round(ctx, t.Workload, i)
			if err != nil {
				return fmt.Errorf("%s: %w", t.Workload.Name, err)
			}
			t.Rounds = append(t.Rounds, round)
			fmt.Fprintf(progress, "round %d, %s: %.0f/s, pg_recvlogical %.0f/s, discarding %.0f/s, without Postgres %.0f/s\n",
				i+1, t.Workload.Name, round.Relay.Rate, round.Recvlogical, round.Discard, round.Raw)
		}
	}
	return nil
}

// round lets everybody read the same backlog, and publishes one without Postgres.
func (s *servers) round(ctx context.Context, w Workload, number int) (r Round, err error) {
	b, err := s.startBroker(ctx, w.Replicas)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	template, err := s.seasonedTemplate(ctx, w.History)
	if err != nil {
		return r, fmt.Errorf("write the history: %w", err)
	}
	d, err := s.copyDatabase(ctx, template)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	end, err := d.prepare(ctx, b, w)
	if err != nil {
		return r, fmt.Errorf("write the backlog: %w", err)
	}
	measurements := []func() error{
		func() (err error) {
			r.Recvlogical, err = d.readByRecvlogical(ctx, w, end)
			return named("pg_recvlogical", err)
		},
		func() (err error) { r.Discard, err = d.readAndDiscard(ctx, w); return named("discarding", err) },
		func() (err error) { r.Raw, err = b.publishRaw(ctx, w); return named("without Postgres", err) },
		func() (err error) { r.Relay, err = d.readByRelay(ctx, b, w); return named("relay", err) },
	}
	for i := range measurements { // who comes first alternates
		if err := measurements[(i+number)%len(measurements)](); err != nil {
			return r, err
		}
	}
	return r, nil
}

// prepare makes everybody's slot, and then the backlog that they will read.
func (d *database) prepare(ctx context.Context, b *broker, w Workload) (end string, err error) {
	if err := d.makeRelaySlot(ctx, b, w); err != nil {
		return "", err
	}
	for _, reader := range []string{"limit", "discard"} {
		if err := d.createSlot(ctx, reader); err != nil {
			return "", err
		}
	}
	return d.fill(ctx, w)
}

func named(what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}
