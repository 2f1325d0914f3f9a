package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"outbox-relay/internal/discard"
)

// memories are what the walsender may use for a transaction before it writes it to
// disk; the first is Postgres's default.
var memories = []string{"64MB", "256MB", "1GB"}

// large measures how a large transaction is read, by logical_decoding_work_mem.
func large(ctx context.Context, args []string, out io.Writer) error {
	flags := flags("large")
	events := flags.Int("events", 1_000_000, "events of the transaction")
	rounds := flags.Int("rounds", 3, "how often each is measured")
	s, err := begin(ctx, flags, args, map[string]string{"autovacuum": "off"}, out)
	if err != nil {
		return err
	}
	defer s.Close()
	all := make([]largeCosts, len(memories))
	for round := range *rounds {
		if err := s.readLarge(ctx, round, *events, all); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "%d rounds, one transaction of %d events; median (least-greatest)\n\n", *rounds, *events)
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "logical_decoding_work_mem\tuntil the first event, s\tevents/s then\tall of it, of the first line's time\twalsender, CPU us an event\tits memory, MiB\twritten to disk, MiB")
	for i, memory := range memories {
		c := all[i]
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", memory, c.wait, c.rate, c.ratio, c.cpu, c.memory, c.spilled)
	}
	return table.Flush()
}

type largeCosts struct{ wait, rate, ratio, cpu, memory, spilled spread }

// readLarge lets each setting read the same transaction, in an order that moves on
// each round.
func (s *server) readLarge(ctx context.Context, round, events int, all []largeCosts) (err error) {
	d, err := s.piledUp(ctx, ``, len(memories), backlog{transactions: 1, events: events, tables: outboxOnly})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.drop(ctx, d)) }()
	took := make([]float64, len(memories))
	for i := range memories {
		i = (i + round) % len(memories)
		f, err := discard.Read(ctx, discard.Reading{
			URL: d.url, Slot: d.slot(i), Publication: "outbox_relay", Events: events,
			Parameters: map[string]string{"logical_decoding_work_mem": memories[i]},
		})
		if err != nil {
			return fmt.Errorf("%s: %w", memories[i], err)
		}
		spilled, err := d.spilled(ctx, d.slot(i))
		if err != nil {
			return err
		}
		took[i] = (f.Wait + f.Took).Seconds()
		c := &all[i]
		c.wait = append(c.wait, f.Wait.Seconds())
		c.rate = append(c.rate, float64(events)/f.Took.Seconds())
		c.cpu = append(c.cpu, float64(f.Walsender.Nanoseconds())/1e3/float64(events))
		c.memory = append(c.memory, float64(f.Memory)/(1<<20))
		c.spilled = append(c.spilled, spilled/(1<<20))
	}
	for i := range all {
		all[i].ratio = append(all[i].ratio, took[i]/took[0])
	}
	return nil
}

// spilled is how many bytes the slot's walsender wrote to disk. It reports them
// when it has ended the transaction or itself.
func (d *database) spilled(ctx context.Context, slot string) (float64, error) {
	for {
		busy, err := value[bool](ctx, d.sql, `select active from pg_replication_slots where slot_name = $1`, slot)
		if err != nil {
			return 0, err
		}
		if !busy {
			return value[float64](ctx, d.sql, `select coalesce(spill_bytes, 0)::float8 from pg_stat_replication_slots where slot_name = $1`, slot)
		}
	}
}
