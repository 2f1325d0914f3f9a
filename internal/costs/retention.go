package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"outbox-relay/internal/wait"
	"outbox-relay/outbox"
)

// restShare is that of relay's housekeeper, whose steps have 200 rows.
const restShare = 4

// load is what the writers do.
type load struct {
	writers int
	length  time.Duration
	old     int // rows that retention can remove, at most
	step    int // rows that it looks at in one statement
}

// writing is what the writers saw, and what retention did meanwhile.
type writing struct {
	commits []time.Duration // how long each insert took with its commit
	took    time.Duration
	removed int
	cpu     time.Duration // of retention's backend
}

func (w writing) rate() float64 { return float64(len(w.commits)) / w.took.Seconds() }

// quantile is in milliseconds.
func (w writing) quantile(q float64) float64 {
	slices.Sort(w.commits)
	return float64(w.commits[int(q*float64(len(w.commits)-1))].Microseconds()) / 1e3
}

// retention lets writers insert with and without retention at work, in turn.
func retention(ctx context.Context, args []string, out io.Writer) error {
	var l load
	flags := flags("retention")
	flags.IntVar(&l.writers, "writers", 2, "connections that insert one event a transaction")
	flags.IntVar(&l.step, "step", 200, "rows that retention looks at in one statement")
	flags.IntVar(&l.old, "old", 400_000, "rows that can be removed while retention is at work")
	flags.DurationVar(&l.length, "for", 5*time.Second, "how long each measurement takes")
	rounds := flags.Int("rounds", 7, "how often each is measured")
	s, err := begin(ctx, flags, args, map[string]string{"fsync": "on", "full_page_writes": "on"}, out)
	if err != nil {
		return err
	}
	defer s.Close()
	d, err := s.migrated(ctx, ``)
	if err != nil {
		return err
	}
	defer d.close(ctx)
	return d.compare(ctx, l, *rounds, out)
}

func (d *database) compare(ctx context.Context, l load, rounds int, out io.Writer) error {
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "round\twithout: inserts/s\tp50 ms\tp99 ms\twith: inserts/s\tp50 ms\tp99 ms\tremoved/s\tits CPU\tratio of inserts\tratio of p99\t")
	var rates, slower, removed spread
	for i := range rounds {
		var both [2]writing // without, with
		for turn := range both {
			which := (turn + i) % 2 // who comes first alternates
			var err error
			if both[which], err = d.write(ctx, l, which == 1); err != nil {
				return err
			}
		}
		without, with := both[0], both[1]
		rates = append(rates, with.rate()/without.rate())
		slower = append(slower, with.quantile(0.99)/without.quantile(0.99))
		removed = append(removed, float64(with.removed)/with.took.Seconds())
		fmt.Fprintf(table, "%d\t%.0f\t%.2f\t%.2f\t%.0f\t%.2f\t%.2f\t%.0f\t%.0f%%\t%.2f\t%.2f\t\n", i+1,
			without.rate(), without.quantile(0.5), without.quantile(0.99), with.rate(), with.quantile(0.5), with.quantile(0.99),
			removed[i], 100*with.cpu.Seconds()/with.took.Seconds(), rates[i], slower[i])
	}
	if err := table.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(out, "\nmedian (least-greatest): inserts %s, p99 %s of what they are without; %s rows removed a second\n", rates, slower, removed)
	return err
}

// write lets the writers work for a while.
func (d *database) write(ctx context.Context, l load, retained bool) (writing, error) {
	if err := d.fill(ctx, l.old); err != nil {
		return writing{}, err
	}
	var w writing
	ctx, cancel := context.WithTimeout(ctx, l.length)
	defer cancel()
	var group errgroup.Group
	each := make([][]time.Duration, l.writers)
	began := time.Now()
	for i := range l.writers {
		group.Go(func() (err error) {
			each[i], err = d.insertUntil(ctx)
			return err
		})
	}
	if retained {
		group.Go(func() error { return d.retainUntil(ctx, l.step, &w) })
	}
	err := group.Wait()
	w.took = time.Since(began)
	w.commits = slices.Concat(each...)
	return w, err
}

// fill makes as many old rows as there were at first, for each measurement. Their
// ids come before all others.
func (d *database) fill(ctx context.Context, old int) error {
	_, err := d.sql.Exec(ctx, `truncate events`)
	if err != nil {
		return err
	}
	for _, sql := range []string{
		`alter table events disable trigger on_events_create`,
		fmt.Sprintf(`insert into events (id, aggregate_type, aggregate_id, event_type, payload, status, created_at, published_at)
			select 'a' || lpad(i::text, 10, '0'), 'order', 'order-' || i, 'created', jsonb_build_object('line', i, 'text', repeat('x', 160)),
				'published', now() - interval '3 h', now() - interval '2 h' from generate_series(1, %d) i`, old),
		`alter table events enable trigger on_events_create`,
		`vacuum analyze events`,
		`checkpoint`,
	} {
		if _, err := d.sql.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

// insertUntil inserts one event a transaction until ctx ends.
func (d *database) insertUntil(ctx context.Context) (commits []time.Duration, err error) {
	conn, err := pgx.Connect(context.WithoutCancel(ctx), d.url)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for ctx.Err() == nil {
		began := time.Now()
		_, err := conn.Exec(context.WithoutCancel(ctx), `insert into events (aggregate_type, aggregate_id, event_type, payload)
			values ('order', 'o-42', 'placed', jsonb_build_object('line', 1, 'text', repeat('x', 160)))`)
		if err != nil {
			return commits, err
		}
		commits = append(commits, time.Since(began))
	}
	return commits, nil
}

// retainUntil removes old rows at the housekeeper's pace until ctx ends.
func (d *database) retainUntil(ctx context.Context, step int, w *writing) error {
	conn, err := pgx.Connect(context.WithoutCancel(ctx), d.url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := planned(ctx, conn); err != nil {
		return err
	}
	before, err := backendCPU(conn)
	if err != nil {
		return err
	}
	table := outbox.Table{Schema: "public", Name: "events", Slot: "costs", Mode: outbox.Mark}
	for after := ""; ctx.Err() == nil; {
		began := time.Now()
		r, err := table.RemovePublished(context.WithoutCancel(ctx), conn, after, time.Hour, step)
		if err != nil {
			return err
		}
		if r.End {
			return errors.New("retention came to its end: give it more rows with -old")
		}
		w.removed += r.Removed
		after = r.Last
		_ = wait.For(ctx, restShare*time.Since(began))
	}
	now, err := backendCPU(conn)
	w.cpu = now - before
	return err
}
