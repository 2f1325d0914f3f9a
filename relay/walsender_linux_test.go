package relay_test

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats-server/v2/server"
	"golang.org/x/sync/errgroup"

	"outbox-relay/internal/testenv"
)

// silence is how old the walsender's last word from the relay may be: half of
// wal_sender_timeout, as the relay sets it.
const silence = 5 * time.Second

// load is what an application inserts while NATS is down: so many rows in one
// transaction at first, and then rows every so often.
type load struct {
	first, rows int
	every       time.Duration
}

var (
	trickle = load{rows: 40, every: 350 * time.Millisecond}
	flood   = load{first: 30_000, rows: 200, every: 100 * time.Millisecond}
)

const insertTexts = `insert into events (aggregate_type, event_type, payload)
	select 'order', 'created', jsonb_build_object('text', repeat('x', 300)) from generate_series(1, $1)`

// apply inserts on a connection of its own until stop is called, which returns when
// the last transaction has ended: one that is canceled may still commit behind that.
func (b *bundle) apply(l load) (stop func()) {
	b.Helper()
	conn := b.connect()
	stopped := make(chan struct{})
	var group errgroup.Group
	group.Go(func() error {
		tick := time.NewTicker(l.every)
		defer tick.Stop()
		for rows := max(l.first, l.rows); ; rows = l.rows {
			if _, err := conn.Exec(b.Context(), insertTexts, rows); err != nil {
				return err
			}
			select {
			case <-stopped:
				return nil
			case <-tick.C:
			}
		}
	})
	return func() {
		b.Helper()
		close(stopped)
		b.must(group.Wait())
	}
}

// heard samples how old the walsender's last word from the relay is.
type heard struct {
	*bundle
	name      string
	walsender int
	oldest    time.Duration // that was seen
}

func (b *bundle) listen(name string) *heard {
	b.Helper()
	return &heard{bundle: b, name: name, walsender: b.walsender()}
}

// sample fails the test where the walsender has ended, or has heard nothing for too
// long.
func (h *heard) sample() {
	h.Helper()
	var age float64
	err := h.sql.QueryRow(h.Context(), `select extract(epoch from clock_timestamp() - reply_time)
		from pg_stat_replication where pid = $1`, h.walsender).Scan(&age)
	if errors.Is(err, pgx.ErrNoRows) {
		h.Fatalf("%s: walsender %d has ended in the outage, which had heard nothing for %s; Postgres's log:\n%s",
			h.name, h.walsender, h.oldest, h.cluster.LogTail())
	}
	h.must(err)
	if h.oldest = max(h.oldest, time.Duration(age*float64(time.Second))); h.oldest > silence {
		h.Fatalf("%s: the walsender has heard nothing from the relay for %s", h.name, h.oldest)
	}
}

// through samples for as long as an outage lasts, by Postgres's clock.
func through(lasts time.Duration, all ...*heard) {
	b := all[0]
	b.Helper()
	began := b.now()
	testenv.EventuallyWithin(b, lasts+time.Minute, "the end of the outage", func() bool {
		for _, h := range all {
			h.sample()
		}
		return b.now().Sub(began) > lasts
	})
}

// requireHeld drains what has piled up, and looks that the walsender is the same and
// each event is stored once, in the order of commit.
func (h *heard) requireHeld(o *oracle) {
	h.Helper()
	h.requireStream(o.committed())
	if pid := h.walsender; pid != h.bundle.walsender() {
		h.Errorf("%s: the session was lost", h.name)
	}
	h.Logf("%s: the walsender had heard nothing for %s at the most", h.name, h.oldest.Round(time.Millisecond))
}

// While NATS is down the relay reads no further. The walsender hears from it all the
// same, however long that lasts: with a trickle of small transactions, which fills the
// receive buffer by what its segments take in the kernel rather than by their bytes,
// and with a flood.
func TestWalsenderHearsFromTheRelay(t *testing.T) {
	for name, l := range map[string]load{"trickle": trickle, "flood": flood} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			o := b.oracle()
			b.streaming(noWindow, "MAX_INFLIGHT=64")
			b.requireStream(b.insert(1000))
			h := b.listen(name)
			b.nats.Stop()
			stop := b.apply(l)
			through(2*time.Minute, h)
			b.nats.Restart()
			stop()
			h.requireHeld(o)
		})
	}
}

// A walsender that ends while nothing is read, since NATS is down, is noticed: the relay
// says why the session ended, and holds the slot again.
func TestWalsenderEndsWhileNATSIsDown(t *testing.T) {
	t.Parallel()
	b := setup(t)
	o := b.oracle()
	proxy := testenv.NewProxy(t, fmt.Sprintf("127.0.0.1:%d", b.cluster.Port()))
	r := b.streaming(noWindow, "MAX_INFLIGHT=64", b.address(func(u *url.URL, _ url.Values) { u.Host = proxy.Addr() }))
	b.requireStream(b.insert(100))
	walsender := b.walsender()
	b.nats.Stop()
	r.WaitLog("publishing is interrupted")
	testenv.Eventually(t, "the walsender to be held up", func() bool {
		b.exec(insertTexts, 5000) // until the buffers of all sockets on the way are full: some grow to tcp_rmem[2]
		return b.count(`select count(*) from pg_stat_activity where pid = $1 and wait_event in ('WalSenderWriteData', 'ClientWrite')`, walsender) == 1
	})
	proxy.Cut() // of the recorder's connection, too: either may be noticed first
	r.WaitLog("waiting to start again")
	b.nats.Restart()
	b.requireStream(o.committed())
	if pid := b.walsender(); pid == 0 || pid == walsender {
		t.Errorf("the slot is held by walsender %d, after %d was ended", pid, walsender)
	}
}

