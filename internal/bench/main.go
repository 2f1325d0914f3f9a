// Bench measures the relay against the limits of what is around it, on a
// throw-away Postgres and a real NATS server: pg_recvlogical, which reads the same
// backlog through the same publication into a file; a reader at the relay's own
// pace that only counts; and publishing without Postgres. What counts is their
// ratio within a round. Then it measures latency, and what an idle relay uses.
// Linux only: it reads CPU times and memory from /proc.
//
//	go run ./internal/bench                      half an hour
//	go run ./internal/bench -quick               two minutes
//	go run ./internal/bench -only mark -rounds 9
//	go run ./internal/bench -from bench.json -svg docs/performance.svg
//	go run ./internal/bench scale backlog        how cost grows (backlog, subjects, noise)
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	if len(args) > 0 && args[0] == "scale" {
		return scale(ctx, args[1:], out)
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	quick := flags.Bool("quick", false, "small backlogs, read once")
	rounds := flags.Int("rounds", 0, "how often everything is measured (5, quick 1)")
	only := flags.String("only", "", "the cases whose name has it")
	from := flags.String("from", "", "a report in JSON to show instead of measuring")
	asJSON := flags.String("json", "", "file for the report in JSON")
	asSVG := flags.String("svg", "", "file for the picture")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var r Report
	var err error
	if *from != "" {
		r, err = readReport(*from)
	} else {
		r, err = measure(ctx, newPlan(*quick, *rounds, *only), os.Stderr)
	}
	// What was measured before a fault, or before Ctrl-C, is shown all the same.
	return errors.Join(err, r.show(out), r.save(*asJSON), r.draw(*asSVG))
}

// measure runs the plan. With an error, the report has what came before it.
func measure(ctx context.Context, p plan, progress io.Writer) (Report, error) {
	r := p.report()
	s, err := newServers(ctx)
	if err == nil {
		r.Postgres = s.postgres.Version()
		err = errors.Join(s.throughput(ctx, p, &r, progress), s.responsiveness(ctx, p, &r, progress))
	}
	return r, errors.Join(err, s.close())
}
