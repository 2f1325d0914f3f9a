package ops_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/testenv"
	"outbox-relay/migrations"
	"outbox-relay/ops"
	"outbox-relay/outbox"
	"outbox-relay/sink"
)

// desk is an operator's: a migrated database, its NATS server, and the commands.
type desk struct {
	*testing.T
	url   string
	sql   *pgx.Conn
	nats  *testenv.NATSServer
	slot  string
	admin ops.Admin
	out   text // of the commands so far: results
	err   text // and what is said beside them
}

// text is what was written, by whomever.
type text struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (t *text) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.Write(p)
}

func (t *text) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.String()
}

// take returns what was written since it was taken last.
func (t *text) take() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	defer t.b.Reset()
	return t.b.String()
}

func setup(t *testing.T) *desk {
	t.Helper()
	return setupOn(t, testenv.Postgres(t))
}

func setupOn(t *testing.T, cluster *pgserver.Cluster) *desk {
	t.Helper()
	d := setupDatabase(t, testenv.SeasonedDatabase(t, cluster))
	d.exec(withoutFailures)
	return d
}

// withoutFailures takes what failed out of the history: else it would be in every
// list that is looked at.
const withoutFailures = `delete from events where status = 'failed'`

// setupFresh is for tests of figures about the whole outbox.
func setupFresh(t *testing.T) *desk {
	t.Helper()
	url := testenv.Database(t, testenv.Postgres(t))
	config, err := pgx.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	err = migrations.Up(t.Context(), config, migrations.Target{Schema: "public", Table: "events", Publication: "outbox_relay"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return setupDatabase(t, url)
}

func setupDatabase(t *testing.T, url string) *desk {
	t.Helper()
	d := &desk{T: t, url: url, nats: testenv.NATS(t, testenv.NATSOptions{})}
	d.slot = testenv.SlotName(t, d.url)
	var err error
	d.sql, err = pgx.Connect(t.Context(), d.url)
	d.must(err)
	t.Cleanup(func() { d.sql.Close(context.Background()) })
	d.admin = ops.Admin{
		Postgres: func() (string, error) { return d.url, nil },
		Table:    outbox.Table{Schema: "public", Name: "events", Publication: "outbox_relay", Slot: d.slot, Mode: outbox.Mark},
		Sink: sink.Config{Servers: []string{d.nats.URL()}, InboxPrefix: "_INBOX_test",
			Stream: sink.StreamConfig{Name: "EVENTS"}},
		In: strings.NewReader(""), Out: &d.out, Err: &d.err,
	}
	return d
}

func (d *desk) must(err error) {
	if err != nil {
		d.Helper()
		d.Fatal(err)
	}
}

func (d *desk) exec(sql string, args ...any) {
	d.Helper()
	_, err := d.sql.Exec(d.Context(), sql, args...)
	d.must(err)
}

func ask[T any](d *desk, sql string, args ...any) T {
	d.Helper()
	var v T
	d.must(d.sql.QueryRow(d.Context(), sql, args...).Scan(&v))
	return v
}

// insert inserts n events and returns their ids, which grow.
func (d *desk) insert(n int, aggregate, event string) []string {
	d.Helper()
	rows, err := d.sql.Query(d.Context(), `insert into events (aggregate_type, event_type, payload)
		select $2, $3, '{}' from generate_series(1, $1) returning id`, n, aggregate, event)
	d.must(err)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	d.must(err)
	return ids
}

func (d *desk) fail(ids ...string) {
	d.Helper()
	d.exec(`update events set status = 'failed', failed_at = now(), failed_attempts = 1, failed_reasons = '{"too large"}' where id = any ($1)`, ids)
}

// says requires that each of the parts stands in what was said.
func (d *desk) says(what string, parts ...string) {
	d.Helper()
	for _, part := range parts {
		if !strings.Contains(what, part) {
			d.Errorf("%q is missing in:\n%s", part, what)
		}
	}
}

// listen makes a slot that shows what is asked of the relay.
func (d *desk) listen() {
	d.Helper()
	d.exec(`select pg_create_logical_replication_slot($1, 'test_decoding')`, d.slot+"_wal")
}

// request is the content of a logical message.
type request struct {
	Retry []struct {
		ID      string `json:"id"`
		Attempt int    `json:"attempt"`
	} `json:"retry"`
	Replay string   `json:"replay"`
	IDs    []string `json:"ids"`
	lsn    string
}

// requests lists what was asked of the relay since listen.
func (d *desk) requests() []request {
	d.Helper()
	// message: transactional: 1 prefix: outbox_relay:16400, sz: 107 content:<signature> {…}
	prefix := "message: transactional: 1 prefix: " + ask[string](d, `select 'outbox_relay:' || 'events'::regclass::oid`) + ","
	rows, err := d.sql.Query(d.Context(), `select lsn::text, data from pg_logical_slot_peek_changes($1, null, null)
		where data like 'message:%'`, d.slot+"_wal")
	d.must(err)
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (r request, err error) {
		var data string
		if err = row.Scan(&r.lsn, &data); err != nil {
			return r, err
		}
		content, found := strings.CutPrefix(data, prefix)
		if _, content, _ = strings.Cut(content, "content:"); !found {
			return r, fmt.Errorf("%q does not begin with %q", data, prefix)
		}
		_, content, _ = strings.Cut(content, " ")
		return r, json.Unmarshal([]byte(content), &r)
	})
	d.must(err)
	return list
}

// relay starts the real one, and waits until it streams.
func (d *desk) relay(settings ...string) *testenv.Relay {
	d.Helper()
	env := d.env()
	for _, setting := range settings {
		name, value, _ := strings.Cut(setting, "=")
		env[name] = value
	}
	r := testenv.StartRelay(d, env)
	r.WaitLog("msg=streaming")
	return r
}

func (d *desk) env() map[string]string {
	return map[string]string{"OUTBOX_POSTGRES_URL": d.url, "OUTBOX_SLOT": d.slot, "OUTBOX_NATS_URL": d.nats.URL(), "OUTBOX_HTTP_ADDR": ""}
}

// command runs the binary, and returns its exit code and what it says.
func (d *desk) command(args ...string) (code int, out string) {
	d.Helper()
	cmd := exec.Command(testenv.RelayBinary(d), args...)
	cmd.Dir = d.TempDir()
	for name, value := range d.env() {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	text, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		d.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(text)
}

func (d *desk) read() (s ops.Status) {
	d.Helper()
	d.out.take()
	d.must(d.admin.Status(d.Context(), true))
	decoder := json.NewDecoder(strings.NewReader(d.out.take()))
	decoder.DisallowUnknownFields()
	d.must(decoder.Decode(&s))
	return s
}

// A relay that is well, then one that has ended, as status tells of them.
func TestStatus(t *testing.T) {
	t.Parallel()
	d := setupFresh(t)
	code, out := d.command("status")
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
	d.says(out, "slot        does not exist", "checkpoint  none", "no relay has run yet", "stream EVENTS does not exist")

	r := d.relay()
	d.insert(10, "order", "placed")
	testenv.Eventually(t, "10 rows published", func() bool {
		return ask[int](d, `select count(*) from events where status = 'published' and aggregate_type <> 'history'`) == 10
	})
	s := d.read()
	if s.Slot == nil || !s.Slot.Active || s.Slot.ActivePID == nil || s.Slot.Plugin != "pgoutput" || s.Slot.WALStatus != "reserved" {
		t.Errorf("slot: %+v", s.Slot)
	}
	if s.Checkpoint == nil || s.Checkpoint.Phase != "streaming" || s.Checkpoint.StreamSequence != 10 || s.Checkpoint.Stream != "EVENTS" {
		t.Errorf("checkpoint: %+v", s.Checkpoint)
	}
	if s.Stream.Error != nil || *s.Stream.LastSequence != 10 || *s.Stream.Messages != 10 || *s.Stream.Bytes == 0 {
		t.Errorf("stream: %+v", s.Stream)
	}
	if *s.Rows.Pending != 0 || *s.Rows.Published != 10 || *s.Rows.Failed != 0 || *s.Rows.LagSeconds != 0 || !s.Rows.Exact {
		t.Errorf("rows: %+v", s.Rows)
	}
	if len(s.Problems) != 0 {
		t.Errorf("problems: %+v", s.Problems)
	}
	d.must(d.admin.Status(t.Context(), false))
	d.says(d.out.take(), "Nothing is wrong.", "published 10", "sequence 10 of stream EVENTS")

	if code := r.Terminate(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	testenv.Eventually(t, "the slot to be free", func() bool {
		return !ask[bool](d, `select active from pg_replication_slots where slot_name = $1`, d.slot)
	})
	ids := d.insert(3, "order", "placed")
	d.fail(ids[1])
	d.exec(`insert into outbox_relay_leftovers (slot, id, outcome, waiting) values ($1, 'a', 'failed', false), ($1, 'b', 'published', true)`, d.slot)
	d.exec(`insert into outbox_relay_batches (slot, kind, run, ids, done, commit_lsn, ordinal) values ($1, 'replay', 'again', '{x,y,z}', 1, '0/1', 3)`, d.slot)
	s = d.read()
	if s.Slot.Active || s.Slot.ActivePID != nil || s.Slot.LagBytes <= 0 || *s.Rows.Pending != 2 || *s.Rows.Failed != 1 || *s.Rows.LagSeconds <= 0 {
		t.Errorf("slot: %+v, rows: %+v", s.Slot, s.Rows)
	}
	if len(s.Failures) != 1 || s.Failures[0].ID != ids[1] || s.Failures[0].Reason != "too large" {
		t.Errorf("failures: %+v", s.Failures)
	}
	if s.Batch == nil || s.Batch.Kind != "replay" || *s.Batch.Run != "again" || s.Batch.Rows != 3 || s.Batch.Done != 1 {
		t.Errorf("batch: %+v", s.Batch)
	}
	d.must(d.admin.Status(t.Context(), false))
	out = d.out.take()
	if strings.Contains(out, "outbox-relay drop") {
		t.Errorf("it advises to drop a slot that was used a moment ago:\n%s", out)
	}
	d.says(out, "! no relay reads from the slot", "start one: `outbox-relay run`", "! 1 row is failed", "outbox-relay retry --all",
		"replay again: 1 of 3 rows done", ids[1], "too large", "1 row of rejected events", "1 row is locked")
	for line := range strings.Lines(out) {
		if len([]rune(strings.TrimSuffix(line, "\n"))) > 80 {
			t.Errorf("longer than 80 columns: %s", line)
		}
	}
	if d.admin.Table.Mode = outbox.Keep; d.read().Rows.Pending != nil || *d.read().Rows.Kept != 12 {
		t.Errorf("kept rows: %+v", d.read().Rows)
	}
}

// NATS that does not answer is one line of the status.
func TestStatusWithoutNATS(t *testing.T) {
	t.Parallel()
	d := setup(t)
	d.nats.Stop()
	d.insert(1, "order", "placed")
	s := d.read()
	if s.Stream.Error == nil || !strings.Contains(*s.Stream.Error, "OUTBOX_NATS_URL") || s.Stream.LastSequence != nil {
		t.Errorf("stream: %+v", s.Stream)
	}
	if *s.Rows.Pending != 1 {
		t.Errorf("rows: %+v", s.Rows)
	}
}

// The names of the JSON are stable: what is added here is for ever.
func TestStatusNames(t *testing.T) {
	t.Parallel()
	d := setup(t)
	d.must(d.admin.Status(t.Context(), true))
	var members map[string]any
	d.must(json.Unmarshal([]byte(d.out.take()), &members))
	want := []string{"after_publish", "at", "batch", "checkpoint", "failures", "leftovers", "problems", "relay", "rows", "slot", "stream", "table"}
	var got []string
	for name := range members {
		got = append(got, name)
	}
	if slices.Sort(got); !slices.Equal(got, want) {
		t.Errorf("members %q, want %q", got, want)
	}
}

func TestRetry(t *testing.T) {
	t.Parallel()
	d := setup(t)
	d.listen()
	ids := d.insert(5, "order", "placed")
	d.fail(ids[:4]...)
	code, out := d.command("retry", ids[2], "event_of_nobody", ids[4], ids[0], ids[2])
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
	d.says(out, "2 rows are pending again", "event_of_nobody: there is no such row", ids[4]+": is pending, not failed")
	asked := d.requests()
	if len(asked) != 1 || len(asked[0].Retry) != 2 || asked[0].Retry[0].ID != ids[0] || asked[0].Retry[1].ID != ids[2] || asked[0].Retry[0].Attempt != 1 {
		t.Errorf("asked for %+v", asked)
	}
	if code, out = d.command("retry", ids[4]); code != 1 {
		t.Errorf("exit code %d: %s", code, out)
	}
	d.says(out, "no row was retried")
	if code, out = d.command("retry", "--all"); code != 0 {
		t.Errorf("exit code %d: %s", code, out)
	}
	d.says(out, "2 rows are pending again")
	d.must(d.admin.RetryEvery(t.Context()))
	d.says(d.out.take(), "0 rows are pending again")
	for _, args := range [][]string{{"retry"}, {"retry", "--all", ids[0]}, {"retry", "--every"}} {
		if code, out := d.command(args...); code != 2 {
			t.Errorf("%q: exit code %d: %s", args, code, out)
		}
	}
}

func TestPark(t *testing.T) {
	t.Parallel()
	d := setup(t)
	ids := d.insert(3, "order", "placed")
	d.exec(`update events set status = 'published' where id = $1`, ids[1])
	code, out := d.command("park", ids[0], "the", "customer knows")
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
	d.says(out, ids[0]+" is failed now: parked by hand: the customer knows")
	if got := ask[string](d, `select concat_ws(' ', status, failed_attempts, failed_reasons, failed_at is not null) from events where id = $1`, ids[0]); got != `failed 1 {"parked by hand: the customer knows"} t` {
		t.Errorf("the row reads %s", got)
	}
	for id, status := range map[string]string{ids[0]: "failed", ids[1]: "published"} {
		if code, out = d.command("park", id); code != 1 {
			t.Errorf("exit code %d", code)
		}
		d.says(out, id+" is "+status+" already")
	}
	if code, out = d.command("park", "event_gone"); code != 1 {
		t.Errorf("without a row: exit code %d", code)
	}
	d.says(out, "there is no row event_gone", "pass --gone")
	if n := ask[int](d, `select count(*) from outbox_relay_leftovers`); n != 0 {
		t.Errorf("%d leftovers of a mistyped id", n)
	}
	if code, out = d.command("park", "event_gone", "--gone"); code != 0 {
		t.Errorf("exit code %d", code)
	}
	d.says(out, "event_gone has no row", d.slot)
	if got := ask[string](d, `select concat_ws(' ', outcome, reason, waiting) from outbox_relay_leftovers where slot = $1 and id = 'event_gone'`, d.slot); got != "failed parked by hand f" {
		t.Errorf("the leftover reads %s", got)
	}
	if code, _ = d.command("park", "event_gone"); code != 1 {
		t.Errorf("parked twice: exit code %d", code)
	}
	if code, _ = d.command("park"); code != 2 {
		t.Errorf("without an id: exit code %d", code)
	}
	if got := ask[string](d, `select status from events where id = $1`, ids[2]); got != "pending" {
		t.Errorf("another row is %s", got)
	}
}

func TestReplayChooses(t *testing.T) {
	t.Parallel()
	d := setupFresh(t)
	d.listen()
	d.insert(3, "order", "placed")
	payments := d.insert(2, "payment", "taken")
	failed := d.insert(1, "payment", "refused")
	d.fail(failed[0])
	d.exec(`update events set created_at = '2020-01-02T00:00:00Z' where aggregate_type = 'payment'`)

	code, out := d.command("replay", "--all", "--dry-run")
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
	d.says(out, "3  order placed", "2  payment taken", "5  in all", payments[1])
	if strings.Contains(out, "refused") {
		t.Errorf("a failed row is chosen:\n%s", out)
	}
	for _, c := range []struct {
		args []string
		rows string
	}{
		{[]string{"--from", "2020-01-02", "--to", "2020-01-03T00:00:00+00:00"}, "2  in all"},
		{[]string{"--to", "2020-01-02"}, "0  in all"},
		{[]string{"--from", "2020-01-03"}, "3  in all"},
		{[]string{"--aggregate-type", "order"}, "3  in all"},
		{[]string{"--event-type", "taken", "--after", payments[0]}, "1  in all"},
		{[]string{"--id", payments[0], "--id", "event_x", "--id", failed[0]}, "1  in all"},
	} {
		code, out := d.command(append([]string{"replay", "--dry-run"}, c.args...)...)
		if code != 0 || !strings.Contains(out, c.rows) {
			t.Errorf("%q: exit code %d, want %q in:\n%s", c.args, code, c.rows, out)
		}
	}
	d.must(d.admin.Replay(t.Context(), ops.Replay{Selection: outbox.Selection{IDs: []string{"event_x", failed[0]}}, DryRun: true}))
	d.says(d.err.take(), "event_x: there is no such row", failed[0]+": is failed: `outbox-relay retry "+failed[0]+"`")

	for _, args := range [][]string{{}, {"--dry-run"}, {"--all", "--event-type", "x"}, {"--from", "yesterday"}, {"--run", "a b", "--all"},
		{"--from", "2020-01-02", "--to", "2020-01-01"}, {"order"}} {
		if code, out := d.command(append([]string{"replay"}, args...)...); code != 2 {
			t.Errorf("%q: exit code %d: %s", args, code, out)
		}
	}
	if code, out = d.command("replay", "--all"); code != 1 || !strings.Contains(out, "--yes") {
		t.Errorf("without --yes and a terminal: exit code %d: %s", code, out)
	}
	if asked := d.requests(); len(asked) != 0 {
		t.Errorf("asked for %+v", asked)
	}
}

// follow plays the relay: it records that it is done with a request.
func (d *desk) follow(r request) {
	d.Helper()
	d.exec(`insert into outbox_relay_batches (slot, kind, run, ids, done, commit_lsn, ordinal) values ($1, 'replay', $2, $3, cardinality($3::text[]), $4::pg_lsn, 1)
		on conflict (slot) do update set run = excluded.run, ids = excluded.ids, done = excluded.done, commit_lsn = excluded.commit_lsn`,
		d.slot, r.Replay, r.IDs, r.lsn)
}

// A replay runs no more than one request ahead of what the relay is at, and ends
// when the relay is done with the last.
func TestReplayFollowsTheRelay(t *testing.T) {
	t.Parallel()
	d := setup(t)
	d.listen()
	ids := d.insert(3500, "order", "placed")
	ended := make(chan error, 1)
	go func() {
		ended <- d.admin.Replay(context.WithoutCancel(t.Context()), ops.Replay{Selection: outbox.Selection{AggregateType: "order"}, Run: "again", Yes: true})
	}()
	var seen []request
	for n := range 4 {
		testenv.Eventually(t, fmt.Sprintf("request %d", n+1), func() bool {
			seen = d.requests()
			return len(seen) >= min(n+2, 4)
		})
		if len(seen) > n+2 {
			t.Fatalf("%d requests, of which %d are done", len(seen), n)
		}
		d.follow(seen[n])
	}
	d.must(<-ended)
	var asked []string
	for _, r := range seen {
		if r.Replay != "again" || len(r.IDs) > 1000 {
			t.Errorf("run %q, %d ids", r.Replay, len(r.IDs))
		}
		asked = append(asked, r.IDs...)
	}
	if !slices.Equal(asked, ids) {
		t.Errorf("asked for %d rows, in another order or others than the %d", len(asked), len(ids))
	}
	d.says(d.out.take(), "run again: the relay is done with 3,500 rows")
	d.says(d.err.take(), "run again")
}

// Interrupted, a replay says how to go on; going on asks for the others only.
func TestReplayInterrupted(t *testing.T) {
	t.Parallel()
	d := setup(t)
	d.listen()
	ids := d.insert(2500, "order", "it's placed")
	r := testenv.StartRelay(t, d.env(), "replay", "--event-type", "it's placed", "--yes")
	var seen []request
	testenv.Eventually(t, "two requests", func() bool {
		seen = d.requests()
		return len(seen) == 2
	})
	r.WaitLog("waiting: slot " + d.slot + " does not exist: start the relay")
	r.Signal(syscall.SIGINT)
	if code := r.Wait(time.Minute); code != 1 {
		t.Errorf("exit code %d", code)
	}
	d.says(r.Logs(), "stopped: 2,000 of 2,500 rows were asked for", "--run "+seen[0].Replay, "--after "+ids[1999], `--event-type 'it'\''s placed'`, "--to ")
	_, rest, _ := strings.Cut(r.Logs(), "To go on:\n")
	again := exec.Command("sh", "-c", strings.Replace(strings.TrimSpace(rest), "outbox-relay", testenv.RelayBinary(t), 1)+" --dry-run")
	for name, value := range d.env() {
		again.Env = append(again.Env, name+"="+value)
	}
	out, err := again.CombinedOutput()
	d.must(err)
	d.says(string(out), "500  in all", ids[2000], ids[2499])
}

func TestDrop(t *testing.T) {
	t.Parallel()
	d := setup(t)
	r := d.relay()
	d.insert(3, "order", "placed")
	if code, out := d.command("drop", "another"); code != 2 || !strings.Contains(out, "OUTBOX_SLOT") {
		t.Errorf("another slot: exit code %d: %s", code, out)
	}
	code, out := d.command("drop", d.slot)
	if code != 1 {
		t.Errorf("exit code %d", code)
	}
	d.says(out, "is in use, by process", "stop the relay first", "pg_terminate_backend")
	if code := r.Terminate(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	testenv.Eventually(t, "the slot to be free", func() bool {
		return !ask[bool](d, `select active from pg_replication_slots where slot_name = $1`, d.slot)
	})
	d.exec(`insert into outbox_relay_leftovers (slot, id, outcome, waiting) values ($1, 'a', 'failed', false)`, d.slot)
	if code, out = d.command("drop", d.slot); code != 1 || !strings.Contains(out, "--force") {
		t.Errorf("with leftovers: exit code %d: %s", code, out)
	}
	d.exec(`update outbox_relay_leftovers set waiting = true, outcome = 'published'`)
	if code, out = d.command("drop", d.slot); code != 1 || !strings.Contains(out, "stay pending") {
		t.Errorf("with outcomes that wait: exit code %d: %s", code, out)
	}
	if code, out = d.command("drop", d.slot, "--force"); code != 0 {
		t.Errorf("exit code %d: %s", code, out)
	}
	d.says(out, "dropped slot "+d.slot, "dropped publication outbox_relay", "deleted 1 row from outbox_relay_checkpoints", "deleted 1 row from outbox_relay_leftovers")
	for _, left := range []string{`pg_replication_slots where slot_name = $1`, `outbox_relay_checkpoints where slot = $1`,
		`outbox_relay_leftovers where slot = $1`, `pg_publication where pubname = 'outbox_relay' and $1 <> ''`} {
		if n := ask[int](d, `select count(*) from `+left, d.slot); n != 0 {
			t.Errorf("%d are left of %s", n, left)
		}
	}
	if n := ask[int](d, `select count(*) from events where aggregate_type <> 'history'`); n != 3 {
		t.Errorf("%d rows are left", n)
	}
	if code, out = d.command("drop", d.slot); code != 0 {
		t.Errorf("once more: exit code %d: %s", code, out)
	}
	d.says(out, "slot "+d.slot+" does not exist", "publication outbox_relay does not exist")
}

// A publication that others may use, and a slot that is no relay's, stay.
func TestDropLeavesWhatIsShared(t *testing.T) {
	t.Parallel()
	d := setup(t)
	d.exec(`create table more (id int primary key)`)
	d.exec(`alter publication outbox_relay add table more`)
	d.must(d.admin.Drop(t.Context(), d.slot, false))
	d.says(d.out.take(), "kept publication outbox_relay: it publishes more than this table: more")
	d.exec(`insert into outbox_relay_checkpoints (slot, system_identifier, timeline, commit_lsn, ordinal, confirmed_lsn, stream, stream_created_at, stream_sequence, unrecorded_bound)
		values ('other', '1', 1, '0/1', 0, '0/1', 'EVENTS', now(), 0, 0)`)
	d.must(d.admin.Drop(t.Context(), d.slot, false))
	d.says(d.out.take(), "kept publication outbox_relay: there are checkpoints of other slots, whose relays may use it: other")
	if n := ask[int](d, `select count(*) from outbox_relay_checkpoints`); n != 1 {
		t.Errorf("%d checkpoints are left", n)
	}
	d.exec(`select pg_create_logical_replication_slot($1, 'test_decoding')`, d.slot)
	if err := d.admin.Drop(t.Context(), d.slot, true); err == nil || !strings.Contains(err.Error(), "left alone") {
		t.Errorf("a slot of another plugin: %v", err)
	}
}

// Status, retry, park and replay live on what deploy/postgres/roles.sql grants the
// relay; what a role may not, it is told.
func TestCommandsLeastPrivilege(t *testing.T) {
	t.Parallel()
	d := setupOn(t, testenv.OwnPostgres(t, nil))
	testenv.GrantRoles(t, d.url, "OUTBOX_RETRY_ATTEMPTS")
	address := testenv.AsRelay(t, d.url)
	d.admin.Postgres = func() (string, error) { return address, nil }
	d.listen()
	ids := d.insert(4, "order", "placed")
	d.fail(ids[0], ids[1])

	d.must(d.admin.RetryRows(t.Context(), ids[:1]))
	d.must(d.admin.RetryEvery(t.Context()))
	d.must(d.admin.Park(t.Context(), ids[2], "", false))
	d.must(d.admin.Park(t.Context(), "event_gone", "", true))
	if s := d.read(); *s.Rows.Pending != 3 || *s.Rows.Failed != 1 || s.Leftovers.Kept != 1 {
		t.Errorf("rows: %+v, leftovers: %+v", s.Rows, s.Leftovers)
	}
	ended := make(chan error, 1)
	go func() {
		ended <- d.admin.Replay(context.WithoutCancel(t.Context()), ops.Replay{Selection: outbox.Selection{AggregateType: "order"}, Yes: true})
	}()
	var seen []request
	testenv.Eventually(t, "two retries and a replay", func() bool {
		seen = d.requests()
		return len(seen) == 3
	})
	d.follow(seen[2])
	d.must(<-ended)

	d.exec(`revoke update (retried_at, retried_attempts) on events from relay`)
	if err := d.admin.RetryRows(t.Context(), ids[2:3]); err == nil || !strings.Contains(err.Error(), `GRANT UPDATE (retried_at, retried_attempts) ON "public"."events" TO "relay"`) {
		t.Errorf("without a right: %v", err)
	}
	if err := d.admin.RetryEvery(t.Context()); err == nil || !strings.Contains(err.Error(), `GRANT UPDATE (retried_at, retried_attempts) ON "public"."events" TO "relay"`) {
		t.Errorf("without a right: %v", err)
	}
	d.exec(`revoke update (status) on events from relay`)
	if err := d.admin.Park(t.Context(), ids[3], "", false); err == nil || !strings.Contains(err.Error(), `GRANT UPDATE (status, retried_at, retried_attempts) ON "public"."events" TO "relay"`) {
		t.Errorf("without a right: %v", err)
	}
}

// ids lists the Nats-Msg-Id of each message of the stream.
func (d *desk) ids(n uint64) (ids []string) {
	d.Helper()
	nc, err := nats.Connect(d.nats.URL())
	d.must(err)
	defer nc.Close()
	js, err := jetstream.New(nc)
	d.must(err)
	testenv.Eventually(d, fmt.Sprintf("%d messages", n), func() bool {
		stream, err := js.Stream(d.Context(), "EVENTS")
		return err == nil && stream.CachedInfo().State.LastSeq >= n
	})
	stream, err := js.Stream(d.Context(), "EVENTS")
	d.must(err)
	for seq := uint64(1); seq <= stream.CachedInfo().State.LastSeq; seq++ {
		msg, err := stream.GetMsg(d.Context(), seq)
		d.must(err)
		ids = append(ids, msg.Header.Get("Nats-Msg-Id"))
	}
	return ids
}

// The commands and the real relay: what a replay and a retry ask for is published
// once, in order, and an event that was parked by hand no longer halts the relay.
func TestCommandsMoveTheRelay(t *testing.T) {
	t.Parallel()
	d := setup(t)
	r := d.relay("OUTBOX_ON_REJECT=halt")
	ids := d.insert(1200, "order", "placed")
	d.ids(1200)
	d.must(d.admin.Replay(t.Context(), ops.Replay{Selection: outbox.Selection{AggregateType: "order"}, Run: "again", Yes: true}))
	want := slices.Clone(ids)
	for _, id := range ids {
		want = append(want, id+":again")
	}
	if got := d.ids(2400); !slices.Equal(got, want) {
		t.Errorf("%d messages, others than the %d, or in another order", len(got), len(want))
	}

	bad := ask[string](d, `insert into events (aggregate_type, event_type, payload, headers) values ('order', 'placed', '{}', '{"Nats-Msg-Id": "x"}') returning id`)
	if code := r.Wait(time.Minute); code != 1 {
		t.Errorf("exit code %d, want a halt", code)
	}
	d.must(d.admin.Park(t.Context(), bad, "forged", false))
	r = d.relay("OUTBOX_ON_REJECT=halt")
	want = append(want, d.insert(1, "order", "placed")...)
	if got := d.ids(2401); !slices.Equal(got, want) {
		t.Errorf("%d messages, others than the %d", len(got), len(want))
	}
	d.exec(`update events set headers = null where id = $1`, bad)
	d.must(d.admin.RetryRows(t.Context(), []string{bad}))
	if got := d.ids(2402); got[2401] != bad {
		t.Errorf("the last message is %s, not %s", got[2401], bad)
	}
	testenv.Eventually(t, "the row to be published", func() bool {
		return ask[string](d, `select status from events where id = $1`, bad) == "published"
	})
	if s := d.read(); len(s.Problems) != 0 || *s.Rows.Failed != 0 || s.Batch.Kind != "retry" || s.Batch.Done != 1 {
		t.Errorf("problems %+v, rows %+v, batch %+v", s.Problems, s.Rows, s.Batch)
	}
	if code := r.Terminate(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// A replay ends, too, when rows that it asked for have gone before the relay got
// to them: the last, or all.
func TestReplayOfRowsThatGo(t *testing.T) {
	t.Parallel()
	for _, gone := range []int{1, 3} {
		t.Run(fmt.Sprint(gone), func(t *testing.T) {
			t.Parallel()
			d := setup(t)
			r := d.relay()
			ids := d.insert(3, "order", "placed")
			d.ids(3)
			if code := r.Terminate(); code != 0 {
				t.Fatalf("exit code %d", code)
			}
			d.listen()
			ended := make(chan error, 1)
			go func() {
				ended <- d.admin.Replay(context.WithoutCancel(t.Context()), ops.Replay{Selection: outbox.Selection{AggregateType: "order"}, Run: "again", Yes: true})
			}()
			testenv.Eventually(t, "a request", func() bool { return len(d.requests()) == 1 })
			d.exec(`delete from events where id = any ($1)`, ids[3-gone:])
			d.relay()
			d.must(<-ended)
			if got := len(d.ids(uint64(6 - gone))); got != 6-gone {
				t.Errorf("%d messages, want %d", got, 6-gone)
			}
		})
	}
}
