package relay_test

import (
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

// What a backfill needs is bounded, however many rows there are. BACKLOG sets how
// many, for a long run by hand (10000000); AFTER_PUBLISH how they are recorded.
func TestBackfillInFlatMemory(t *testing.T) {
	events := 100_000
	if text := os.Getenv("BACKLOG"); text != "" {
		var err error
		if events, err = strconv.Atoi(text); err != nil {
			t.Fatalf("BACKLOG: %v", err)
		}
	}
	mode := os.Getenv("AFTER_PUBLISH")
	if mode == "" {
		mode = "mark"
	}
	b := setupOn(t, testenv.OwnPostgres(t, map[string]string{"max_wal_size": "8GB", "fsync": "off"}), testenv.NATSOptions{})
	b.nats.Stop()
	server := testenv.NATSProcesses(t, testenv.NATSBinary(t, ""), 1)[0]
	nc, err := nats.Connect(server.URL())
	b.must(err)
	t.Cleanup(nc.Close)
	b.js, err = jetstream.New(nc)
	b.must(err)
	b.exec(`alter table events disable trigger on_events_create`)
	b.exec(`insert into events (id, aggregate_type, event_type, payload, status, created_at)
		select 'event_' || lpad(i::text, 26, '0'), 'order', 'created', jsonb_build_object('n', i, 'text', repeat('x', 150)), 'pending', now() from generate_series(1, $1) i`, events)
	b.exec(`vacuum analyze events`)
	address := fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t))
	r := b.start("NATS_URL="+server.URL(), "AFTER_PUBLISH="+mode)
	r.WaitLog("created the slot")
	r.Kill()
	release := b.barred("outbox_relay_batches")
	r = b.start("NATS_URL="+server.URL(), "AFTER_PUBLISH="+mode, "HTTP_ADDR="+address)
	b.awaitBarred("outbox_relay_batches")
	b.requireReady(address, http.StatusOK, "backfilling")
	release()
	for n := uint64(events / 100); n <= uint64(events); n += uint64(events / 100) {
		testenv.Eventually(t, fmt.Sprintf("%d events in the stream", n), func() bool { return b.last() >= n })
	}
	b.requireReady(address, http.StatusOK, "streaming")
	for _, line := range strings.Split(r.Logs(), "\n") {
		if strings.Contains(line, "duration=") {
			t.Log(line)
		}
	}
	if n := b.stream().CachedInfo().State.Msgs; n != uint64(events) {
		t.Fatalf("%d messages of %d", n, events)
	}
	peak := b.peakMemory(r)
	t.Logf("the relay took at most %d MiB", peak>>20)
	if peak > 100<<20 {
		t.Fatalf("the relay took %d MiB", peak>>20)
	}
	requireLeaves(t, r)
}

// Nor does it follow the size of the rows.
func TestBackfillOfLargeRowsInFlatMemory(t *testing.T) {
	b := setup(t)
	const events = 2000
	b.exec(`insert into events (aggregate_type, event_type, payload) select 'order', 'large', to_jsonb(repeat('x', 150000)) from generate_series(1, $1)`, events)
	r := b.start("MAX_INFLIGHT_BYTES=16MiB")
	testenv.Eventually(t, "all events in the stream", func() bool { return b.last() >= events })
	peak := b.peakMemory(r)
	t.Logf("the relay took at most %d MiB", peak>>20)
	if peak > 128<<20 { // by batches of rows alone it came to 337
		t.Errorf("the relay took %d MiB", peak>>20)
	}
	b.requireStatus("published", b.ids())
	requireLeaves(t, r)
}

// Nor do retries: neither the relay that is asked for them, nor the one that finishes
// what a killed one has announced.
func TestRetryOfLargeRowsInFlatMemory(t *testing.T) {
	b := setup(t)
	b.forgetFailures()
	const events, size = 1000, 300_000
	var ids []string
	b.exec(`alter table events disable trigger on_events_create`)
	b.must(b.sql.QueryRow(t.Context(), `with failed as (insert into events (id, aggregate_type, event_type, payload, status, failed_at, created_at)
		select 'event_' || lpad(i::text, 26, '0'), 'order', 'large', to_jsonb(repeat('x', $2)), 'failed', now(), now() from generate_series(1, $1) i returning id)
		select array_agg(id order by id) from failed`, events, size).Scan(&ids))
	b.exec(`alter table events enable trigger on_events_create`)
	window := "MAX_INFLIGHT_BYTES=16MiB"
	r := b.streaming(window)
	announcing := b.barred("outbox_relay_batches")
	b.exec(`select outbox_retry(variadic $1)`, ids)
	b.awaitBarred("outbox_relay_batches")
	recording := b.barred("events")
	announcing()
	b.awaitBarred("events")
	peak := []int{b.peakMemory(r)}
	b.killUnrecorded(r, recording)
	r = b.start(window)
	b.requireStatus("published", ids)
	peak = append(peak, b.peakMemory(r))
	t.Logf("the relays took at most %d and %d MiB for %d MiB of rows", peak[0]>>20, peak[1]>>20, events*size>>20)
	for _, bytes := range peak {
		if bytes > 128<<20 {
			t.Errorf("a relay took %d MiB", bytes>>20)
		}
	}
	b.requireStream(ids)
	requireLeaves(t, r)
}
