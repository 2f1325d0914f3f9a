package outbox_test

import (
	"context"
	"encoding/json"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/testenv"
	"outbox-relay/outbox"
)

// statements keeps what a connection is asked.
type statements struct{ list []pgx.TraceQueryStartData }

func (s *statements) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	s.list = append(s.list, data)
	return ctx
}

func (s *statements) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// alone is a bundle with a server of its own, whose roles are the test's.
func alone(t *testing.T) *bundle {
	t.Helper()
	b := &bundle{T: t, url: testenv.Database(t, testenv.OwnPostgres(t, nil)),
		table: outbox.Table{Schema: "public", Name: "events", Publication: "outbox_relay", Slot: "slot", Mode: outbox.Mark}}
	b.migrate()
	b.sql = b.connect()
	return b
}

// asRelay connects as the relay's role.
func (b *bundle) asRelay() (*pgx.Conn, *statements) {
	b.Helper()
	testenv.GrantRoles(b, b.url)
	config, err := pgx.ParseConfig(testenv.AsRelay(b, b.url))
	b.must(err)
	for name, value := range outbox.CensusSettings() {
		config.RuntimeParams[name] = value
	}
	asked := &statements{}
	config.Tracer = asked
	conn, err := pgx.ConnectConfig(b.Context(), config)
	b.must(err)
	b.Cleanup(func() { conn.Close(context.Background()) })
	return conn, asked
}

// fill adds rows by thousands, past the trigger, as they stand when the relay has
// marked them. Their ids grow.
func (b *bundle) fill(thousands int, status string) {
	b.Helper()
	b.exec(`set session_replication_role = replica`)
	b.exec(`insert into events (id, version, aggregate_type, event_type, payload, status, created_at)
		select 'event_' || to_char(n.last + i, 'FM0000000000'), 0, 'order', 'placed', jsonb_build_object('pad', repeat('x', 200)), $2, now()
		from (select count(*) as last from events) n, generate_series(1, 1000 * $1::int) i`, thousands, status)
	b.exec(`reset session_replication_role`)
}

// buffers is how many pages Postgres touches for what a status asks, planning
// included.
func (b *bundle) buffers(conn *pgx.Conn, asked *statements) (touched int) {
	b.Helper()
	b.survey(conn) // so that the catalog's caches are warm
	asked.list = nil
	b.survey(conn)
	for _, s := range asked.list {
		var text string
		b.must(conn.QueryRow(b.Context(), `explain (analyze, buffers, format json) `+s.SQL, s.Args...).Scan(&text))
		var explained []struct {
			Plan, Planning struct {
				Hit  int `json:"Shared Hit Blocks"`
				Read int `json:"Shared Read Blocks"`
			}
		}
		b.must(json.Unmarshal([]byte(text), &explained))
		e := explained[0]
		touched += e.Plan.Hit + e.Plan.Read + e.Planning.Hit + e.Planning.Read
	}
	return touched
}

// survey asks all that a status asks of Postgres.
func (b *bundle) survey(conn *pgx.Conn) outbox.Census {
	b.Helper()
	_, err := b.table.Progress(b.Context(), conn)
	b.must(err)
	census, err := b.table.Census(b.Context(), conn)
	b.must(err)
	_, _, _, err = b.table.Failures(b.Context(), conn, 5)
	b.must(err)
	return census
}

// What a status costs does not grow with the table, and the relay's role may ask
// for it.
func TestStatusCostIsFlat(t *testing.T) {
	b := alone(t)
	conn, asked := b.asRelay()
	b.fill(30, "published")
	b.exec(`vacuum analyze events`)
	small := b.buffers(conn, asked)
	b.fill(150, "published")
	b.exec(`vacuum analyze events`)
	large := b.buffers(conn, asked)
	if large > small+small/4 {
		t.Errorf("%d buffers at 30,000 rows, %d at 180,000", small, large)
	}
	b.exec(`update events set failed_at = now(), failed_reasons = '{why}', status = 'failed' where id like '%77'`)
	b.exec(`vacuum analyze events`)
	failed := b.buffers(conn, asked)
	t.Logf("%d buffers at 30,000 rows, %d at 180,000, %d with 1,800 of them failed", small, large, failed)
	if failed > large+large/4+2*1800 { // twice the failed ones
		t.Errorf("%d buffers without failed rows, %d with 1,800", large, failed)
	}
}

