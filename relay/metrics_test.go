package relay_test

import (
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"outbox-relay/internal/testenv"
)

// serveMetrics has the relays of the bundle export their metrics from now on.
func (b *bundle) serveMetrics() {
	b.Helper()
	b.env["OUTBOX_HTTP_ADDR"] = fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(b))
}

// metric is the value of one that has no labels.
func (b *bundle) metric(name string) float64 {
	b.Helper()
	response, err := http.Get("http://" + b.env["OUTBOX_HTTP_ADDR"] + "/metrics")
	b.must(err)
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	b.must(err)
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			number, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			b.must(err)
			return number
		}
	}
	b.Fatalf("there is no %s", name)
	return 0
}

// What a lost slot leaves to the table is counted.
func TestMetricsOfLostSlot(t *testing.T) {
	b := setup(t)
	b.serveMetrics()
	r := b.streaming()
	b.requireStatus("published", b.insert(3))
	if n := b.metric("outbox_relay_heals_total"); n != 0 {
		t.Errorf("%v heals before a slot was lost", n)
	}
	requireLeaves(t, r)
	b.dropSlot()
	lost := b.insert(2)
	r = b.streaming()
	b.requireStatus("published", lost)
	if n := b.metric("outbox_relay_heals_total"); n != 1 {
		t.Errorf("%v heals", n)
	}
	if n := b.metric("outbox_relay_events_backfilled_total"); n != 2 {
		t.Errorf("%v events were backfilled", n)
	}
	requireLeaves(t, r)
}
