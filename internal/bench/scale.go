package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// scales are what the relay's cost could grow with.
var scales = map[string]func(context.Context, *servers, []string, io.Writer) error{
	"backlog": scaleBacklog, "subjects": scaleSubjects, "noise": scaleNoise,
}

// scale measures how cost grows: go run ./internal/bench scale backlog.
func scale(ctx context.Context, args []string, out io.Writer) error {
	if len(args) == 0 || scales[args[0]] == nil {
		return fmt.Errorf("say what is to grow: one of %s", strings.Join(slices.Sorted(maps.Keys(scales)), ", "))
	}
	s, err := newServers(ctx)
	if err == nil {
		fmt.Fprintf(out, "Postgres %d, NATS %s, load average %s\n\n", s.postgres.Version(), natsVersion, loadAverage())
		err = scales[args[0]](ctx, s, args[1:], out)
	}
	return errors.Join(err, s.close())
}

func scaleFlags(name string) *flag.FlagSet {
	return flag.NewFlagSet("bench scale "+name, flag.ContinueOnError)
}

// pile is a backlog, 100 events a transaction, keep, cloudevents, one replica.
type pile struct {
	events     int
	aggregates int  // distinct subjects
	noise      bool // after each transaction, another table has 50 times its WAL
}

// aggregateSubject gives each aggregate a subject.
const aggregateSubject = "OUTBOX_SUBJECT=events.{aggregate_type}.{aggregate_id}"

// prepareScale makes the relay's slot and stream.
func (d *database) prepareScale(ctx context.Context, b *broker) error {
	r, err := d.startRelay(b, scaleSettings...)
	if err != nil {
		return err
	}
	err = d.awaitStreaming(ctx, r)
	return errors.Join(err, r.stop())
}

var scaleSettings = append(base.settings(), aggregateSubject)

// pileUpEvents writes the backlog. Ids are given instead of made, which is half the
// work; the random text of the noise is hardly compressed.
func (d *database) pileUpEvents(ctx context.Context, p pile) error {
	_, err := d.sql.Exec(ctx, `set synchronous_commit = off;
		alter table events disable trigger on_events_create;
		create table if not exists unrelated (id bigint generated always as identity primary key, text text);
		create sequence if not exists numbers;
		create or replace procedure pile_up(transactions int, aggregates int, noise bool) language plpgsql as $$
		declare
			pool text;
			at   bigint;
		begin
			select string_agg(md5(random()::text), '') into pool from generate_series(1, 200);
			for t in 1..transactions loop
				at := nextval('numbers') * 100;
				insert into events (id, version, status, created_at, aggregate_type, aggregate_id, event_type, payload)
				select 'event_' || lpad((at + i)::text, 26, '0'), 0, 'pending', now(), 'order', 'order-' || (at + i) % aggregates, 'created',
					jsonb_build_object('order', t, 'line', i, 'text', substr(pool, 1 + (t + i) % 3000, 160)) from generate_series(1, 100) i;
				commit;
				if noise then
					insert into unrelated (text) select substr(pool, 1 + i % 3000, 1900) from generate_series(1, 1450) i;
					commit;
				end if;
			end loop;
		end $$`)
	if err != nil {
		return err
	}
	if _, err := d.sql.Exec(ctx, `call pile_up($1, $2, $3)`, p.events/100, p.aggregates, p.noise); err != nil {
		return err
	}
	_, err = d.sql.Exec(ctx, `checkpoint`)
	return err
}

// sample is where everybody stands when the stream has so many messages.
type sample struct {
	events                 uint64
	at                     time.Time
	relay, nats, walsender time.Duration // of CPU
	relayMemory            int64         // peak, in bytes
	natsMemory             int64         // at present
}

