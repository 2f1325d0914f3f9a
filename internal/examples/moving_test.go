package examples

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

// pageSQL returns the blocks of SQL of a page of docs.
func pageSQL(t testing.TB, page string) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", page))
	if err != nil {
		t.Fatal(err)
	}
	var blocks []string
	for _, block := range regexp.MustCompile("(?ms)^```sql\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		blocks = append(blocks, block[1])
	}
	return blocks
}

// relay starts the relay, or another of its commands, on the shop's servers.
func (s *shop) relay(env map[string]string, args ...string) *testenv.Relay {
	s.Helper()
	all := map[string]string{"OUTBOX_POSTGRES_URL": s.url, "OUTBOX_NATS_URL": s.nats.URL(), "OUTBOX_HTTP_ADDR": ""}
	maps.Copy(all, env)
	return testenv.StartRelay(s, all, args...)
}

// messages reads what the stream has, once it has so many.
func (s *shop) messages(name string, n int) []jetstream.Msg {
	s.Helper()
	stream, err := s.js.Stream(s.Context(), name)
	s.must(err)
	testenv.Eventually(s, fmt.Sprintf("%d messages in %s", n, name), func() bool {
		info, err := stream.Info(s.Context())
		return err == nil && info.State.Msgs >= uint64(n)
	})
	consumer, err := stream.OrderedConsumer(s.Context(), jetstream.OrderedConsumerConfig{})
	s.must(err)
	var messages []jetstream.Msg
	for range n {
		msg, err := consumer.Next()
		s.must(err)
		messages = append(messages, msg)
	}
	info, err := stream.Info(s.Context())
	s.must(err)
	if info.State.Msgs != uint64(n) {
		s.Errorf("%s has %d messages, want %d", name, info.State.Msgs, n)
	}
	return messages
}

// The triggers of docs/from-wal-listener.md make an event of each change.
func TestComingFromWALListener(t *testing.T) {
	s := setup(t)
	sql := pageSQL(t, "from-wal-listener.md")
	s.exec(`create table users (id int primary key, name text)`)
	s.exec(sql[0])
	s.relay(nil)
	s.exec(`insert into users values (7, 'Ada')`)
	s.exec(`update users set name = 'Ben' where id = 7`)
	s.exec(`delete from users`)
	type change struct {
		Schema, Table, Action string
		Data, DataOld         map[string]any
	}
	var got []string
	for _, msg := range s.messages("EVENTS", 3) {
		var c change
		s.must(json.Unmarshal(msg.Data(), &c))
		got = append(got, fmt.Sprintf("%s %s %s.%s %s %v %v", msg.Subject(), msg.Headers().Get("ce-subject"), c.Schema, c.Table, c.Action, c.Data["name"], c.DataOld["name"]))
	}
	want := []string{
		"events.users.insert 7 public.users INSERT Ada <nil>",
		"events.users.update 7 public.users UPDATE Ben Ada",
		"events.users.delete 7 public.users DELETE <nil> Ben",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// poller is the program from which one comes: it publishes what is not marked, and
// marks it.
type poller struct {
	*shop
	stop, stopped chan struct{}
	published     atomic.Int64
}

func (s *shop) startPoller() *poller {
	s.Helper()
	p := &poller{shop: s, stop: make(chan struct{}), stopped: make(chan struct{})}
	conn := s.connect()
	_, err := s.js.CreateStream(s.Context(), jetstream.StreamConfig{Name: "OLD", Subjects: []string{"old.>"}})
	s.must(err)
	ctx := context.WithoutCancel(s.Context())
	round := func() error {
		rows, err := conn.Query(ctx, `select id, topic, payload::text from outbox where processed_at is null order by id limit 20`)
		if err != nil {
			return err
		}
		var id int64
		var topic, payload string
		var ids []int64
		for rows.Next() {
			if err := rows.Scan(&id, &topic, &payload); err != nil {
				return err
			}
			msg := &nats.Msg{Subject: "old." + topic, Data: []byte(payload), Header: nats.Header{"ce-id": {fmt.Sprint(id)}}}
			if _, err := s.js.PublishMsg(ctx, msg); err != nil {
				return err
			}
			ids = append(ids, id)
		}
		if err := rows.Err(); err != nil {
			return err
		}
		_, err = conn.Exec(ctx, `update outbox set processed_at = now() where id = any ($1)`, ids)
		p.published.Add(int64(len(ids)))
		return err
	}
	go func() {
		defer close(p.stopped)
		for {
			select {
			case <-p.stop:
				return
			default:
			}
			if err := round(); err != nil {
				s.Errorf("poller: %v", err)
				return
			}
		}
	}()
	s.Cleanup(p.end)
	return p
}

func (p *poller) end() {
	select {
	case <-p.stop:
	default:
		close(p.stop)
	}
	<-p.stopped
}

// await waits until the poller has published so many more.
func (p *poller) await(more int64) {
	p.Helper()
	least := p.published.Load() + more
	testenv.Eventually(p, "the poller", func() bool { return p.published.Load() >= least })
}

// startWriter inserts events into the table until end is called, which returns how
// many.
func (s *shop) startWriter() (end func() int) {
	s.Helper()
	conn := s.connect()
	ctx, cancel := context.WithCancel(context.WithoutCancel(s.Context()))
	written := make(chan int)
	go func() {
		n := 0
		for ctx.Err() == nil {
			if _, err := conn.Exec(context.WithoutCancel(ctx), `insert into outbox (topic, key, payload) values ('placed', $1, '{}')`, fmt.Sprint(n)); err != nil {
				s.Errorf("writer: %v", err)
				break
			}
			n++
		}
		written <- n
	}()
	return func() int { cancel(); return <-written }
}

// The steps of docs/from-polling.md, with poller and writer at work: each event is
// published once, by one of the two.
func TestComingFromPolling(t *testing.T) {
	s := setupNoStream(t)
	sql := pageSQL(t, "from-polling.md")
	s.exec(sql[0]) // the table
	poller, end := s.startPoller(), s.startWriter()
	poller.await(100)
	s.exec(sql[1]) // the aggregate type

	env := map[string]string{"OUTBOX_TABLE": "outbox", "OUTBOX_COLUMN_EVENT_TYPE": "topic", "OUTBOX_COLUMN_AGGREGATE_ID": "key",
		"OUTBOX_SLOT": "moved", "OUTBOX_PUBLICATION": "moved"}
	migrate := s.relay(env, "migrate")
	if code := migrate.Wait(30 * time.Second); code != 0 {
		t.Fatalf("migrate: exit code %d\n%s", code, migrate.Logs())
	}
	poller.await(50)
	s.exec(sql[2])
	poller.await(50)
	poller.end()
	s.exec(sql[3])
	relay := s.relay(env)
	relay.WaitLog("msg=streaming")
	testenv.Eventually(t, "the relay to publish what is inserted now", func() bool {
		return s.count(`select count(*) from outbox where processed_at is null and status = 'published'`) >= 200
	})
	written := end()

	old := int(poller.published.Load())
	seen := map[string]int{}
	for _, msg := range append(s.messages("OLD", old), s.messages("EVENTS", written-old)...) {
		seen[msg.Headers().Get("ce-id")]++
	}
	for id, times := range seen {
		if times != 1 {
			t.Errorf("event %s was published %d times", id, times)
		}
	}
	if len(seen) != written || old < 200 || written-old < 200 {
		t.Errorf("%d events of %d, %d by the poller", len(seen), written, old)
	}
	if code := relay.Terminate(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	s.exec(sql[4]) // nothing needs the poller's column any more
}
