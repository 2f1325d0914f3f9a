package replication_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/testenv"
	"outbox-relay/replication"
)

// bundle is a database with a published table t (id int) and a slot of its name.
type bundle struct {
	*testing.T
	cluster *pgserver.Cluster
	config  *pgx.ConnConfig
	slot    string
	sql     *pgx.Conn
}

func setup(t *testing.T) *bundle {
	t.Helper()
	return setupOn(t, testenv.Postgres(t))
}

func setupOn(t *testing.T, cluster *pgserver.Cluster) *bundle {
	t.Helper()
	b := &bundle{T: t, cluster: cluster}
	var err error
	url := testenv.SeasonedDatabase(t, cluster)
	b.config, err = pgx.ParseConfig(url)
	b.must(err)
	b.slot = testenv.SlotName(t, url)
	b.sql, err = pgx.ConnectConfig(t.Context(), b.config)
	b.must(err)
	t.Cleanup(func() { b.sql.Close(context.Background()) })
	b.exec(`create table t (id int primary key)`)
	b.exec(`create publication p for table t with (publish = 'insert')`)
	return b
}

func (b *bundle) must(err error) {
	if err != nil {
		b.Helper()
		b.Fatal(err)
	}
}

func (b *bundle) exec(sql string, args ...any) {
	b.Helper()
	_, err := b.sql.Exec(b.Context(), sql, args...)
	b.must(err)
}

func get[T any](b *bundle, sql string, args ...any) T {
	b.Helper()
	var v T
	b.must(b.sql.QueryRow(b.Context(), sql, args...).Scan(&v))
	return v
}

func (b *bundle) connect() *replication.Conn {
	b.Helper()
	conn, err := replication.Connect(b.Context(), &b.config.Config)
	b.must(err)
	b.Cleanup(conn.Close)
	return conn
}

// started is a session on a new slot.
func (b *bundle) started() *replication.Session {
	b.Helper()
	conn := b.connect()
	slot, err := conn.CreateSlot(b.Context(), b.slot, false)
	b.must(err)
	s, err := conn.Start(b.Context(), b.slot, "p", slot.Point)
	b.must(err)
	return s
}

func (b *bundle) read() replication.Slot {
	b.Helper()
	slot, err := replication.ReadSlot(b.Context(), b.sql, b.slot)
	b.must(err)
	return slot
}

// watcher is a handler that keeps what comes.
type watcher struct {
	block chan struct{} // what data waits for; nil: nothing
	waits chan struct{} // gets that it does; nil: nobody wants it
	fail  error         // of data

	mu      sync.Mutex
	inserts int
	end     pglogrepl.LSN // of the last commit
	walEnd  pglogrepl.LSN // of the last keepalive
	idles   int
	lost    chan error // gets what Lost says; nil: nobody wants it
}

func (w *watcher) Data(_ pglogrepl.LSN, data []byte) error {
	if w.block != nil {
		select {
		case w.waits <- struct{}{}:
		default:
		}
		<-w.block
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch data[0] {
	case 'I':
		w.inserts++
	case 'C':
		var commit pglogrepl.CommitMessage
		if err := commit.Decode(data[1:]); err != nil {
			return err
		}
		w.end = commit.TransactionEndLSN
	}
	return w.fail
}

func (w *watcher) Keepalive(walEnd pglogrepl.LSN, _ bool) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.walEnd = walEnd
	return nil
}

func (w *watcher) Notice(string) {}

func (w *watcher) Lost(err error) {
	if w.lost != nil {
		w.lost <- err
	}
}

func (w *watcher) Idle() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.idles++
}

// seen returns how many inserts came, and where the last commit ended.
func (w *watcher) seen() (inserts int, end pglogrepl.LSN) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.inserts, w.end
}

// running runs the session; stop ends it and returns what Run returned.
func running(t *testing.T, s *replication.Session, w *watcher) (stop func() error, done <-chan error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, w) }()
	t.Cleanup(cancel)
	return func() error { cancel(); return <-ended }, ended
}

func (b *bundle) await(w *watcher, inserts int) (end pglogrepl.LSN) {
	b.Helper()
	testenv.Eventually(b, fmt.Sprintf("%d inserts and their commit", inserts), func() bool {
		n, at := w.seen()
		end = at
		return n == inserts && at > 0
	})
	return end
}