// sampled lets the relay take the backlog, and looks at it whenever the stream has
// got that many more events, to the last one. The first sample is of the first
// event, so that starting is not in the figures.
func (d *database) sampled(ctx context.Context, b *broker, events, every int) (samples []sample, err error) {
	info, err := b.js.Stream(ctx, stream)
	if err != nil {
		return nil, err
	}
	before := info.CachedInfo().State.LastSeq
	r, err := d.startRelay(b, scaleSettings...)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.stop()) }()
	for next := before + 1; next <= before+uint64(events); {
		var last uint64
		err := await(ctx, fmt.Sprintf("%d events", next), 20*time.Millisecond, func() (bool, error) {
			info, err := b.js.Stream(ctx, stream)
			if err == nil {
				last = info.CachedInfo().State.LastSeq
			}
			return last >= next || isDone(r.Process), err
		})
		if err != nil {
			return samples, err
		}
		s, err := d.look(ctx, b, r, last)
		if err != nil {
			return samples, err
		}
		samples = append(samples, s)
		next = min(before+uint64(len(samples)*every), before+uint64(events))
		if last == before+uint64(events) {
			return samples, nil
		}
	}
	return samples, nil
}

func (d *database) look(ctx context.Context, b *broker, r *relay, last uint64) (s sample, err error) {
	s.at, s.events = time.Now(), last
	if s.relay, err = cpuTime(r.Pid()); err != nil {
		return s, err
	}
	used, err := d.usage(ctx, b, r)
	if err != nil {
		return s, err
	}
	s.nats, s.walsender, s.relayMemory = used.nats, used.walsender, used.memory
	s.natsMemory, err = residentMemory(b.nodes[0].Pid())
	return s, err
}

// columns of a table of samples.
const sampleColumns = "events/s\trelay, CPU us an event\tNATS\twalsender\trelay, peak MiB\tNATS, MiB"

// between shows what was used between two samples.
func between(from, to sample) string {
	n := float64(to.events - from.events)
	each := func(from, to time.Duration) float64 { return float64((to - from).Nanoseconds()) / 1e3 / n }
	return fmt.Sprintf("%.0f\t%.2f\t%.1f\t%.1f\t%d\t%d", n/to.at.Sub(from.at).Seconds(), each(from.relay, to.relay),
		each(from.nats, to.nats), each(from.walsender, to.walsender), to.relayMemory>>20, to.natsMemory>>20)
}

// scaleBacklog measures one backlog in ten parts, so that what grows with it, or
// with the age of the stream, shows. Then the broker is started again, and the
// relay, with a small backlog behind the large one.
func scaleBacklog(ctx context.Context, s *servers, args []string, out io.Writer) (err error) {
	flags := scaleFlags("backlog")
	events := flags.Int("events", 1_000_000, "of the backlog")
	small := flags.Int("small", 100_000, "events of the backlog for the old stream")
	if err := flags.Parse(args); err != nil {
		return err
	}
	b, err := s.startBroker(ctx, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	d, err := s.newDatabase(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := d.prepareScale(ctx, b); err != nil {
		return err
	}
	began := time.Now()
	if err := d.pileUpEvents(ctx, pile{events: *events, aggregates: 1000}); err != nil {
		return err
	}
	fmt.Fprintf(out, "%d events, written in %.0f s\n\n", *events, time.Since(began).Seconds())
	samples, err := d.sampled(ctx, b, *events, *events/10)
	if len(samples) < 2 {
		return err
	}
	// What was measured before a fault, or before Ctrl-C, is shown all the same.
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "events in the stream\t"+sampleColumns)
	for i := range samples[1:] {
		fmt.Fprintf(table, "%d\t%s\n", samples[i+1].events, between(samples[i], samples[i+1]))
	}
	fmt.Fprintf(table, "all\t%s\n", between(samples[0], samples[len(samples)-1]))
	if err := errors.Join(table.Flush(), err); err != nil {
		return err
	}
	return d.startAgain(ctx, b, *small, out)
}

// startAgain measures the start on a stream that is old.
func (d *database) startAgain(ctx context.Context, b *broker, events int, out io.Writer) error {
	if err := d.pileUpEvents(ctx, pile{events: events, aggregates: 1000}); err != nil {
		return err
	}
	began := time.Now()
	if err := b.restart(ctx, d.servers.path("nats-server")); err != nil {
		return err
	}
	broker := time.Since(began)
	began = time.Now()
	samples, err := d.sampled(ctx, b, events, events/2)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "\nstarted again: NATS has the stream after %.1f s; the relay's first event of %d more is stored after %.1f s\n%s\n%s\n",
		broker.Seconds(), events, samples[0].at.Sub(began).Seconds(),
		strings.ReplaceAll(sampleColumns, "\t", "; "), strings.ReplaceAll(between(samples[0], samples[len(samples)-1]), "\t", "; "))
	return err
}