// paths are the ways from a relay to Postgres: what each changes in its environment.
var paths = map[string]func(*bundle, *testenv.Network) []string{
	"loopback": func(*bundle, *testenv.Network) []string { return nil },
	"socket": func(b *bundle, _ *testenv.Network) []string {
		return []string{b.address(func(u *url.URL, query url.Values) {
			query.Set("host", b.text(`show unix_socket_directories`))
			query.Set("port", u.Port())
			u.Host = ""
		})}
	},
	"TLS": func(b *bundle, _ *testenv.Network) []string {
		return []string{b.address(func(_ *url.URL, query url.Values) { query.Set("sslmode", "require") })}
	},
	"proxy": func(b *bundle, _ *testenv.Network) []string {
		proxy := testenv.NewProxy(b, fmt.Sprintf("127.0.0.1:%d", b.cluster.Port()))
		return []string{b.address(func(u *url.URL, _ url.Values) { u.Host = proxy.Addr() })}
	},
	"network": func(b *bundle, n *testenv.Network) []string {
		return []string{
			b.address(func(u *url.URL, _ url.Values) { u.Host = n.Host + ":" + u.Port() }),
			"NATS_URL=" + strings.Replace(b.nats.URL(), "127.0.0.1", n.Host, 1),
		}
	},
}

// address is the variable of the relay's URL, changed.
func (b *bundle) address(edit func(*url.URL, url.Values)) string {
	b.Helper()
	u, err := url.Parse(b.url)
	b.must(err)
	query := u.Query()
	edit(u, query)
	u.RawQuery = query.Encode()
	return "POSTGRES_URL=" + u.String()
}

// limits are what an administrator may have set for a database and for a role in it;
// the server has a wal_sender_timeout of 1 s.
var limits = map[string]string{
	"the server's limits": ``,
	"no limit":            `wal_sender_timeout = 0`,
	"limits of 1 s":       `wal_sender_timeout = '1s'; tcp_user_timeout = '1s'`,
}

// limit sets these for the database, and for the relay's role in it.
func (b *bundle) limit(settings string) {
	b.Helper()
	database := pgx.Identifier{b.text(`select current_database()`)}.Sanitize()
	for setting := range strings.SplitSeq(settings, ";") {
		if setting != "" {
			b.exec(`alter database ` + database + ` set ` + setting)
			b.exec(`alter role relay in database ` + database + ` set ` + setting)
		}
	}
}

// socketDir is a folder that Postgres can make its socket in, whoever it runs as.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "outbox-relay-socket-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

// The slot is held on every way to Postgres, and whatever limits are set there. All
// relays live through the same outage.
func TestSlotIsHeldOnEveryPath(t *testing.T) {
	t.Parallel()
	network := testenv.NewNetwork(t, 1<<20)
	sockets := socketDir(t)
	cluster := testenv.OwnPostgres(t, map[string]string{"listen_addresses": "*", "unix_socket_directories": sockets,
		"wal_sender_timeout": "1s", "max_wal_senders": "64", "max_replication_slots": "64"})
	var all []*heard
	var oracles []*oracle
	for path, variables := range paths {
		for name, settings := range limits {
			b := setupOn(t, cluster, testenv.NATSOptions{Edit: func(o *server.Options) { o.Host = "0.0.0.0" }})
			if len(all) == 0 {
				authority := testenv.NewAuthority(t)
				authority.Issue("server")
				b.secured(authority, "server", "local all all trust\nhost all relay 0.0.0.0/0 trust")
			}
			b.limit(settings)
			oracles = append(oracles, b.oracle())
			env := b.asRelay(b.with(append(variables(b, network), noWindow, "MAX_INFLIGHT=64")...))
			if path == "network" {
				program, args := network.Wrap(testenv.RelayBinary(t))
				testenv.StartBinary(t, program, env, args...).WaitLog("msg=streaming")
			} else {
				testenv.StartRelay(t, env).WaitLog("msg=streaming")
			}
			b.requireStream(b.insert(100))
			all = append(all, b.listen(path+", "+name))
		}
	}
	var stops []func()
	for _, h := range all {
		h.nats.Stop()
		stops = append(stops, h.apply(load{first: 2000, rows: 40, every: 350 * time.Millisecond}))
	}
	through(30*time.Second, all...)
	for i, h := range all {
		h.nats.Restart()
		stops[i]()
	}
	for i, h := range all {
		h.requireHeld(oracles[i])
	}
}
