package chaos

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/testenv"
	"outbox-relay/migrations"
)

// plan is what a season is made of.
type plan struct {
	after     string // OUTBOX_AFTER_PUBLISH
	nodes     int    // NATS servers, and replicas of the stream
	relays    int    // processes, all on one slot
	retention retention
	backlog   int  // rows that are there before the slot
	seasoned  bool // the database has been in use before
}

// retention is how messages leave the stream.
type retention string

const (
	kept     retention = "kept"
	expiring retention = "expiring" // after maxAge
	consumed retention = "work queue"
)

// maxAge is far longer than any outage, so that the witness sees all.
const maxAge = time.Minute

func (p plan) String() string {
	backlog := ""
	if p.backlog > 0 {
		backlog = fmt.Sprintf(", %d rows before the slot", p.backlog)
	}
	database := "fresh"
	if p.seasoned {
		database = "seasoned"
	}
	return fmt.Sprintf("%s, %d NATS nodes, messages %s, %d relays%s, on a %s database", p.after, p.nodes, p.retention, p.relays, backlog, database)
}

// season is a database, a stream and the relays between them, for some faults.
// All its methods are for the goroutine of the test.
type season struct {
	*testing.T
	plan
	random   *rand.Rand
	program  string // what runs in the relay's place
	settings map[string]string

	cluster *pgserver.Cluster
	url     string // of the database
	slot    string
	sql     *pgx.Conn
	nats    []*testenv.NATSProcess
	nc      *nats.Conn
	js      jetstream.JetStream
	seats   []*seat

	oracle  oracle
	writers *writers
	witness *witness
	sampler *sampler

	again   int // at most so often faults strike while the relay heals
	gaps    []gap
	replays []string       // ids of messages that are still awaited
	runs    int            // of replays
	further map[string]int // faults that struck while the relay healed, by kind
}

// servers are what seasons share.
type servers struct {
	cluster    *pgserver.Cluster
	natsBinary string
}

// newSeason makes everything but the load and the relays.
func newSeason(t *testing.T, shared servers, p plan, random *rand.Rand, program string, settings map[string]string) *season {
	t.Helper()
	s := &season{T: t, plan: p, random: random, program: program, settings: settings, cluster: shared.cluster, again: 3, further: map[string]int{}}
	s.openDatabase()
	s.nats = testenv.NATSProcesses(t, shared.natsBinary, p.nodes)
	s.dial()
	if p.retention == consumed {
		s.createWorkQueue()
	}
	for range p.relays {
		s.seats = append(s.seats, s.newSeat())
	}
	s.witness = newWitness(s.js, s.retention == consumed)
	s.sampler = &sampler{url: s.url, slot: s.slot, slots: []slotLife{{}}}
	return s
}

// begin starts the relays: the first one streams before anything is inserted, so
// that every event comes through the slot, or it finds the plan's backlog.
func (s *season) begin() {
	s.Helper()
	if s.backlog > 0 {
		s.sampler.slots[0].late = true
		for left := s.backlog; left > 0; left -= backlogPart {
			s.insert(min(left, backlogPart))
		}
	}
	s.seats[0].start()
	if s.backlog == 0 {
		s.seats[0].relay.WaitLog("msg=streaming")
	}
	for _, seat := range s.seats[1:] {
		seat.start()
	}
	s.observe()
}

// backlogPart is how many rows of a backlog a transaction has.
const backlogPart = 5000

func (s *season) must(err error) {
	if err != nil {
		s.Helper()
		s.Fatal(err)
	}
}

func (s *season) openDatabase() {
	s.Helper()
	if s.seasoned {
		s.url = testenv.SeasonedDatabase(s.T, s.cluster)
		testenv.GrantRoles(s, s.url, "OUTBOX_AFTER_PUBLISH")
		testenv.Busy(s, s.url, neighbourRate)
	} else {
		s.url = testenv.Database(s.T, s.cluster)
		s.migrate()
	}
	s.slot = testenv.SlotName(s, s.url)
	s.Cleanup(s.hangUp)
	s.oracle = oracle{slot: s.slot + "_oracle"}
	s.query(s.oracle.create)
}

func (s *season) migrate() {
	s.Helper()
	config, err := pgx.ParseConfig(s.url)
	s.must(err)
	target := migrations.Target{Schema: "public", Table: "events", Publication: "outbox_relay"}
	s.must(migrations.Up(s.Context(), config, target, slog.New(slog.DiscardHandler)))
}

// neighbourRate is how many rows a second a seasoned database's neighbour changes.
const neighbourRate = 500

// notHistory excludes the rows that a seasoned database had before its season.
const notHistory = `aggregate_type <> '` + testenv.History + `'`

// dial connects the test itself to NATS, past the proxies.
func (s *season) dial() {
	s.Helper()
	var urls []string
	for _, node := range s.nats {
		urls = append(urls, node.URL())
	}
	var err error
	s.nc, err = nats.Connect(strings.Join(urls, ","), nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond),
		nats.PingInterval(2*time.Second), nats.Timeout(time.Second))
	s.must(err)
	s.Cleanup(s.nc.Close)
	s.js, err = jetstream.New(s.nc)
	s.must(err)
}

func (s *season) createWorkQueue() {
	s.Helper()
	s.jetStream("create the work queue", func(ctx context.Context) error {
		_, err := s.js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{Name: streamName, Subjects: []string{"events.*.*"},
			Retention: jetstream.WorkQueuePolicy, Replicas: s.nodes, Duplicates: duplicateWindow})
		return err
	})
}