// restart ends a broker of one node and starts it on its store, until it has the
// stream.
func (b *broker) restart(ctx context.Context, program string) error {
	b.nc.Close()
	_ = b.nodes[0].Signal(syscall.SIGTERM) // it may have ended
	<-b.nodes[0].Done()
	b.nodes, b.urls = nil, nil
	if err := b.launch(program, 1); err != nil {
		return err
	}
	if err := b.connect(ctx); err != nil {
		return err
	}
	_, err := b.js.Stream(ctx, stream)
	return err
}

// scaleSubjects measures the same backlog with ever more distinct subjects.
func scaleSubjects(ctx context.Context, s *servers, args []string, out io.Writer) error {
	flags := scaleFlags("subjects")
	events := flags.Int("events", 1_000_000, "of a backlog")
	rounds := flags.Int("rounds", 1, "how often each is measured")
	if err := flags.Parse(args); err != nil {
		return err
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "round\tsubjects\tWAL, MiB\t"+sampleColumns)
	for round := range *rounds {
		for _, subjects := range []int{1, 1000, *events / 10, *events} {
			figures, err := s.measurePile(ctx, pile{events: *events, aggregates: subjects})
			if err != nil { // what was measured before is shown all the same
				return errors.Join(fmt.Errorf("%d subjects: %w", subjects, err), table.Flush())
			}
			fmt.Fprintf(table, "%d\t%d\t%s\n", round+1, subjects, figures)
		}
	}
	return table.Flush()
}

// scaleNoise measures a backlog between whose transactions another table has 50
// times its WAL, beside one without.
func scaleNoise(ctx context.Context, s *servers, args []string, out io.Writer) error {
	flags := scaleFlags("noise")
	events := flags.Int("events", 20_000, "of a backlog")
	rounds := flags.Int("rounds", 3, "how often each is measured")
	if err := flags.Parse(args); err != nil {
		return err
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "round\tanother table\tWAL, MiB\t"+sampleColumns)
	for round := range *rounds {
		for _, noise := range []bool{false, true} {
			figures, err := s.measurePile(ctx, pile{events: *events, aggregates: 1000, noise: noise})
			if err != nil {
				return errors.Join(err, table.Flush())
			}
			fmt.Fprintf(table, "%d\t%t\t%s\n", round+1, noise, figures)
		}
	}
	return table.Flush()
}

// measurePile measures a backlog on servers of its own, from its first event, and
// says how much WAL it is.
func (s *servers) measurePile(ctx context.Context, p pile) (figures string, err error) {
	b, err := s.startBroker(ctx, 1)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	d, err := s.newDatabase(ctx)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := d.prepareScale(ctx, b); err != nil {
		return "", err
	}
	var start string
	if err := d.sql.QueryRow(ctx, `select pg_current_wal_insert_lsn()::text`).Scan(&start); err != nil {
		return "", err
	}
	if err := d.pileUpEvents(ctx, p); err != nil {
		return "", err
	}
	var wal int64
	if err := d.sql.QueryRow(ctx, `select (pg_current_wal_insert_lsn() - $1::pg_lsn)::bigint`, start).Scan(&wal); err != nil {
		return "", err
	}
	samples, err := d.sampled(ctx, b, p.events, p.events)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d\t%s", wal>>20, between(samples[0], samples[len(samples)-1])), nil
}

// residentMemory is what a process has in memory at present, in bytes.
func residentMemory(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	kib, err := statusField(string(text), "VmRSS")
	return kib << 10, err
}
