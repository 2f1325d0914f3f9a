// Package monitoring tests what is in deploy/prometheus and deploy/grafana on a
// real Prometheus, and the metrics of a relay that has lived through a lot.
package monitoring

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/debian"
	"outbox-relay/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// program returns the path of promtool or prometheus.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := debian.Unpacked(t.Context(), "prometheus", name, t.Logf)
	must(t, err)
	return path
}

func must(t testing.TB, err error) {
	if err != nil {
		t.Helper()
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	must(t, err)
	return string(text)
}

// outbox is a relay between a database and a stream, with a proxy before NATS.
type outbox struct {
	*testing.T
	sql   *pgx.Conn
	nc    *nats.Conn
	js    jetstream.JetStream
	link  *testenv.Proxy
	addr  string // of the relay's metrics
	relay *testenv.Relay
}

// newOutbox starts a relay that has three rows to backfill.
func newOutbox(t *testing.T) *outbox {
	t.Helper()
	url := testenv.SeasonedDatabase(t, testenv.Postgres(t))
	server := testenv.NATS(t, testenv.NATSOptions{})
	o := &outbox{T: t, link: testenv.NewProxy(t, strings.TrimPrefix(server.URL(), "nats://")), addr: fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t))}
	var err error
	o.sql, err = pgx.Connect(t.Context(), url)
	must(t, err)
	t.Cleanup(func() { o.sql.Close(context.Background()) })
	o.nc, err = nats.Connect(server.URL())
	must(t, err)
	t.Cleanup(o.nc.Close)
	o.js, err = jetstream.New(o.nc)
	must(t, err)
	o.limitSlot()
	o.insert("backfilled", 3)
	o.relay = testenv.StartRelay(t, map[string]string{
		"OUTBOX_POSTGRES_URL": url, "OUTBOX_SLOT": testenv.SlotName(t, url), "OUTBOX_NATS_URL": "nats://" + o.link.Addr(), "OUTBOX_HTTP_ADDR": o.addr,
		"OUTBOX_STREAM_DUPLICATE_WINDOW": "100ms",
	})
	o.relay.WaitLog("msg=streaming")
	return o
}

// limitSlot bounds what slots may keep: else nothing tells what is safe.
func (o *outbox) limitSlot() {
	o.Helper()
	o.exec(`alter system set max_slot_wal_keep_size = '1GB'`)
	o.exec(`select pg_reload_conf()`)
	testenv.Eventually(o, "max_slot_wal_keep_size", func() bool {
		var size string
		must(o, o.sql.QueryRow(o.Context(), `show max_slot_wal_keep_size`).Scan(&size))
		return size == "1GB"
	})
}

func (o *outbox) exec(sql string, args ...any) {
	o.Helper()
	_, err := o.sql.Exec(o.Context(), sql, args...)
	must(o, err)
}

// insert inserts n events of the type, and returns the id of the last one.
func (o *outbox) insert(aggregateType string, n int) (id string) {
	o.Helper()
	must(o, o.sql.QueryRow(o.Context(), `with inserted as (insert into events (aggregate_type, event_type, payload)
		select $1, 'created', '{}' from generate_series(1, $2) returning id) select max(id) from inserted`, aggregateType, n).Scan(&id))
	return id
}

// awaitStatus waits until the row has the status.
func (o *outbox) awaitStatus(id, status string) {
	o.Helper()
	testenv.Eventually(o, "event "+id+" "+status, func() bool {
		var is bool
		must(o, o.sql.QueryRow(o.Context(), `select exists (select from events where id = $1 and status = $2)`, id, status).Scan(&is))
		return is
	})
}

// last is the sequence of the stream's last message.
func (o *outbox) last() uint64 {
	o.Helper()
	stream, err := o.js.Stream(o.Context(), "EVENTS")
	must(o, err)
	return stream.CachedInfo().State.LastSeq
}

// scrape returns what the relay exports, as text.
func (o *outbox) scrape() string {
	o.Helper()
	return get(o, "http://"+o.addr+"/metrics")
}

func get(t testing.TB, url string) string {
	t.Helper()
	response, err := http.Get(url)
	must(t, err)
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	must(t, err)
	if response.StatusCode != http.StatusOK {
		t.Fatalf("%s answers %d: %s", url, response.StatusCode, text)
	}
	return string(text)
}

// samples sums up what a scrape has for each name, over all labels.
func samples(t testing.TB, scrape string) map[string]float64 {
	t.Helper()
	sums := map[string]float64{}
	for line := range strings.Lines(scrape) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		name := line[:strings.IndexAny(line, "{ ")]
		value, err := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndexByte(line, ' '):]), 64)
		must(t, err)
		sums[name] += value
	}
	return sums
}

// await waits until the relay exports this line, up to its value, with a value above 0.
func (o *outbox) await(series string) {
	o.Helper()
	testenv.Eventually(o, series+" above 0", func() bool {
		for line := range strings.Lines(o.scrape()) {
			if value, ok := strings.CutPrefix(line, series+" "); ok && strings.TrimSpace(value) != "0" {
				return true
			}
		}
		return false
	})
}

// writing inserts events until the test ends, or the function is called.
func (o *outbox) writing() (stop func()) {
	ctx, cancel := context.WithCancel(o.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			_, err := o.sql.Exec(ctx, `insert into events (aggregate_type, event_type, payload) select 'load', 'created', '{}' from generate_series(1, 20)`)
			if err != nil && ctx.Err() == nil {
				o.Error(err)
				return
			}
			time.Sleep(20 * time.Millisecond) // a load, not a wait
		}
	}()
	return func() {
		cancel()
		<-done
	}
}
