package relay_test

import (
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

// status is what the command of that name prints.
func (b *bundle) status(env map[string]string) string {
	b.Helper()
	command := testenv.StartRelay(b, env, "status")
	if code := command.Wait(time.Minute); code != 0 {
		b.Fatalf("status ends with %d:\n%s", code, command.Logs())
	}
	return strings.Join(strings.Fields(command.Logs()), " ")
}

// While publishing is interrupted, status says so: the relay that runs here knows.
func TestStatusAsksTheRelay(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.serveMetrics()
	b.exec(`delete from events where status = 'failed'`) // of the history
	proxy := testenv.NewProxy(t, strings.TrimPrefix(b.nats.URL(), "nats://"))
	r := b.start("NATS_URL=nats://" + proxy.Addr())
	r.WaitLog("msg=streaming")
	b.requireStatus("published", b.insert(1))
	env := b.asRelay(b.with()) // NATS itself is well
	if said := b.status(env); !strings.Contains(said, "Nothing is wrong.") || !strings.Contains(said, "relay streaming, here") {
		t.Errorf("status of a relay that is well:\n%s", said)
	}
	proxy.Stall(true)
	ids := b.insert(1)
	r.WaitLog("publishing is interrupted")
	if said := b.status(env); !strings.Contains(said, "publishing to the stream is interrupted: no answer from the stream") || strings.Contains(said, "Nothing is wrong") {
		t.Errorf("status while publishing is interrupted:\n%s", said)
	}
	proxy.Stall(false)
	b.requireStatus("published", ids)
	requireLeaves(t, r)
}

// Where no relay can be asked, status looks at the stream itself.
func TestStatusLooksAtTheStream(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	b.requireStatus("published", b.insert(2))
	for want, change := range map[string]func(*jetstream.StreamConfig){
		"stream EVENTS is full":                                 func(c *jetstream.StreamConfig) { c.MaxMsgs, c.Discard = 2, jetstream.DiscardNew },
		"stream EVENTS has subjects else.>, which do not cover": func(c *jetstream.StreamConfig) { c.Subjects = []string{"else.>"} },
	} {
		config := b.stream().CachedInfo().Config
		before := config
		change(&config)
		_, err := b.js.UpdateStream(t.Context(), config)
		b.must(err)
		if said := b.status(b.asRelay(b.with())); !strings.Contains(said, want) || strings.Contains(said, "Nothing is wrong") {
			t.Errorf("status does not say %q:\n%s", want, said)
		}
		_, err = b.js.UpdateStream(t.Context(), before)
		b.must(err)
	}
	requireLeaves(t, r)
}