// Rows that wait since an outage are found however many there are, and a few
// among many exactly.
func TestCensus(t *testing.T) {
	t.Parallel()
	b := setupFresh(t)
	requireAbout := func(what string, got, want, off int64) {
		t.Helper()
		if got < want-off || got > want+off {
			t.Errorf("%s: %d, want %d with an error of at most %d", what, got, want, off)
		}
	}
	c := b.survey(b.relay)
	if !c.Exact || c.Pending != 0 || c.Published != 0 || c.OldestPending != nil {
		t.Errorf("an empty table: %+v", c)
	}
	b.fill(5, "published")
	pending := b.insert(3)
	if c = b.survey(b.relay); !c.Exact || c.Pending != 3 || c.Published != 5000 || c.Step != 0 {
		t.Errorf("a small table: %+v", c)
	}
	if age := get[time.Time](b, `select created_at from events where id = $1`, pending[0]); !c.OldestPending.Equal(age) {
		t.Errorf("the oldest pending row is of %s, not %s", c.OldestPending, age)
	}
	b.exec(`truncate events`)
	b.fill(6, "published")
	b.exec(`update events set created_at = now() - interval '1 hour', status = 'pending' where id = 'event_0000000007'`)
	b.fill(5, "published")
	if c = b.survey(b.relay); !c.Exact || c.Pending != 1 || c.Published != 10_999 || c.Step != 1 {
		t.Errorf("a table of few pages is read whole: %+v", c)
	}
	b.exec(`update events set status = 'published'`)
	b.fill(49, "published")
	b.fill(40, "pending")
	c = b.survey(b.relay)
	if c.Exact || c.Step < 2 || c.NewestPending != outbox.CensusNewest {
		t.Errorf("a large table: %+v", c)
	}
	step := c.Step * 30 // rows of a page, at the most
	requireAbout("pending", c.Pending, 40_000, 4*step)
	requireAbout("published", c.Published, 60_000, 4*step)
}

// A partitioned table is counted like one in one piece.
func TestCensusOfAPartitionedTable(t *testing.T) {
	t.Parallel()
	b := setupFresh(t)
	b.exec(`create table parts (like events) partition by range (id)`)
	b.exec(`create table parts_1 partition of parts (primary key (id)) for values from (minvalue) to ('event_0000030001')`)
	b.exec(`create table parts_2 partition of parts (primary key (id)) for values from ('event_0000030001') to (maxvalue)`)
	b.fill(50, "published")
	b.fill(1, "pending")
	b.exec(`insert into parts select * from events`)
	b.table.Name = "parts"
	c, err := b.table.Census(t.Context(), b.relay)
	b.must(err)
	if c.Pending != 1000 || c.NewestPending != 1000 || c.Step < 2 || c.Published < 45_000 || c.Published > 55_000 {
		t.Errorf("%+v", c)
	}
}

func TestFailures(t *testing.T) {
	t.Parallel()
	b := setupFresh(t)
	ids := b.insert(8)
	b.exec(`update events set status = 'failed', failed_attempts = 2, failed_reasons = array['first', 'last ' || right(id, 3)],
		failed_at = now() - make_interval(secs => (select n from unnest($1::text[]) with ordinality u(i, n) where i = id)) where id = any ($1)`, ids[:7])
	b.exec(`update events set status = 'published' where id = $1`, ids[0]) // retried since
	failed, exact, newest, err := b.table.Failures(t.Context(), b.relay, 5)
	b.must(err)
	if failed != 6 || !exact || len(newest) != 5 {
		t.Fatalf("%d failed (exactly: %v): %+v", failed, exact, newest)
	}
	for i, f := range newest {
		if f.ID != ids[i+1] || f.Attempts != 2 || f.AggregateType != "order" || f.Reason != "last "+f.ID[len(f.ID)-3:] {
			t.Errorf("failure %d: %+v", i, f)
		}
	}
}
