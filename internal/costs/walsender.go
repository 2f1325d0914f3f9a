package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"outbox-relay/internal/discard"
)

// reading is a way to read the backlog.
type reading struct {
	name        string
	publication string
	options     []string // of pgoutput; nil: the relay's
	since       int      // Postgres version
	share       int      // every how many events come; 0: all
}

// publications are made beside the relay's own, which `migrate` made.
const publications = `
	create publication all_columns for table only events with (publish = 'insert', publish_via_partition_root = true);
	create publication not_via_root for table only events (id, version, aggregate_type, aggregate_id, event_type, payload, headers, status, created_at)
		with (publish = 'insert');
	create publication everything for all tables;
	create publication all_operations for table only events (id, version, aggregate_type, aggregate_id, event_type, payload, headers, status, created_at)
		with (publish = 'insert, update, delete, truncate', publish_via_partition_root = true);
	create publication one_in_four for table only events (id, version, aggregate_type, aggregate_id, event_type, payload, headers, status, created_at)
		where ((pg_catalog.hashtext(aggregate_id) & 3) = 0) with (publish = 'insert', publish_via_partition_root = true)`

var readings = []reading{
	{name: "as the relay", publication: "outbox_relay"},
	{name: "all columns", publication: "all_columns"},
	{name: "for all tables, with no options", publication: "everything"},
	{name: "not via root", publication: "not_via_root"},
	{name: "updates too", publication: "all_operations"},
	{name: "row filter, one event in four", publication: "one_in_four", share: 4},
	{name: "messages false", publication: "outbox_relay", options: []string{"proto_version '1'"}},
	{name: "binary", publication: "outbox_relay", options: []string{"proto_version '1'", "messages 'true'", "binary 'true'"}},
	{name: "proto_version 2", publication: "outbox_relay", options: []string{"proto_version '2'", "messages 'true'"}},
	{name: "proto_version 2, streaming", publication: "outbox_relay", options: []string{"proto_version '2'", "messages 'true'", "streaming 'on'"}},
	{name: "proto_version 4, streaming parallel", publication: "outbox_relay", since: 16,
		options: []string{"proto_version '4'", "messages 'true'", "streaming 'parallel'"}},
}

// backlogs are what is read: in small transactions, and with each row marked as
// the relay marks it.
var backlogs = []struct {
	name   string
	marked bool
}{{"rows that are left alone", false}, {"rows that are marked", true}}

// walsender measures what the walsender costs, by publication and options.
func walsender(ctx context.Context, args []string, out io.Writer) error {
	flags := flags("walsender")
	events := flags.Int("events", 100_000, "events of a backlog, 100 a transaction")
	rounds := flags.Int("rounds", 5, "how often each is measured")
	s, err := begin(ctx, flags, args, map[string]string{"autovacuum": "off", "max_replication_slots": "50"}, out)
	if err != nil {
		return err
	}
	defer s.Close()
	all := make([]map[string]*sendings, len(backlogs))
	for i := range all {
		all[i] = map[string]*sendings{}
	}
	// What was measured before a fault, or before Ctrl-C, is shown all the same.
	done, err := 0, error(nil)
	for err == nil && done < *rounds {
		for i, b := range backlogs {
			err = errors.Join(err, s.send(ctx, done, *events, b.marked, all[i]))
		}
		if err == nil {
			done++
		}
	}
	fmt.Fprintf(out, "%d whole rounds, %d events, 100 a transaction; median (least-greatest)\n", done, *events)
	for i, b := range backlogs {
		fmt.Fprintf(out, "\n%s\n\n", b.name)
		err = errors.Join(err, showSendings(out, all[i]))
	}
	return err
}

// sendings are the figures of a reading in all rounds, an event of the backlog.
type sendings struct {
	cpu, ratio spread // microseconds; of the relay's reading in the same round
	rate       spread // events a second, of the relay's in the same round
	bytes      float64
}

func showSendings(out io.Writer, all map[string]*sendings) error {
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "reading\twalsender, CPU us an event\tof the relay's\tits rate, of the relay's\tbytes an event")
	for _, r := range readings {
		if c := all[r.name]; c != nil {
			fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%.0f\n", r.name, c.cpu, c.ratio, c.rate, c.bytes)
		}
	}
	return table.Flush()
}

// send lets each reading have the same backlog, in an order that moves on each
// round.
func (s *server) send(ctx context.Context, round, events int, marked bool, all map[string]*sendings) (err error) {
	d, err := s.piledUp(ctx, publications, len(readings), backlog{transactions: events / 100, events: 100, tables: outboxOnly, marked: marked})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.drop(ctx, d)) }()
	figures := map[string]discard.Figures{}
	for i := range readings {
		i = (i + round) % len(readings)
		r := readings[i]
		if r.since > s.Version() {
			continue
		}
		inserts := events
		if r.share > 0 {
			if inserts, err = value[int](ctx, d.sql, `select count(*) from events where (pg_catalog.hashtext(aggregate_id) & 3) = 0`); err != nil {
				return err
			}
		}
		figures[r.name], err = discard.Read(ctx, discard.Reading{
			URL: d.url, Slot: d.slot(i), Publication: r.publication, Options: r.options, Events: inserts,
		})
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
	}
	addSendings(all, figures, float64(events))
	return nil
}

func addSendings(all map[string]*sendings, figures map[string]discard.Figures, events float64) {
	relay := figures[readings[0].name]
	for name, f := range figures {
		if all[name] == nil {
			all[name] = &sendings{bytes: float64(f.Bytes) / events}
		}
		all[name].add(f, relay, events)
	}
}

// add adds the figures of one reading, beside those of the relay's in the same round.
func (c *sendings) add(f, relay discard.Figures, events float64) {
	c.cpu = append(c.cpu, float64(f.Walsender.Nanoseconds())/1e3/events)
	c.ratio = append(c.ratio, f.Walsender.Seconds()/relay.Walsender.Seconds())
	c.rate = append(c.rate, relay.Took.Seconds()/f.Took.Seconds())
}
