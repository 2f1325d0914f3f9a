package relay_test

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

// outage is how long NATS is down: longer than wal_sender_timeout (10 s), and
// than the duplicate window. OUTAGE sets it, for a long run by hand.
func outage(t testing.TB) time.Duration {
	t.Helper()
	text := os.Getenv("OUTAGE")
	if text == "" {
		return 12 * time.Second
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("OUTAGE: %v", err)
	}
	return d
}

// An outage of NATS under load costs WAL, and nothing else: the walsender hears
// from the relay all the time, memory stays flat, and the log says once what is
// wrong and once that it is over.
func TestNATSDownUnderLoad(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming(noWindow)
	o := b.oracle()
	walsender := b.walsender()
	w := b.write(1)
	w.await(10_000) // the window was full once
	b.nats.Stop()
	stopped := time.Now()
	down := b.now()
	lasted := outage(t)
	before := b.peakMemory(r)
	w.await(20_000)
	w.stop()
	testenv.EventuallyWithin(t, lasted+time.Minute, "the walsender to hear from the relay all through the outage", func() bool {
		return b.count(`select count(*) from pg_stat_replication where pid = $1 and reply_time > $2::timestamptz + make_interval(secs => $3)`,
			walsender, down, lasted.Seconds()) == 1
	})
	after := b.peakMemory(r)
	b.nats.Restart()
	ids := o.committed()
	b.requireStream(ids)
	b.requireStatus("published", ids)
	if pid := b.walsender(); pid != walsender {
		t.Errorf("the session was lost: walsender %d instead of %d", pid, walsender)
	}
	if after > before+(32<<20) {
		t.Errorf("memory grew from %d to %d bytes in the outage", before, after)
	}
	repeated := int(time.Since(stopped).Minutes()) // beside load the outage lasts longer than was asked for
	for said, most := range map[string]int{"publishing is interrupted": 1 + repeated, "publishing goes on": 1, "level=(WARN|ERROR)": 3 + 2*repeated} {
		if n := len(regexp.MustCompile(said).FindAllString(r.Logs(), -1)); n < 1 || n > most {
			t.Errorf("the log has %d times %q, want 1 to %d:\n%s", n, said, most, r.Logs())
		}
	}
	t.Logf("%d events, memory %d MiB before and %d MiB after an outage of %s", len(ids), before>>20, after>>20, lasted)
}

// walsender is the process that serves the relay.
func (b *bundle) walsender() int {
	b.Helper()
	return b.count(`select active_pid from pg_replication_slots where slot_name = $1`, b.slot())
}

// now is Postgres's clock.
func (b *bundle) now() (t time.Time) {
	b.Helper()
	b.must(b.sql.QueryRow(b.Context(), `select clock_timestamp()`).Scan(&t))
	return t
}

// A stream that is full takes nothing for as long as it is. It is asked more and
// more rarely, and told of once; the probe for readiness says so.
func TestStreamFull(t *testing.T) {
	t.Parallel()
	b := setup(t)
	config := jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.>"}, MaxMsgs: 10, Discard: jetstream.DiscardNew}
	_, err := b.js.CreateStream(t.Context(), config)
	b.must(err)
	address := fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t))
	r := b.streaming("HTTP_ADDR=" + address)
	b.requireReady(address, http.StatusOK, "streaming")
	ids := b.insert(3000)
	b.requireReady(address, http.StatusServiceUnavailable, "publishing to the stream is interrupted")
	asked := func() int64 {
		v, err := b.nats.Server().Varz(nil)
		b.must(err)
		return v.InMsgs
	}
	from, since := asked(), b.now()
	testenv.Eventually(t, "some seconds", func() bool { return b.now().Sub(since) > 5*time.Second })
	if n := asked() - from; n > 10*3000 {
		t.Errorf("%d messages were sent to a stream that is full", n)
	}
	config.MaxMsgs = -1
	_, err = b.js.UpdateStream(t.Context(), config)
	b.must(err)
	b.requireStream(ids)
	b.requireReady(address, http.StatusOK, "streaming")
	for _, said := range []string{"publishing is interrupted", "publishing goes on"} {
		if n := strings.Count(r.Logs(), said); n != 1 {
			t.Errorf("the log has %d times %q", n, said)
		}
	}
}

// requireReady waits until /readyz answers so.
func (b *bundle) requireReady(address string, code int, text string) {
	b.Helper()
	testenv.Eventually(b, "readiness "+text, func() bool {
		answer, err := http.Get("http://" + address + "/readyz")
		if err != nil {
			return false
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		return err == nil && answer.StatusCode == code && strings.Contains(string(body), text)
	})
}
