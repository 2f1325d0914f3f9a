// Package examples tests the programs of the folder examples, which is a module
// of its own, as processes.
package examples

import (
	"context"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const folder = "../../examples"

// shop is a database with the outbox and the tables of examples/orders, and a
// stream of its own. There is no relay: a test publishes what it needs.
type shop struct {
	testing.TB
	url  string
	sql  *pgx.Conn
	nats *testenv.NATSServer
	js   jetstream.JetStream
}

func setup(t testing.TB) *shop {
	t.Helper()
	s := setupNoStream(t)
	_, err := s.js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.>"}})
	s.must(err)
	return s
}

func setupNoStream(t testing.TB) *shop {
	t.Helper()
	s := &shop{TB: t, url: testenv.SeasonedDatabase(t, testenv.Postgres(t)), nats: testenv.NATS(t, testenv.NATSOptions{})}
	s.sql = s.connect()
	tables, err := os.ReadFile(filepath.Join(folder, "orders", "tables.sql"))
	s.must(err)
	s.exec(string(tables))
	s.exec(`insert into stock values ('cup', 10)`)
	s.exec(`insert into shelf values ('cup', 10)`)

	nc, err := nats.Connect(s.nats.URL(), nats.MaxReconnects(-1))
	s.must(err)
	t.Cleanup(nc.Close)
	s.js, err = jetstream.New(nc)
	s.must(err)
	return s
}

func (s *shop) must(err error) {
	if err != nil {
		s.Helper()
		s.Fatal(err)
	}
}

func (s *shop) connect() *pgx.Conn {
	s.Helper()
	conn, err := pgx.Connect(s.Context(), s.url)
	s.must(err)
	s.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func (s *shop) exec(sql string, args ...any) {
	s.Helper()
	_, err := s.sql.Exec(s.Context(), sql, args...)
	s.must(err)
}

func (s *shop) count(sql string, args ...any) (n int) {
	s.Helper()
	s.must(s.sql.QueryRow(s.Context(), sql, args...).Scan(&n))
	return n
}

// require fails the test unless the count is n.
func (s *shop) require(n int, sql string, args ...any) {
	s.Helper()
	if got := s.count(sql, args...); got != n {
		s.Errorf("%d, want %d: %s %v", got, n, sql, args)
	}
}

// start starts a service of examples/orders.
func (s *shop) start(service, ready string) *testenv.Relay {
	s.Helper()
	env := map[string]string{"DATABASE_URL": s.url, "NATS_URL": s.nats.URL(), "ADDRESS": "127.0.0.1:0"}
	p := testenv.StartBinary(s, build(s, "orders"), env, service)
	p.WaitLog(ready)
	return p
}

// publish puts a message into the stream as the relay does. msgID is what the
// stream tells duplicates by.
func (s *shop) publish(msgID, event, payload string) {
	s.Helper()
	msg := &nats.Msg{Subject: "events.order.placed", Data: []byte(payload), Header: nats.Header{
		"Nats-Msg-Id": {msgID}, "ce-id": {event}, "ce-type": {"placed"}}}
	_, err := s.js.PublishMsg(s.Context(), msg)
	s.must(err)
}

// awaitAnswered waits until the consumer has answered so many messages for good,
// and has none at hand.
func (s *shop) awaitAnswered(consumer string, n uint64) {
	s.Helper()
	testenv.Eventually(s, consumer+"'s answers", func() bool {
		c, err := s.js.Consumer(s.Context(), "EVENTS", consumer)
		if err != nil {
			return false
		}
		info := c.CachedInfo()
		return info.AckFloor.Stream == n && info.NumAckPending == 0 && info.NumPending == 0
	})
}

// build builds a program of the examples and returns its path.
func build(t testing.TB, program string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), program)
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", path, "./"+program)
	cmd.Dir, cmd.Env = folder, append(os.Environ(), "GOWORK=off", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	readSources(t)
	return path
}

// readSources reads all that the build depends on, so that go test knows that a
// result is out of date when it has changed.
func readSources(t testing.TB) {
	t.Helper()
	err := filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && slices.Contains([]string{".go", ".mod", ".sum"}, filepath.Ext(path)) {
			_, err = os.ReadFile(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
