package chaos

import (
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"outbox-relay/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// settings of a run, from the environment:
//
//	CHAOS_EVENTS        at least so many events are committed
//	CHAOS_FAULTS        and so many faults strike
//	CHAOS_RATE          rows a second while faults strike
//	CHAOS_SEED          repeats the choices of a run
//	CHAOS_NATS_VERSION  of nats-server (v2.12.0); default: that of go.mod. Older
//	                    than the relay takes: GOFLAGS=-ldflags=-X=outbox-relay/sink.minServer=2.9.0
//	CHAOS_ONLY          only kinds of faults whose name matches this (slot|replayed)
//	CHAOS_PLAN          only seasons whose description matches this
//
// Without CHAOS_FAULTS it is a short run without the faults that take long.
type settings struct {
	events, faults, rate int
	seed                 uint64
	nats                 string
	only, plan           *regexp.Regexp
	short                bool
}

func readSettings(t *testing.T) settings {
	t.Helper()
	return settings{
		events: number(t, "CHAOS_EVENTS", 20_000),
		faults: number(t, "CHAOS_FAULTS", 15),
		rate:   number(t, "CHAOS_RATE", 2000),
		seed:   uint64(number(t, "CHAOS_SEED", rand.IntN(1<<31))),
		nats:   os.Getenv("CHAOS_NATS_VERSION"),
		only:   pattern(t, "CHAOS_ONLY"),
		plan:   pattern(t, "CHAOS_PLAN"),
		short:  os.Getenv("CHAOS_FAULTS") == "",
	}
}

func number(t *testing.T, name string, standard int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return standard
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		t.Fatalf("%s is %q: a number is wanted", name, text)
	}
	return n
}

func pattern(t *testing.T, name string) *regexp.Regexp {
	t.Helper()
	compiled, err := regexp.Compile(os.Getenv(name))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return compiled
}

// run is what a run has done so far.
type run struct {
	settings
	servers
	kinds    []fault
	struck   map[string]int // by kind
	seasoned int            // seasons on a database that had been in use
	events   int
	found    findings
	began    time.Time
}

func (r *run) faults() (n int) {
	for _, times := range r.struck {
		n += times
	}
	return n
}

func (r *run) String() string {
	var kinds []string
	for _, f := range append(allFaults(), fault{name: readerTerminated}) {
		if n := r.struck[f.name]; n > 0 {
			kinds = append(kinds, fmt.Sprintf("%s %d", f.name, n))
		}
	}
	return fmt.Sprintf("events %d, faults %d (%s), %d of %d seasons on seasoned databases, %s, seed %d",
		r.events, r.faults(), strings.Join(kinds, ", "), r.seasoned, r.seasons(), &r.found, r.seed)
}

func TestChaos(t *testing.T) {
	r := &run{settings: readSettings(t), struck: map[string]int{}, began: time.Now()}
	t.Logf("CHAOS_SEED=%d repeats this run", r.seed)
	for _, f := range allFaults() {
		if r.only.MatchString(f.name) && !(r.short && f.slow) {
			r.kinds = append(r.kinds, f)
		}
	}
	r.servers = servers{cluster: testenv.OwnPostgres(t, nil), natsBinary: testenv.NATSBinary(t, r.nats)}
	random := rand.New(rand.NewPCG(r.seed, 0))
	plans := slices.DeleteFunc(allPlans(random), func(p plan) bool { return !r.plan.MatchString(p.String()) })
	if len(plans) == 0 {
		t.Fatalf("CHAOS_PLAN is %q: no season's description matches that", r.plan)
	}
	if i := slices.IndexFunc(plans, func(p plan) bool { return p.backlog > 0 && healing(p) }); r.short && i > 0 {
		plans[0], plans[i] = plans[i], plans[0] // a short run has one with all that is published from the table
	}
	seasons := r.seasons()
	for i := range seasons {
		p := plans[i%len(plans)]
		ok := t.Run(fmt.Sprintf("season %d of %d", i+1, seasons), func(t *testing.T) {
			r.season(t, p, rand.New(rand.NewPCG(r.seed, uint64(i+1))), r.events+(r.settings.events-r.events)/(seasons-i),
				r.faults()+(r.settings.faults-r.faults())/(seasons-i))
		})
		if !ok {
			t.Fatalf("stopped: CHAOS_SEED=%d", r.seed)
		}
	}
	t.Log(r)
}