// The life of a session: what is committed comes, what is confirmed moves the
// slot, to exactly there and never back; a stop and a Finish leave it free at
// once, and the next session starts behind what was confirmed.
func TestSession(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.started()
	w := &watcher{}
	stop, _ := running(t, s, w)
	b.exec(`insert into t select generate_series(1, 3)`)
	end := b.await(w, 3)
	if got := b.read(); got.Confirmed >= end || !got.Active || got.Plugin != "pgoutput" {
		t.Errorf("the slot before anything is confirmed: %+v", got)
	}
	s.Confirm(end)
	s.Confirm(end - 1)
	if s.Confirmed() != end {
		t.Errorf("confirmed %s, want %s: it never goes back", s.Confirmed(), end)
	}
	testenv.Eventually(t, "the slot to move", func() bool { return b.read().Confirmed == end })
	b.exec(`insert into t values (4)`) // comes, and is never confirmed
	b.await(w, 4)
	if err := stop(); !errors.Is(err, replication.ErrStopped) {
		t.Fatalf("run: %v, want ErrStopped", err)
	}
	b.must(s.Finish(t.Context()))
	if got := b.read(); got.Confirmed != end {
		t.Errorf("the slot after the end: %+v, want it confirmed at %s", got, end)
	}
	testenv.Eventually(t, "the slot to be free", func() bool { return !b.read().Active })

	next, err := b.connect().Start(t.Context(), b.slot, "p", end)
	b.must(err)
	again := &watcher{}
	stop, _ = running(t, next, again)
	b.await(again, 1)
	if err := stop(); !errors.Is(err, replication.ErrStopped) {
		t.Error(err)
	}
}

// What moves after the last status and before the end is in Finish's.
func TestFinishConfirms(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.started()
	w := &watcher{}
	stop, _ := running(t, s, w)
	b.exec(`insert into t values (1)`)
	end := b.await(w, 1)
	if err := stop(); !errors.Is(err, replication.ErrStopped) {
		t.Fatal(err)
	}
	s.Confirm(end)
	b.must(s.Finish(t.Context()))
	if got := b.read().Confirmed; got != end {
		t.Errorf("the slot is at %s, want %s", got, end)
	}
}

// An idle table beside a busy one: the walsender says when asked how far it is,
// and the slot can move there.
func TestKeepaliveOfAnIdleTable(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`create table busy (id int)`)
	s := b.started()
	w := &watcher{}
	stop, _ := running(t, s, w)
	b.exec(`insert into busy select generate_series(1, 1000)`)
	wal, err := pglogrepl.ParseLSN(get[string](b, `select pg_current_wal_lsn()::text`))
	b.must(err)
	var at pglogrepl.LSN
	testenv.Eventually(t, "a keepalive past the other table's WAL", func() bool {
		s.Ask()
		w.mu.Lock()
		defer w.mu.Unlock()
		at = w.walEnd
		return at >= wal
	})
	s.Confirm(at)
	testenv.Eventually(t, "the slot to be there", func() bool { return b.read().Confirmed >= wal })
	if inserts, _ := w.seen(); inserts != 0 {
		t.Errorf("%d inserts of another table", inserts)
	}
	w.mu.Lock()
	if w.idles == 0 {
		t.Error("never idle")
	}
	w.mu.Unlock()
	if err := stop(); !errors.Is(err, replication.ErrStopped) {
		t.Error(err)
	}
}

// While the handler blocks nothing is read, and status goes on being sent: the
// walsender does not take a stalled sink for a dead relay.
func TestStatusWhileTheHandlerBlocks(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.started()
	w := &watcher{block: make(chan struct{})}
	stop, _ := running(t, s, w)
	b.exec(`insert into t values (1)`)
	const reply = `select coalesce(max(reply_time), 'epoch') from pg_stat_replication
		join pg_replication_slots on active_pid = pid where slot_name = $1`
	last := get[time.Time](b, reply, b.slot)
	for range 2 {
		testenv.Eventually(t, "another status", func() bool { return get[time.Time](b, reply, b.slot).After(last) })
		last = get[time.Time](b, reply, b.slot)
	}
	close(w.block)
	b.await(w, 1)
	if err := stop(); !errors.Is(err, replication.ErrStopped) {
		t.Error(err)
	}
}

