package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"

	"outbox-relay/internal/discard"
)

// shardTables are four outboxes, each with a publication of its name.
const shardTables = `
	do $$ begin
		for n in 0..3 loop
			execute format('create table shard_%s (like events including all)', n);
			execute format('create trigger on_events_create before insert on shard_%s for each row execute function on_events_create()', n);
			execute format('create publication shard_%s for table only shard_%s
				(id, version, aggregate_type, aggregate_id, event_type, payload, headers, status, created_at) with (publish = ''insert'')', n, n);
		end loop;
	end $$`

// slotCase is how many slots read at once.
type slotCase struct {
	name    string
	slots   int
	sharded bool // each has its own table with a share of the events
}

var slotCases = []slotCase{
	{"1 slot", 1, false}, {"2 slots, all events each", 2, false}, {"4 slots, all events each", 4, false},
	{"2 tables, a slot each", 2, true}, {"4 tables, a slot each", 4, true},
}

type slotCosts struct{ total, ratio, each, rate spread }

// slots measures what each more slot costs: every walsender decodes all of WAL.
func slots(ctx context.Context, args []string, out io.Writer) error {
	flags := flags("slots")
	events := flags.Int("events", 100_000, "events of a backlog, 100 a transaction")
	rounds := flags.Int("rounds", 5, "how often each is measured")
	s, err := begin(ctx, flags, args, map[string]string{"autovacuum": "off", "max_replication_slots": "50", "max_wal_senders": "20"}, out)
	if err != nil {
		return err
	}
	defer s.Close()
	all := make([]slotCosts, len(slotCases))
	for round := range *rounds {
		if err := s.readSlots(ctx, round, *events, all); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "%d rounds, %d events in all, 100 a transaction; median (least-greatest)\n\n", *rounds, *events)
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "read by\tall walsenders, CPU us an event of the outbox\tof 1 slot's\tone walsender\tuntil all have ended, of 1 slot's rate")
	for i, c := range slotCases {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", c.name, all[i].total, all[i].ratio, all[i].each, all[i].rate)
	}
	return table.Flush()
}

// readSlots measures every case once, on backlogs of the same size.
func (s *server) readSlots(ctx context.Context, round, events int, all []slotCosts) error {
	cpu, rate := make([]float64, len(slotCases)), make([]float64, len(slotCases))
	for i := range slotCases {
		i = (i + round) % len(slotCases)
		used, took, err := s.readSlotCase(ctx, slotCases[i], events)
		if err != nil {
			return fmt.Errorf("%s: %w", slotCases[i].name, err)
		}
		cpu[i], rate[i] = float64(used.Nanoseconds())/1e3/float64(events), float64(events)/took.Seconds()
	}
	for i, c := range slotCases {
		a := &all[i]
		a.total, a.ratio = append(a.total, cpu[i]), append(a.ratio, cpu[i]/cpu[0])
		a.each, a.rate = append(a.each, cpu[i]/float64(c.slots)), append(a.rate, rate[i]/rate[0])
	}
	return nil
}

func (s *server) readSlotCase(ctx context.Context, c slotCase, events int) (cpu, took time.Duration, err error) {
	b := backlog{transactions: events / 100, events: 100, tables: outboxOnly}
	if c.sharded {
		b.tables = shardNames(c.slots)
	}
	d, err := s.piledUp(ctx, shardTables, c.slots, b)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, s.drop(ctx, d)) }()
	used := make([]time.Duration, c.slots)
	var group errgroup.Group
	began := time.Now()
	for i := range c.slots {
		reading := discard.Reading{URL: d.url, Slot: d.slot(i), Publication: "outbox_relay", Events: events}
		if c.sharded {
			reading.Publication, reading.Events = b.tables[i], events/c.slots
		}
		group.Go(func() error {
			f, err := discard.Read(ctx, reading)
			used[i] = f.Walsender
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return 0, 0, err
	}
	took = time.Since(began)
	for _, u := range used {
		cpu += u
	}
	return cpu, took, nil
}

func shardNames(n int) (names []string) {
	for i := range n {
		names = append(names, fmt.Sprintf("shard_%d", i))
	}
	return names
}
