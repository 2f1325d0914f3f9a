// Bench measures the relay against its limit: pg_recvlogical, which reads the
// same backlog through the same publication into a file. Both run on a
// throw-away Postgres and a real NATS server, in turn, and what counts is their
// ratio in one run.
//
//	go run ./internal/bench -events 300000 -per-transaction 100
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// backlog is what is measured: rows that stand in WAL before the clock starts.
type backlog struct {
	events         int
	perTransaction int
	payload        int // bytes, about
}

func run(ctx context.Context, args []string, out io.Writer) error {
	var load backlog
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.IntVar(&load.events, "events", 300_000, "rows in the backlog")
	flags.IntVar(&load.perTransaction, "per-transaction", 100, "inserts a transaction")
	flags.IntVar(&load.payload, "payload", 200, "bytes of a payload")
	rounds := flags.Int("rounds", 3, "how often each reader reads the backlog, in turn")
	after := flags.String("after-publish", "keep", "OUTBOX_AFTER_PUBLISH")
	headers := flags.String("headers", "cloudevents", "OUTBOX_HEADERS")
	if err := flags.Parse(args); err != nil {
		return err
	}
	s, err := newServers(ctx)
	if err != nil {
		return errors.Join(err, s.close())
	}
	err = compare(ctx, s, load, *rounds, []string{"OUTBOX_AFTER_PUBLISH=" + *after, "OUTBOX_HEADERS=" + *headers}, out)
	return errors.Join(err, s.close())
}

// round is what one reading by each reader showed.
type round struct {
	limit, relay measurement
}

func (r round) ratio() float64 { return r.relay.rate() / r.limit.rate() }

// compare lets both readers read the backlog in turn, and prints a line a round
// and their medians.
func compare(ctx context.Context, s *servers, load backlog, rounds int, settings []string, out io.Writer) error {
	if err := s.prepare(ctx, rounds, settings); err != nil {
		return err
	}
	if err := s.fill(ctx, load); err != nil {
		return fmt.Errorf("write the backlog: %w", err)
	}
	fmt.Fprintf(out, "%d events, %d a transaction, %d B of payload; Postgres %d, NATS %s, %d CPUs\n\n",
		load.events, load.perTransaction, load.payload, s.postgres.Version(), natsVersion, runtime.NumCPU())
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "round\tpg_recvlogical\trelay\tratio\tCPU an event\tpeak memory\t")
	var all []round
	for i := range rounds {
		var r round
		var err error
		if r.limit, err = s.readByRecvlogical(ctx, i, load.events); err != nil {
			return fmt.Errorf("pg_recvlogical: %w", err)
		}
		if r.relay, err = s.readByRelay(ctx, i, load.events, settings); err != nil {
			return fmt.Errorf("relay: %w", err)
		}
		all = append(all, r)
		line(table, fmt.Sprint(i+1), r.limit.rate(), r.relay.rate(), r.ratio(), r.relay)
	}
	limit := median(all, func(r round) float64 { return r.limit.rate() })
	relay := median(all, func(r round) float64 { return r.relay.rate() })
	line(table, "median", limit, relay, relay/limit, all[len(all)-1].relay)
	return table.Flush()
}

func line(w io.Writer, name string, limit, relay, ratio float64, m measurement) {
	fmt.Fprintf(w, "%s\t%.0f/s\t%.0f/s\t%.2f\t%.2f us\t%.0f MiB\t\n", name, limit, relay, ratio,
		float64(m.cpu.Nanoseconds())/1e3/float64(m.events), float64(m.memory)/(1<<20))
}

func median(all []round, figure func(round) float64) float64 {
	figures := make([]float64, len(all))
	for i, r := range all {
		figures[i] = figure(r)
	}
	slices.SortFunc(figures, cmp.Compare[float64])
	return figures[len(figures)/2]
}

// measurement is one reading of the backlog.
type measurement struct {
	events int
	took   time.Duration // from the first event to the last one
	cpu    time.Duration // of the reader, user and system
	memory int64         // its largest resident set, in bytes
}

func (m measurement) rate() float64 { return float64(m.events) / m.took.Seconds() }
