package relay_test

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/testenv"
)

// pair is a bundle on a primary that has a standby.
type pair struct {
	*bundle
	standby *pgserver.Cluster
	link    *testenv.Proxy // from the standby to the primary
}

// setupPair needs slots that are synchronized to standbys: Postgres 17.
func setupPair(t *testing.T) *pair {
	t.Helper()
	b := setupOn(t, testenv.OwnPostgresSince(t, 17, map[string]string{"hot_standby_feedback": "on"}), testenv.NATSOptions{})
	b.exec(`select pg_create_physical_replication_slot('standby')`)
	p := &pair{bundle: b, link: testenv.NewProxy(t, fmt.Sprintf("127.0.0.1:%d", b.cluster.Port()))}
	b.must(b.cluster.Stop(t.Context(), pgserver.Fast))
	host, port, _ := strings.Cut(p.link.Addr(), ":")
	p.standby = testenv.CopyPostgres(t, b.cluster, "standby.signal", map[string]string{
		"primary_conninfo":       fmt.Sprintf("host=%s port=%s user=postgres dbname=postgres", host, port),
		"primary_slot_name":      "standby",
		"sync_replication_slots": "on",
	})
	b.must(b.cluster.Restart(t.Context()))
	b.must(p.standby.Restart(t.Context())) // not before the primary: it tries again after a minute only
	b.sql = b.connect()
	b.env["OUTBOX_POSTGRES_URL"] = p.both()
	return p
}

// both is a URL that finds whichever is the primary.
func (p *pair) both() string {
	p.Helper()
	u, err := url.Parse(p.url)
	p.must(err)
	u.Host += fmt.Sprintf(",127.0.0.1:%d", p.standby.Port())
	query := u.Query()
	query.Set("target_session_attrs", "read-write")
	u.RawQuery = query.Encode()
	return u.String()
}

func (p *pair) onStandby() *pgx.Conn {
	p.Helper()
	u, err := url.Parse(p.url)
	p.must(err)
	u.Host = fmt.Sprintf("127.0.0.1:%d", p.standby.Port())
	conn, err := pgx.Connect(p.Context(), u.String())
	p.must(err)
	p.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// awaitSlots waits until the standby has the slots as they are on the primary,
// and the checkpoint that goes with them. Nothing must be inserted meanwhile.
func (p *pair) awaitSlots(slots ...string) {
	p.Helper()
	standby := p.onStandby()
	testenv.Eventually(p, "the slots on the standby", func() bool {
		// A copy stays temporary until the slot's xmin has passed the standby's.
		p.exec(`select pg_log_standby_snapshot()`)
		p.count(`select count(*) from pg_replication_slots, pg_logical_slot_get_changes(slot_name, null, null) where plugin = 'test_decoding'`)
		for _, slot := range slots {
			var here, there string
			p.must(p.sql.QueryRow(p.Context(), `select confirmed_flush_lsn::text from pg_replication_slots where slot_name = $1`, slot).Scan(&here))
			err := standby.QueryRow(p.Context(), `select coalesce(max(confirmed_flush_lsn::text), '') from pg_replication_slots
				where slot_name = $1 and synced and not temporary and invalidation_reason is null`, slot).Scan(&there)
			if err != nil || here != there {
				return false
			}
		}
		const checkpoints = `select coalesce(max(c::text), '') from outbox_relay_checkpoints c`
		var here, there string
		p.must(p.sql.QueryRow(p.Context(), checkpoints).Scan(&here))
		p.must(standby.QueryRow(p.Context(), checkpoints).Scan(&there))
		return here == there
	})
}

// promote makes the standby the primary; the bundle goes along.
func (p *pair) promote() {
	p.Helper()
	p.must(p.cluster.Kill())
	p.sql = p.onStandby()
	p.exec(`select pg_promote()`)
}

// failoverOracle is an oracle that a standby has a copy of.
func (p *pair) failoverOracle() *oracle {
	p.Helper()
	o := &oracle{p.bundle, p.slot() + "_oracle"}
	p.exec(`select pg_create_logical_replication_slot($1, 'test_decoding', false, false, true)`, o.slot)
	return o
}

// With synchronized_standby_slots nothing is sent that the standby has not, so
// a failover under load loses nothing and leaves nothing over.
func TestFailover(t *testing.T) {
	t.Parallel()
	p := setupPair(t)
	r := p.streaming(noWindow)
	o := p.failoverOracle()
	p.awaitSlots(p.slot(), o.slot)
	p.exec(`alter system set synchronized_standby_slots = 'standby'`)
	p.exec(`select pg_reload_conf()`)
	w := p.write(8)
	w.await(5000)
	testenv.Eventually(t, "events in the stream", func() bool { return p.last() > 1000 })
	p.promote()
	w.abandon()
	o.sql = p.sql

	r.WaitLog("was promoted")
	late := p.insert(5)
	p.requireStatus("published", late)
	ids := o.committed()
	p.requireStream(ids)
	p.requireStatus("published", ids)
	if strings.Contains(r.Logs(), "transactions are lost") {
		t.Fatal("events without a transaction are in the stream")
	}
	requireLeaves(p.bundle, r)
}

// A standby that is away holds up what is read: said, and no fault.
func TestStandbyIsAwaited(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.OwnPostgresSince(t, 17, nil), testenv.NATSOptions{})
	b.exec(`select pg_create_physical_replication_slot('standby')`)
	r := b.streaming()
	b.exec(`alter system set synchronized_standby_slots = 'standby'`)
	b.exec(`select pg_reload_conf()`)
	testenv.Eventually(t, "the standby to be awaited", func() bool {
		b.insert(1)
		return strings.Contains(r.Logs(), "Postgres has a word about the slot")
	})
	b.exec(`alter system reset synchronized_standby_slots`)
	b.exec(`select pg_reload_conf()`)
	testenv.Eventually(t, "all rows published", func() bool {
		return b.count(`select count(*) from events where status <> 'published' and aggregate_type <> 'history'`) == 0
	})
	requireLeaves(b, r)
}

