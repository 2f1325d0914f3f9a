package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"outbox-relay/internal/discard"
)

// paces are the readers that are compared, and reads what they read.
var (
	paces = []struct {
		name string
		pace discard.Pace
	}{{"as the relay", discard.Undisturbed}, {"waits always", discard.Waiting}, {"pauses of 0.4 ms", discard.Pausing}}

	reads = []struct {
		name           string
		share          int // of the events that are asked for: one in so many
		perTransaction int
		text           int
	}{{"200 B, 100 a transaction", 1, 100, usualText}, {"200 B, 1 a transaction", 1, 1, usualText}, {"1 KiB, 100 a transaction", 2, 100, 984}}
)

// readers measures what the walsender costs by how its reader reads.
func readers(ctx context.Context, args []string, out io.Writer) error {
	flags := flags("readers")
	events := flags.Int("events", 100_000, "events of a backlog; of 1 KiB half as many")
	rounds := flags.Int("rounds", 5, "how often each is measured")
	s, err := begin(ctx, flags, args, map[string]string{"autovacuum": "off"}, out)
	if err != nil {
		return err
	}
	defer s.Close()
	all := make([][]sendings, len(reads))
	for i := range all {
		all[i] = make([]sendings, len(paces))
	}
	for round := range *rounds {
		for i := range reads {
			if err := s.readAtEachPace(ctx, round, i, *events, all[i]); err != nil {
				return err
			}
		}
	}
	fmt.Fprintf(out, "%d rounds; median (least-greatest)\n\n", *rounds)
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "backlog\treader\twalsender, CPU us an event\tof the relay's\tits rate, of the relay's")
	for i, b := range reads {
		for k, p := range paces {
			fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", b.name, p.name, all[i][k].cpu, all[i][k].ratio, all[i][k].rate)
		}
	}
	return table.Flush()
}

// readAtEachPace lets each reader have the same backlog, in an order that moves on each
// round.
func (s *server) readAtEachPace(ctx context.Context, round, what, events int, all []sendings) (err error) {
	b := reads[what]
	events = events / b.share / b.perTransaction * b.perTransaction
	d, err := s.piledUp(ctx, ``, len(paces), backlog{
		transactions: events / b.perTransaction, events: b.perTransaction, tables: outboxOnly, text: b.text,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.drop(ctx, d)) }()
	figures := make([]discard.Figures, len(paces))
	for i := range paces {
		i = (i + round) % len(paces)
		figures[i], err = discard.Read(ctx, discard.Reading{URL: d.url, Slot: d.slot(i), Publication: "outbox_relay", Events: events, Pace: paces[i].pace})
		if err != nil {
			return fmt.Errorf("%s: %w", paces[i].name, err)
		}
	}
	for i, f := range figures {
		all[i].add(f, figures[0], float64(events))
	}
	return nil
}