// seasons is how many the faults are spread over.
func (r *run) seasons() int {
	each := 15
	if r.short {
		each = 6
	}
	return max(1, (r.settings.faults+each-1)/each)
}

// allPlans lists every plan in random order, each other one on a seasoned database.
func allPlans(random *rand.Rand) []plan {
	var all []plan
	for _, after := range []string{"mark", "delete", "keep"} {
		for _, retention := range []retention{kept, expiring, consumed} {
			for _, nodes := range []int{1, 3} {
				for _, relays := range []int{1, 2} {
					for _, backlog := range []int{0, 30_000} {
						all = append(all, plan{after: after, nodes: nodes, relays: relays, retention: retention, backlog: backlog})
					}
				}
			}
		}
	}
	random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for i, first := range random.Perm(2) {
		for ; i < len(all); i += 2 {
			all[i].seasoned = first == 0
		}
	}
	return all
}

// season goes on until the run has that many faults and events.
func (r *run) season(t *testing.T, p plan, random *rand.Rand, events, faults int) {
	t.Logf("season of %s", p)
	if p.seasoned {
		r.seasoned++
	}
	s := newSeason(t, r.servers, p, random, ".", nil)
	if r.short {
		s.again, s.backlog = 1, s.backlog/3
	}
	if p.backlog == 0 {
		s.begin()
	}
	s.write(r.rate)
	if p.backlog > 0 {
		s.begin()
		began := time.Now()
		s.harass(2*s.again, relay|postgres|broker|links)
		s.awaitArrival(s.insertMarker(), true)
		r.count(s)
		t.Logf("backfilled after %s; %d rows, %s", time.Since(began).Round(time.Millisecond), s.writers.rows.Load(), r.progress())
	}
	for r.faults() < faults {
		chosen := r.choose(s)
		began := time.Now()
		s.suffer(chosen...)
		r.count(s)
		for _, f := range chosen {
			r.struck[f.name]++
		}
		t.Logf("%s after %s; %d rows, %s", names(chosen), time.Since(began).Round(time.Millisecond), s.writers.rows.Load(), r.progress())
	}
	s.writers.pacer.set(sprint)
	s.await("the last events", func() bool { return r.events+int(s.writers.rows.Load()) >= events })
	n, found := s.finish()
	r.events += n
	r.found.merge(found)
	t.Logf("%d events, %s; %s", n, &found, r.progress())
	if !found.clean() {
		t.Fatalf("the promise is broken:\n%s", found.details())
	}
}

// count counts what struck while rows were published from the table.
func (r *run) count(s *season) {
	for name, times := range s.further {
		r.struck[name] += times
	}
	clear(s.further)
}

// sprint is the rate for events that are still missing when the faults are done.
const sprint = 50_000

func (r *run) progress() string {
	took := time.Since(r.began)
	return fmt.Sprintf("%d faults and %d events after %s", r.faults(), r.events, took.Round(time.Second))
}

func names(faults []fault) string {
	var all []string
	for _, f := range faults {
		all = append(all, f.name)
	}
	return strings.Join(all, " + ")
}

// choose draws one of the kinds that struck least, by their weight, and now and then a second one
// that can strike at the same time.
func (r *run) choose(s *season) []fault {
	var first *fault
	if r.short && r.faults()%3 == 0 {
		first = r.draw(s, func(f fault) bool { return isOf(tableFaults, f) })
	}
	if first == nil {
		first = r.draw(s, func(f fault) bool { return true })
	}
	if first == nil {
		s.Fatal("no kind of fault fits")
	}
	chosen := []fault{*first}
	if s.random.IntN(4) == 0 {
		if second := r.draw(s, first.allows); second != nil {
			chosen = append(chosen, *second)
		}
	}
	if s.random.IntN(2) == 0 {
		slices.Reverse(chosen)
	}
	return chosen
}

func isOf(list []fault, f fault) bool {
	return slices.ContainsFunc(list, func(one fault) bool { return one.name == f.name })
}

func (r *run) draw(s *season, allowed func(fault) bool) *fault {
	var least []fault
	for _, f := range r.kinds {
		if !allowed(f) || f.fits != nil && !f.fits(s.plan) {
			continue
		}
		share := f.share(r.struck[f.name])
		if len(least) > 0 && share < least[0].share(r.struck[least[0].name]) {
			least = nil
		}
		if len(least) == 0 || share == least[0].share(r.struck[least[0].name]) {
			least = append(least, f)
		}
	}
	if least == nil {
		return nil
	}
	return &least[s.random.IntN(len(least))]
}
