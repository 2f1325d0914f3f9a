package main

import (
	"cmp"
	"runtime"
	"strings"
	"time"
)

// Workload is a backlog, rows that stand in WAL before the clock starts, and how
// the relay is set up to publish it.
type Workload struct {
	Name           string
	Events         int
	PerTransaction int
	Payload        int    // bytes, about
	AfterPublish   string // OUTBOX_AFTER_PUBLISH
	Headers        string // OUTBOX_HEADERS
	Replicas       int    // of the stream; as many NATS servers run
	Once           bool   // so large that only the last round has it
	History        int    // published rows that the table has, vacuumed and analyzed; 0: a fresh table
	Fresh          string // the workload that differs by History alone
}

// base is what every other workload differs from by one factor.
var base = Workload{Name: "base", Events: 200_000, PerTransaction: 100, Payload: 200, AfterPublish: "keep", Headers: "cloudevents", Replicas: 1}

// A table that has been in use has so many published rows. What costs more with them
// shows beside the same workload on a fresh one.
const (
	history      = 1_000_000
	seasonedName = ", seasoned"
)

func workloads() []Workload {
	all := []Workload{base}
	vary := func(name string, factor func(*Workload)) {
		w := base
		w.Name = name
		factor(&w)
		all = append(all, w)
	}
	seasoned := func(fresh Workload) {
		w := fresh
		w.Name, w.History, w.Fresh = fresh.Name+seasonedName, history, fresh.Name
		all = append(all, w)
	}
	seasoned(base)
	vary("1 a transaction", func(w *Workload) { w.PerTransaction = 1 })
	vary("1 KiB", func(w *Workload) { w.Payload, w.Events = 1<<10, 100_000 })
	vary("16 KiB", func(w *Workload) { w.Payload, w.Events = 16<<10, 15_000 })
	vary("256 KiB", func(w *Workload) { w.Payload, w.Events = 256<<10, 1000 })
	vary("mark", func(w *Workload) { w.AfterPublish = "mark" })
	seasoned(all[len(all)-1])
	vary("delete", func(w *Workload) { w.AfterPublish = "delete" })
	vary("minimal headers", func(w *Workload) { w.Headers = "minimal" })
	vary("3 replicas", func(w *Workload) { w.Replicas = 3 })
	vary("one transaction", func(w *Workload) { w.Events, w.PerTransaction, w.Once = 5_000_000, 5_000_000, true })
	return all
}

// smaller is the workload for a quick look. Its figures have more of the start in
// them.
func (w Workload) smaller() Workload {
	w.Events /= 5
	w.History /= 5
	if w.PerTransaction > w.Events {
		w.Events /= 4
		w.PerTransaction = w.Events
	}
	return w
}

// Pace is a rate of single inserts at which latency is measured.
type Pace struct {
	Name         string
	Rate         int // inserts a second; 0: 80% of what can be inserted and relayed at once
	AfterPublish string
}

var paces = []Pace{
	{"100/s", 100, "keep"},
	{"1,000/s", 1000, "keep"},
	{"3,000/s", 3000, "keep"},
	{"80% of the most", 0, "keep"},
	{"1,000/s, mark", 1000, "mark"},
}

// plan is what is measured in one run.
type plan struct {
	workloads []Workload
	paces     []Pace
	rounds    int
	pace      time.Duration // how long each rate of inserts is held
	idle      time.Duration // how long the idle relay is watched
}

func newPlan(quick bool, rounds int, only string) plan {
	p := plan{rounds: cmp.Or(rounds, 5), pace: 12 * time.Second, idle: 30 * time.Second}
	if quick {
		p = plan{rounds: cmp.Or(rounds, 1), pace: 4 * time.Second, idle: 5 * time.Second}
	}
	for _, w := range workloads() {
		if quick {
			w = w.smaller()
		}
		if strings.Contains(w.Name, only) {
			p.workloads = append(p.workloads, w)
		}
	}
	for _, pace := range paces {
		if strings.Contains("latency at "+pace.Name, only) {
			p.paces = append(p.paces, pace)
		}
	}
	if !strings.Contains("idle", only) {
		p.idle = 0
	}
	return p
}

// report is the plan's, without figures yet.
func (p plan) report() Report {
	r := Report{NATS: natsVersion, Go: runtime.Version(), CPUs: runtime.NumCPU(), Load: loadAverage()}
	for _, w := range p.workloads {
		r.Throughput = append(r.Throughput, Throughput{Workload: w})
	}
	for _, pace := range p.paces {
		r.Latency = append(r.Latency, Latency{Pace: pace})
	}
	return r
}
