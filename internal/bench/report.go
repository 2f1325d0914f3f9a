package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
)

// Report is what a run has measured, also as JSON.
type Report struct {
	Postgres   int
	NATS, Go   string
	CPUs       int
	Load       string // averages of 1, 5 and 15 minutes before the run
	Throughput []Throughput
	Latency    []Latency
	Idle       []Idle
}

// Throughput is a workload and what its rounds have shown.
type Throughput struct {
	Workload Workload
	Rounds   []Round
}

// Round is one reading of the same backlog by each, in events a second.
type Round struct {
	Recvlogical float64 // pg_recvlogical into a file
	Discard     float64 // the best reader: it discards
	Raw         float64 // published without Postgres
	Relay       Relayed
}

// Relayed is what the relay did, and what it and the servers used for it, in
// microseconds of CPU an event.
type Relayed struct {
	Rate      float64 // events a second
	CPU       float64 // from its start to its end
	NATS      float64 // all servers
	Walsender float64
	Memory    float64 // the largest resident set, in MiB
}

// Latency is a pace and what its runs have shown.
type Latency struct {
	Pace Pace
	Runs []LatencyRun
}

// LatencyRun is from before an insert is sent to the consumer, and to the answer
// of its commit, in milliseconds.
type LatencyRun struct {
	Rate           float64 // inserts a second, with their arrival
	P50, P99, P999 float64
	Commit         float64 // p50
	CommitP99      float64
}

// Idle is what the relay uses with nothing to do.
type Idle struct {
	CPU     float64 // percent of a core
	WakeUps float64 // a second: how often a thread of it has waited
}

// spread is a figure in all rounds.
type spread struct{ median, least, greatest float64 }

// over takes a figure of each round; of an even number of them the median is the
// mean of the two in the middle.
func over[T any](rounds []T, figure func(T) float64) spread {
	var all []float64
	for _, r := range rounds {
		all = append(all, figure(r))
	}
	slices.SortFunc(all, cmp.Compare[float64])
	n := len(all)
	return spread{(all[(n-1)/2] + all[n/2]) / 2, all[0], all[n-1]}
}

// show is the median, and the least and the greatest where there were more rounds.
func (s spread) show(digits int) string {
	if s.least == s.greatest {
		return fmt.Sprintf("%.*f", digits, s.median)
	}
	return fmt.Sprintf("%.*f (%.*f-%.*f)", digits, s.median, digits, s.least, digits, s.greatest)
}

func (t Throughput) ratio() spread {
	return over(t.Rounds, func(r Round) float64 { return r.Relay.Rate / r.Recvlogical })
}

func (t Throughput) best() spread {
	return over(t.Rounds, func(r Round) float64 { return r.Discard / r.Recvlogical })
}

func (t Throughput) raw() spread {
	return over(t.Rounds, func(r Round) float64 { return r.Raw / r.Recvlogical })
}

// show prints what there is, as tables of Markdown.
func (r Report) show(out io.Writer) error {
	fmt.Fprintf(out, "Postgres %d, NATS %s, %s, %d CPUs, load averages at the start %s. Median (least-greatest) of all rounds;\n"+
		"base: %d a transaction, %d B, %s, %s, R%d.\n\n", r.Postgres, r.NATS, r.Go, r.CPUs, r.Load,
		base.PerTransaction, base.Payload, base.AfterPublish, base.Headers, base.Replicas)
	table := tabwriter.NewWriter(out, 0, 0, 1, ' ', tabwriter.Debug)
	r.showThroughput(table)
	r.showSeasoned(table)
	r.showLatency(table)
	r.showIdle(table)
	return table.Flush()
}

func header(table io.Writer, columns ...string) {
	fmt.Fprintln(table, strings.Join(columns, "\t"))
	fmt.Fprintln(table, strings.Repeat("---\t", len(columns)-1)+"---")
}