// duplicateWindow is so short that it cannot help: nothing is sent again so soon.
const duplicateWindow = 100 * time.Millisecond

// observe starts what watches: the witness and the sampler.
func (s *season) observe() {
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	group.Go(func() { s.witness.run(ctx) })
	group.Go(func() { s.sampler.run(ctx) })
	s.Cleanup(func() { cancel(); group.Wait() })
}

// write starts the load.
func (s *season) write(rate int) {
	s.writers = newWriters(s.url, rate, s.random.Uint64())
	s.Cleanup(s.writers.stop)
}

// query uses the season's own connection to Postgres, and makes a new one until
// that works.
func (s *season) query(use func(context.Context, *pgx.Conn) error) {
	s.Helper()
	var err error
	testenv.Eventually(s.T, "an answer from Postgres", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err = s.attempt(ctx, use); err != nil {
			s.hangUp()
		}
		return err == nil
	})
}

func (s *season) attempt(ctx context.Context, use func(context.Context, *pgx.Conn) error) (err error) {
	if s.sql == nil {
		if s.sql, err = pgx.Connect(ctx, s.url); err != nil {
			return err
		}
	}
	return use(ctx, s.sql)
}

func (s *season) hangUp() {
	if s.sql != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = s.sql.Close(ctx) // it may be broken
		s.sql = nil
	}
}

// jetStream asks JetStream for something until that works.
func (s *season) jetStream(what string, ask func(context.Context) error) {
	s.Helper()
	var err error
	for deadline := time.Now().Add(2 * time.Minute); ; {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		err = ask(ctx)
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.Fatalf("waited in vain to %s: %v", what, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (s *season) stream() *jetstream.StreamInfo {
	s.Helper()
	var info *jetstream.StreamInfo
	s.jetStream("read the stream's state", func(ctx context.Context) error {
		stream, err := s.js.Stream(ctx, streamName)
		if err == nil {
			info = stream.CachedInfo()
		}
		return err
	})
	return info
}

// insertMarker inserts an event whose arrival tells that all before it arrived.
func (s *season) insertMarker() (id string) {
	s.Helper()
	return s.insert(1)[0]
}

// insert inserts n events in a transaction of their own.
func (s *season) insert(n int) (ids []string) {
	s.Helper()
	s.query(func(ctx context.Context, conn *pgx.Conn) (err error) {
		ids, err = insertEvents(ctx, conn, n, `{"marker": true}`)
		return err
	})
	return ids
}

// seat is a place for a relay: a process with proxies of its own.
type seat struct {
	season   *season
	postgres *testenv.Proxy
	nats     []*testenv.Proxy
	env      map[string]string
	relay    *testenv.Relay
	ended    []*testenv.Relay
}

func (s *season) newSeat() *seat {
	s.Helper()
	direct, err := url.Parse(s.url)
	s.must(err)
	st := &seat{season: s, postgres: testenv.NewProxy(s.T, direct.Host)}
	direct.Host = st.postgres.Addr()
	var servers []string
	for _, node := range s.nats {
		proxy := testenv.NewProxy(s.T, node.Addr())
		st.nats = append(st.nats, proxy)
		servers = append(servers, "nats://"+proxy.Addr())
	}
	at := direct.String()
	if s.seasoned { // whose role has settings that a superuser's has not
		at = testenv.AsRelay(s, at)
	}
	st.env = map[string]string{
		"OUTBOX_POSTGRES_URL":            at,
		"OUTBOX_SLOT":                    s.slot,
		"OUTBOX_NATS_URL":                strings.Join(servers, ","),
		"OUTBOX_STREAM":                  streamName,
		"OUTBOX_STREAM_REPLICAS":         fmt.Sprint(s.nodes),
		"OUTBOX_STREAM_DUPLICATE_WINDOW": duplicateWindow.String(),
		"OUTBOX_AFTER_PUBLISH":           s.after,
		"OUTBOX_HTTP_ADDR":               "",
	}
	if s.retention == expiring {
		st.env["OUTBOX_STREAM_MAX_AGE"] = maxAge.String()
	}
	for name, value := range s.settings {
		st.env[name] = value
	}
	return st
}

func (st *seat) start() {
	st.season.Helper()
	started := testenv.StartProgram(st.season.T, st.season.program, st.env)
	if st.relay != nil {
		st.ended = append(st.ended, st.relay)
	}
	st.relay = started
	st.season.Cleanup(func() {
		if st.season.Failed() && started.Running() {
			started.Signal(syscall.SIGQUIT) // its log then ends in what each goroutine does
			started.Wait(time.Minute)
		}
	})
}

// streaming tells, by its log, whether the relay has the slot and works.
func (st *seat) streaming() bool {
	logs := st.relay.Logs()
	began := max(strings.LastIndex(logs, "msg=streaming"), strings.LastIndex(logs, "publishing the rows"))
	return began >= 0 && began > strings.LastIndex(logs, "standing by") && began > strings.LastIndex(logs, "waiting to start again")
}

// worker is the seat whose relay streams, or any where none does.
func (s *season) worker() *seat {
	for _, st := range s.seats {
		if st.streaming() {
			return st
		}
	}
	return s.seats[s.random.IntN(len(s.seats))]
}

// requireAlive fails when a relay ended by itself.
func (s *season) requireAlive() {
	s.Helper()
	for _, st := range s.seats {
		if !st.relay.Running() {
			logs := st.relay.Logs()
			s.Fatalf("a relay ended by itself (exit code %d); the end of its log:\n%s", st.relay.Wait(time.Minute), logs[max(0, len(logs)-4<<10):])
		}
	}
}