// A walsender that ends while the handler blocks is noticed: the handler is told, and the
// session ends with what was found.
func TestWalsenderEndsWhileTheHandlerBlocks(t *testing.T) {
	t.Parallel()
	b := setup(t)
	proxy := testenv.NewProxy(t, fmt.Sprintf("%s:%d", b.config.Host, b.config.Port))
	to := netip.MustParseAddrPort(proxy.Addr())
	b.config.Host, b.config.Port = to.Addr().String(), to.Port()
	w := &watcher{block: make(chan struct{}), waits: make(chan struct{}, 1), lost: make(chan error, 1)}
	_, done := running(t, b.started(), w)
	b.exec(`insert into t select generate_series(1, 200000)`)
	<-w.waits
	// A walsender that is told to end may be unable to, as it can't send its last words.
	proxy.Cut()
	lost := <-w.lost
	close(w.block)
	if err := <-done; err == nil || !errors.Is(err, lost) {
		t.Errorf("the session ended by %v, the handler was told of %v", err, lost)
	}
}

func TestSlotInUse(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.started()
	stop, _ := running(t, s, &watcher{})
	_, err := b.connect().Start(t.Context(), b.slot, "p", s.Confirmed())
	if !errors.Is(err, replication.ErrSlotInUse) {
		t.Errorf("the second: %v, want ErrSlotInUse", err)
	}
	if err := stop(); !errors.Is(err, replication.ErrStopped) {
		t.Error(err)
	}
	b.must(s.Finish(t.Context()))
	testenv.Eventually(t, "the slot to be free", func() bool { return !b.read().Active })
	successor, err := b.connect().Start(t.Context(), b.slot, "p", s.Confirmed())
	b.must(err)
	stop, _ = running(t, successor, &watcher{})
	if err := stop(); !errors.Is(err, replication.ErrStopped) {
		t.Error(err)
	}
}

// An LSN of 0 would be taken for the write position.
func TestStartRefusesZero(t *testing.T) {
	t.Parallel()
	b := setup(t)
	if _, err := b.connect().Start(t.Context(), b.slot, "p", 0); err == nil || !strings.Contains(err.Error(), "is 0") {
		t.Errorf("got %v", err)
	}
}

// The ways in which a session ends by itself, each told apart.
func TestSessionEnds(t *testing.T) {
	t.Parallel()
	t.Run("the handler fails", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		fault := errors.New("malformed")
		_, done := running(t, b.started(), &watcher{fail: fault})
		b.exec(`insert into t values (1)`)
		if err := <-done; !errors.Is(err, fault) {
			t.Errorf("got %v, want the handler's error", err)
		}
	})
	t.Run("the walsender is terminated", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		_, done := running(t, b.started(), &watcher{})
		b.exec(`select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = $1`, b.slot)
		err := <-done
		var pgErr *pgconn.PgError
		if !errors.As(err, &pgErr) || pgErr.Code != "57P01" {
			t.Errorf("got %v, want SQLSTATE 57P01", err)
		}
	})
	t.Run("the link is cut", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		proxy := testenv.NewProxy(t, fmt.Sprintf("127.0.0.1:%d", b.cluster.Port()))
		host, port, err := net.SplitHostPort(proxy.Addr())
		b.must(err)
		b.config.Host = host
		_, err = fmt.Sscan(port, &b.config.Port)
		b.must(err)
		_, done := running(t, b.started(), &watcher{})
		proxy.Cut()
		var network net.Error
		if err := <-done; !errors.As(err, &network) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("got %v, want a network error", err)
		}
	})
	t.Run("no publication", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		b.exec(`alter database ` + pgx.Identifier{b.config.Database}.Sanitize() + ` set client_min_messages = error`) // from 18 on it is a warning
		_, done := running(t, b.started(), &watcher{})
		b.exec(`drop publication p`)
		b.exec(`insert into t values (1)`)
		err := <-done
		var pgErr *pgconn.PgError
		if !errors.Is(err, replication.ErrPublication) && (!errors.As(err, &pgErr) || pgErr.Code != "42704") {
			t.Errorf("got %v, want ErrPublication or SQLSTATE 42704", err)
		}
	})
}

