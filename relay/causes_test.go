package relay_test

import (
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"

	"outbox-relay/internal/testenv"
)

// lines are those of the log that hold the text.
func lines(log, text string) (found []string) {
	for line := range strings.Lines(log) {
		if strings.Contains(line, text) {
			found = append(found, line)
		}
	}
	return found
}

// requireTold makes sure that what was logged behind the first `from` bytes is at
// most so many lines, and that the last of them holds the text.
func requireTold(t *testing.T, log string, from, most int, last string) {
	t.Helper()
	told := lines(log[from:], "level=")
	if len(told) == 0 || len(told) > most || !strings.Contains(told[len(told)-1], last) {
		t.Errorf("%d lines, want at most %d, the last with %q:\n%s", len(told), most, last, strings.Join(told, ""))
	}
}

// A checkpoint that is claimed again and again ends each session: the log says so
// once, and does not end by how well the next one begins.
func TestSessionsThatEndAgainAndAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.serveMetrics()
	r := b.streaming()
	ids := b.insert(1)
	b.requireStatus("published", ids)
	from := len(r.Logs())
	testenv.Eventually(t, "sessions to end", func() bool {
		b.exec(`update outbox_relay_checkpoints set epoch = epoch + 1`)
		return b.metric("outbox_relay_sessions_lost_total") >= 7
	})
	log := r.Logs()
	requireTold(t, log, from, 6, "waiting to start again")
	if n := len(lines(log, "msg=streaming")); n > 2 {
		t.Errorf("it says %d times that it streams", n)
	}
	ids = append(ids, b.insert(1)...)
	b.requireStatus("published", ids)
	b.requireStream(ids)
	requireLeaves(t, r)
}

// refusing is a bundle whose NATS can be told to refuse the relay.
func refusing(t *testing.T) (b *bundle, refuse func()) {
	user := testenv.RelayUser(t)
	b = setupOn(t, testenv.Postgres(t), testenv.NATSOptions{Edit: func(o *server.Options) {
		o.Users = []*server.User{user, {Username: "anybody"}}
		o.NoAuthUser = "anybody"
	}})
	return b, func() { user.Password = "another"; b.nats.Restart() }
}

// Credentials that NATS refuses are told once, however often they are tried.
func TestRefusedCredentialsAreToldOnce(t *testing.T) {
	t.Parallel()
	b, refuse := refusing(t)
	r := b.streaming()
	b.requireStatus("published", b.insert(1))
	from := len(r.Logs())
	refuse()
	b.insert(1)
	testenv.Eventually(t, "many attempts", func() bool {
		varz, err := b.nats.Server().Varz(nil)
		b.must(err)
		return varz.TotalConnections >= 20
	})
	requireTold(t, r.Logs(), from, 5, "uthorization")
	requireLeaves(t, r)
}

// So is a login that Postgres refuses.
func TestRefusedLoginIsToldOnce(t *testing.T) {
	t.Parallel()
	b := setupOn(t, passwordPostgres(t, "right"), testenv.NATSOptions{})
	b.env["OUTBOX_POSTGRES_URL"] = testenv.AsRelay(b, b.url)
	b.serveMetrics()
	r := testenv.StartRelay(t, b.with())
	r.WaitLog("msg=streaming")
	from := len(r.Logs())
	b.exec(`alter role relay password 'another'`)
	b.exec(`select pg_terminate_backend(pid) from pg_stat_activity where usename = 'relay'`)
	testenv.Eventually(t, "many attempts", func() bool { return b.metric("outbox_relay_sessions_lost_total") >= 7 })
	requireTold(t, r.Logs(), from, 5, "28P01")
	b.grant()
	ids := b.insert(1)
	b.requireStatus("published", ids)
	requireLeaves(t, r)
}

// And a stream that is full.
func TestFullStreamIsToldOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.serveMetrics()
	r := b.streaming()
	ids := b.insert(3)
	b.requireStatus("published", ids)
	from := len(r.Logs())
	config := b.stream().CachedInfo().Config
	config.MaxMsgs, config.Discard = 3, 1 // new
	_, err := b.js.UpdateStream(t.Context(), config)
	b.must(err)
	ids = append(ids, b.insert(3)...)
	testenv.Eventually(t, "many attempts", func() bool { return b.metric(`outbox_relay_resyncs_total{reason="refused"}`) >= 6 })
	requireTold(t, r.Logs(), from, 2, "publishing is interrupted")
	config.MaxMsgs = -1
	_, err = b.js.UpdateStream(t.Context(), config)
	b.must(err)
	b.requireStatus("published", ids)
	r.WaitLog("publishing goes on")
	requireLeaves(t, r)
}

// Rows that are inserted with another status than pending are told of once.
func TestIgnoredInsertsAreToldOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	b.exec(`alter table events disable trigger user`)
	b.exec(`insert into events (id, aggregate_type, event_type, payload, status, created_at)
		select 'event_' || i, 'order', 'created', '{}', 'published', now() from generate_series(1, 200) i`)
	b.exec(`alter table events enable trigger user`)
	ids := b.insert(1)
	b.requireStatus("published", ids)
	if n := len(lines(r.Logs(), "ignored an insert")); n == 0 || n > 5 {
		t.Errorf("%d lines", n)
	}
	requireLeaves(t, r)
}