// Without it the stream can hold what the failover lost: told by name. The new
// server's LSNs start below those of what was lost, and nothing is skipped.
func TestFailoverThatLosesTransactions(t *testing.T) {
	t.Parallel()
	p := setupPair(t)
	p.serveMetrics()
	r := p.streaming(noWindow)
	ids := p.insert(20)
	p.requireStatus("published", ids)
	p.awaitSlots(p.slot())

	p.link.Refuse(true)
	p.link.Cut()
	phantoms := p.insert(250)
	p.requireStatus("published", phantoms)
	p.requireStream(append(ids, phantoms...))
	p.promote()
	late := p.insert(30)
	p.requireStatus("published", late)
	messages := p.requireStream(append(append(ids, phantoms...), late...))
	for i, m := range messages {
		if at, new := m.Header.Get("Outbox-Position"), i >= len(ids)+len(phantoms); strings.HasPrefix(at, "2/") != new {
			t.Fatalf("message %d has position %s", i+1, at)
		}
	}
	r.WaitLog("transactions are lost")
	if n := p.metric("outbox_relay_phantom_events_total"); int(n) != len(phantoms) {
		t.Errorf("%v phantoms were counted, want %d", n, len(phantoms))
	}
	for _, id := range phantoms {
		if !strings.Contains(r.Logs(), id) {
			t.Fatalf("phantom %s is not told", id)
		}
	}
	r.Kill()
	r = p.start(noWindow)
	p.requireStatus("published", p.insert(1))
	requireLeaves(p.bundle, r)
}

// A backup restored to a point in time has no slot; a dump has not even the
// system identifier. Both are named, and nothing is guessed.
func TestRestore(t *testing.T) {
	t.Parallel()
	archive := t.TempDir()
	for dir := archive; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o777); err != nil { // the server is another user
			t.Fatal(err)
		}
	}
	b := setupOn(t, testenv.OwnPostgres(t, map[string]string{
		"archive_mode": "on", "archive_command": "cp %p " + archive + "/%f", "archive_timeout": "1h",
	}), testenv.NATSOptions{})
	r := b.streaming()
	ids := b.insert(10)
	b.requireStatus("published", ids)
	requireLeaves(b, r)
	b.must(b.cluster.Stop(t.Context(), pgserver.Fast))
	settings := map[string]string{"archive_mode": "off", "restore_command": "cp " + archive + "/%f %p", "recovery_target_action": "promote"}
	restored := testenv.CopyPostgres(t, b.cluster, "recovery.signal", settings)

	b.must(restored.Restart(t.Context()))

	u, err := url.Parse(b.url)
	b.must(err)
	u.Host = fmt.Sprintf("127.0.0.1:%d", restored.Port())
	b.url, b.env["OUTBOX_POSTGRES_URL"] = u.String(), u.String()
	b.sql = b.connect()
	testenv.Eventually(t, "the end of recovery", func() bool { return b.count(`select pg_is_in_recovery()::int`) == 0 })

	// The copy of the files has the slot: the relay goes on.
	r = b.streaming()
	r.WaitLog("backup restored")
	more := b.insert(3)
	b.requireStatus("published", more)
	b.requireStream(append(ids, more...))
	requireLeaves(b, r)

	// pg_basebackup would have left it out: what it has lost comes from the table,
	// and what the stream has beyond the backup is told.
	b.dropSlot()
	lost := b.insert(2)
	b.exec(`update outbox_relay_checkpoints set timeline = 1`)
	b.publish(nats.Header{"Nats-Msg-Id": {"event_phantom"}})
	b.publish(nats.Header{"Nats-Msg-Id": {lost[0]}})
	requireEnd(t, b.start("AFTER_PUBLISH=keep"), 1, "is gone", "on timeline 1 (this is 2", "backup restored", "DELETE FROM")
	r = b.streaming()
	r.WaitLog("is gone, and its checkpoint")
	r.WaitLog("transactions are lost")
	r.WaitLog("event_phantom")
	last := b.insert(2)
	b.requireStatus("published", append(lost, last...))
	want := append(append(append(ids, more...), "event_phantom"), append(lost, last...)...)
	b.requireStream(want)
	requireLeaves(b, r)

	// As a dump would have it: only somebody can say that the other cluster is gone.
	b.dropSlot()
	last = b.insert(1)
	b.exec(`update outbox_relay_checkpoints set timeline = 2, system_identifier = '7000000000000000000'`)
	requireEnd(t, b.start(), 1, "restored from a dump", "7000000000000000000", "UPDATE public.outbox_relay_checkpoints SET system_identifier", "DELETE FROM")
	b.exec(`update outbox_relay_checkpoints set timeline = 3, system_identifier = (select system_identifier::text from pg_control_system())`)
	requireEnd(t, b.start(), 1, "old primary", "connect to the current one")
	b.exec(`update outbox_relay_checkpoints set timeline = 2`)
	r = b.streaming()
	b.requireStatus("published", last)
	b.requireStream(append(want, last...))
	requireLeaves(b, r)
}