// A stop of Postgres is not held up by a session that has confirmed what came:
// it ends, and the server after it.
func TestStopOfPostgres(t *testing.T) {
	t.Parallel()
	cluster := testenv.OwnPostgres(t, nil)
	b := setupOn(t, cluster)
	s := b.started()
	w := &watcher{}
	_, done := running(t, s, w)
	b.exec(`insert into t values (1)`)
	end := b.await(w, 1)
	s.Confirm(end)
	testenv.Eventually(t, "the slot to move", func() bool { return b.read().Confirmed == end })
	b.must(cluster.Stop(t.Context(), pgserver.Fast))
	if err := <-done; err == nil || errors.Is(err, replication.ErrStopped) {
		t.Errorf("the session ends by %v", err)
	}
}

// Names are quoted for a publication: it may be called anything.
func TestPublicationOfAnyName(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const name = `pub 'of' "it", \ p`
	b.exec(`create publication ` + pgx.Identifier{name}.Sanitize() + ` for table t with (publish = 'insert')`)
	b.exec(`drop publication p`)
	conn := b.connect()
	slot, err := conn.CreateSlot(t.Context(), b.slot, false)
	b.must(err)
	s, err := conn.Start(t.Context(), b.slot, name, slot.Point)
	b.must(err)
	w := &watcher{}
	stop, _ := running(t, s, w)
	b.exec(`insert into t values (1)`)
	b.await(w, 1)
	if err := stop(); !errors.Is(err, replication.ErrStopped) {
		t.Error(err)
	}
}

// The session is pinned to what the decoder expects, whatever the database's
// defaults are.
func TestSessionIsPinned(t *testing.T) {
	t.Parallel()
	b := setup(t)
	database := pgx.Identifier{b.config.Database}.Sanitize()
	b.exec(`alter table t add column at timestamptz, add column name text`)
	for setting, value := range map[string]string{"datestyle": "'German, DMY'", "timezone": "'Asia/Kolkata'", "client_encoding": "'LATIN1'"} {
		b.exec(`alter database ` + database + ` set ` + setting + ` = ` + value)
	}
	s := b.started()
	w := &keeper{}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, w) }()
	b.exec(`insert into t values (1, '2026-01-02 03:04:05.6+00', 'größe €')`)
	testenv.Eventually(t, "the insert", func() bool { return w.insert() != nil })
	cancel()
	if err := <-done; !errors.Is(err, replication.ErrStopped) {
		t.Error(err)
	}
	for _, want := range []string{"2026-01-02 03:04:05.6+00", "größe €"} {
		if !bytes.Contains(w.insert(), []byte(want)) {
			t.Errorf("the insert has no %s: %q", want, w.insert())
		}
	}
}

// No timeout of the database ends a session: neither while a new slot's snapshot
// is lent, nor while one transaction is decoded for longer.
func TestTimeoutsOfTheDatabase(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.OwnPostgresSince(t, 17, nil)) // which has all of them
	database := pgx.Identifier{b.config.Database}.Sanitize()
	for _, setting := range []string{"transaction_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout", "statement_timeout"} {
		b.exec(`alter database ` + database + ` set ` + setting + ` = '100ms'`)
	}
	// outlasted waits until the walsender, if it has not gone, is in this state, and
	// has had far more time than the timeouts are.
	outlasted := func(state string) {
		b.Helper()
		since := time.Now()
		testenv.Eventually(t, "the walsender to be long enough at "+state, func() bool {
			return get[bool](b, `select count(*) = count(*) filter (where concat_ws(' ', state, wait_event) = $1) and clock_timestamp() > $2::timestamptz + interval '1 s'
				from pg_stat_activity where backend_type = 'walsender'`, state, since)
		})
	}
	conn := b.connect()
	slot, err := conn.CreateSlot(t.Context(), b.slot, false)
	b.must(err)
	outlasted("idle in transaction ClientRead")
	s, err := conn.Start(t.Context(), b.slot, "p", slot.Point)
	b.must(err)
	w := &watcher{block: make(chan struct{})}
	stop, _ := running(t, s, w)
	const events = 200_000 // more than fits between the two
	b.exec(`insert into t select generate_series(1, $1)`, events)
	outlasted("active WalSenderWriteData")
	close(w.block)
	b.await(w, events)
	if err := stop(); !errors.Is(err, replication.ErrStopped) {
		t.Error(err)
	}
}

// keeper keeps the last insert.
type keeper struct {
	watcher
	last []byte
}

func (k *keeper) Data(_ pglogrepl.LSN, data []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if data[0] == 'I' {
		k.last = bytes.Clone(data)
	}
	return nil
}

func (k *keeper) insert() []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.last
}
