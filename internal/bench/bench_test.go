package main

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Every workload but the first differs from the base by one factor, or from one on a
// fresh table by its history, and is whole.
func TestWorkloads(t *testing.T) {
	names := map[string]bool{}
	for i, w := range workloads() {
		if names[w.Name] {
			t.Errorf("%s is there twice", w.Name)
		}
		names[w.Name] = true
		from := base
		if fresh := slices.IndexFunc(workloads(), func(one Workload) bool { return one.Name == w.Fresh }); fresh >= 0 {
			from = workloads()[fresh]
		}
		if n := factors(w, from); n != min(i, 1) {
			t.Errorf("%s differs from %s by %d factors", w.Name, from.Name, n)
		}
		for _, size := range []Workload{w, w.smaller()} {
			if size.Events == 0 || size.Events%size.PerTransaction != 0 {
				t.Errorf("%s: %d events are no multiple of %d a transaction", w.Name, size.Events, size.PerTransaction)
			}
		}
	}
}

func factors(w, from Workload) (n int) {
	for _, differs := range []bool{
		w.PerTransaction != from.PerTransaction, w.Payload != from.Payload, w.AfterPublish != from.AfterPublish,
		w.Headers != from.Headers, w.Replicas != from.Replicas, w.History != from.History,
	} {
		if differs {
			n++
		}
	}
	return n
}

func TestOnly(t *testing.T) {
	if p := newPlan(false, 0, "mark"); len(p.workloads) != 2 || len(p.paces) != 1 || p.idle != 0 {
		t.Errorf("got %+v", p)
	}
	if p := newPlan(true, 3, ""); len(p.workloads) != len(workloads()) || len(p.paces) != len(paces) || p.idle == 0 || p.rounds != 3 {
		t.Errorf("got %+v", p)
	}
}

func TestSpread(t *testing.T) {
	for text, rounds := range map[string][]float64{"2": {2}, "2 (1-9)": {9, 1, 2}, "3 (1-9)": {9, 4, 1, 2}} {
		if got := over(rounds, func(v float64) float64 { return v }).show(0); got != text {
			t.Errorf("%v: got %s, want %s", rounds, got, text)
		}
	}
}

// What was stored is shown again: as tables, and as a picture with a bar for each
// workload.
func TestStoredReport(t *testing.T) {
	picture := filepath.Join(t.TempDir(), "picture.svg")
	var out strings.Builder
	if err := run(t.Context(), []string{"-from", "testdata/report.json", "-svg", picture}, &out); err != nil {
		t.Fatal(err)
	}
	svg, err := os.ReadFile(picture)
	if err != nil {
		t.Fatal(err)
	}
	requireXML(t, string(svg))
	for _, w := range workloads() {
		if !strings.Contains(string(svg), ">"+w.Name+"<") {
			t.Errorf("the picture lacks %s", w.Name)
		}
		if !strings.Contains(out.String(), "\n"+w.Name+" ") {
			t.Errorf("the table lacks %s", w.Name)
		}
	}
	for _, pace := range paces {
		if !strings.Contains(out.String(), "\n"+pace.Name+" ") {
			t.Errorf("the table lacks %s", pace.Name)
		}
	}
}

func requireXML(t *testing.T, text string) {
	t.Helper()
	for decoder := xml.NewDecoder(strings.NewReader(text)); ; {
		_, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatalf("the picture is no XML: %v", err)
		}
	}
}

// A report of a run that ended before its first round has nothing to show, which
// is no fault.
func TestEmptyReport(t *testing.T) {
	r := newPlan(true, 1, "").report()
	if err := r.show(io.Discard); err != nil {
		t.Error(err)
	}
	requireXML(t, r.picture())
}

func TestTraffic(t *testing.T) {
	traffic := paced(1000, time.Second)
	if len(traffic.inserts) != 1000 || traffic.interval != time.Millisecond {
		t.Errorf("%d inserts, one every %s", len(traffic.inserts), traffic.interval)
	}
	traffic.begin = time.Unix(0, 0)
	for i := range traffic.inserts {
		sent := traffic.begin.Add(time.Duration(i) * traffic.interval)
		traffic.inserts[i] = insert{sent: sent, committed: sent.Add(time.Millisecond), arrived: sent.Add(time.Duration(i+1) * time.Millisecond)}
	}
	traffic.inserted.Store(1000)
	got := traffic.summary()
	want := LatencyRun{Rate: 1000 / 1.999, P50: 500, P99: 990, P999: 999, Commit: 1, CommitP99: 1}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// What a seasoned table costs is shown beside the fresh one, round by round.
func TestSeasonedRatios(t *testing.T) {
	rates := func(name, fresh string, rates ...float64) Throughput {
		t := Throughput{Workload: Workload{Name: name, Fresh: fresh}}
		for _, rate := range rates {
			t.Rounds = append(t.Rounds, Round{Relay: Relayed{Rate: rate}})
		}
		return t
	}
	var out strings.Builder
	Report{Throughput: []Throughput{
		rates("base", "", 100, 200), rates("base, seasoned", "base", 90, 200), rates("mark, seasoned", "mark", 1), // mark was not measured
	}}.showSeasoned(&out)
	if got := out.String(); !strings.Contains(got, "base, seasoned\t0.95 (0.90-1.00)\t2") || strings.Contains(got, "mark") {
		t.Errorf("got %q", got)
	}
}