func (r Report) showThroughput(table io.Writer) {
	header(table, "workload", "events", "relay, events/s", "ratio to pg_recvlogical", "pg_recvlogical, events/s",
		"best reader, ratio", "without Postgres, ratio", "relay, CPU us an event", "NATS", "walsender", "relay, MiB", "rounds")
	for _, t := range r.Throughput {
		if len(t.Rounds) == 0 {
			continue
		}
		relayed := func(figure func(Relayed) float64) spread {
			return over(t.Rounds, func(r Round) float64 { return figure(r.Relay) })
		}
		fmt.Fprintf(table, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\n", t.Workload.Name, t.Workload.Events,
			relayed(func(r Relayed) float64 { return r.Rate }).show(0),
			t.ratio().show(2),
			over(t.Rounds, func(r Round) float64 { return r.Recvlogical }).show(0),
			t.best().show(2), t.raw().show(2),
			relayed(func(r Relayed) float64 { return r.CPU }).show(1),
			relayed(func(r Relayed) float64 { return r.NATS }).show(1),
			relayed(func(r Relayed) float64 { return r.Walsender }).show(1),
			relayed(func(r Relayed) float64 { return r.Memory }).show(0),
			len(t.Rounds))
	}
}

// showSeasoned shows what is left of the relay's rate on a table that has been in
// use, round by round.
func (r Report) showSeasoned(table io.Writer) {
	var lines []string
	for _, t := range r.Throughput {
		i := slices.IndexFunc(r.Throughput, func(one Throughput) bool { return one.Workload.Name == t.Workload.Fresh })
		if i < 0 || len(t.Rounds) == 0 || len(r.Throughput[i].Rounds) < len(t.Rounds) {
			continue
		}
		fresh := r.Throughput[i]
		var ratios []float64
		for round := range t.Rounds {
			ratios = append(ratios, t.Rounds[round].Relay.Rate/fresh.Rounds[round].Relay.Rate)
		}
		lines = append(lines, fmt.Sprintf("%s\t%s\t%d", t.Workload.Name, over(ratios, func(v float64) float64 { return v }).show(2), len(ratios)))
	}
	if len(lines) > 0 {
		fmt.Fprintln(table)
		header(table, "table that has been in use", "relay, ratio to a fresh table", "rounds")
		fmt.Fprintln(table, strings.Join(lines, "\n"))
	}
}

func (r Report) showLatency(table io.Writer) {
	fmt.Fprintln(table)
	header(table, "latency, single inserts", "inserts/s", "p50 ms", "p99 ms", "p99.9 ms", "commit p50 ms", "commit p99 ms")
	for _, l := range r.Latency {
		if len(l.Runs) == 0 {
			continue
		}
		figure := func(figure func(LatencyRun) float64) string { return over(l.Runs, figure).show(2) }
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.Pace.Name,
			over(l.Runs, func(r LatencyRun) float64 { return r.Rate }).show(0),
			figure(func(r LatencyRun) float64 { return r.P50 }),
			figure(func(r LatencyRun) float64 { return r.P99 }),
			figure(func(r LatencyRun) float64 { return r.P999 }),
			figure(func(r LatencyRun) float64 { return r.Commit }),
			figure(func(r LatencyRun) float64 { return r.CommitP99 }))
	}
}

func (r Report) showIdle(table io.Writer) {
	if len(r.Idle) == 0 {
		return
	}
	fmt.Fprintf(table, "\nidle: %s%% of a core, %s wake-ups/s\n",
		over(r.Idle, func(i Idle) float64 { return i.CPU }).show(3),
		over(r.Idle, func(i Idle) float64 { return i.WakeUps }).show(1))
}

func readReport(path string) (r Report, err error) {
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil {
		err = fmt.Errorf("read the report: %w", err)
	}
	return r, err
}

// save writes the report as JSON, if a file is named.
func (r Report) save(path string) error {
	if path == "" {
		return nil
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
