package outbox_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"testing"

	"github.com/jackc/pgx/v5"

	"outbox-relay/checkpoint"
	"outbox-relay/internal/testenv"
	"outbox-relay/migrations"
	"outbox-relay/outbox"
	"outbox-relay/outbox/event"
)

// What a statement may do for each row of its batch, however large the table is and
// whatever the statistics say of it: pages that it reads, and rows that its plan's
// nodes handle. The second shows what a plan does in memory alone.
const (
	pagesPerRow = 60
	stepsPerRow = 40
)

// layout is a kind of outbox whose plans differ.
type layout struct {
	name   string
	sizes  []int // rows
	target migrations.Target
	make   string // before migrating
	after  string // after migrating
	insert string // of rows $1 to $2, all pending, over the last 380 days
}

var layouts = []layout{
	{name: "plain", sizes: []int{1000, 40_000}, target: migrations.Target{Table: "events"},
		after: `alter table events disable trigger user`,
		insert: `insert into events (id, aggregate_type, event_type, payload, status, created_at)
			select 'event_' || ulid(at), 'order', 'created', '{}', 'pending', at
			from generate_series($1::int, $2) i, lateral (select now() - (100000 - i) * interval '328 seconds') as t(at)`},
	{name: "partitioned", sizes: []int{4000}, target: migrations.Target{Table: "events", Partitioned: true},
		after: `alter table events disable trigger user;
			do $$ begin for day in 0..399 loop
				execute format('create table events_%s partition of events for values from (%L) to (%L)', day,
					date_trunc('day', now(), 'UTC') - (398 - day) * interval '1 day', date_trunc('day', now(), 'UTC') - (397 - day) * interval '1 day');
			end loop; end $$`,
		insert: `insert into events (id, aggregate_type, event_type, payload, status, created_at)
			select 'event_' || ulid(at), 'order', 'created', '{}', 'pending', at
			from generate_series($1::int, $2) i, lateral (select now() - (100000 - i) * interval '328 seconds') as t(at)`},
	{name: "bigint", sizes: []int{10_000}, target: migrations.Target{Table: "own", Names: map[string]string{"id": "id"}},
		make:   `create table own (id bigint primary key, aggregate_type text, event_type text, payload jsonb)`,
		insert: `insert into own select i, 'order', 'placed', '1' from generate_series($1::int, $2) i`},
	{name: "uuid", sizes: []int{10_000}, target: migrations.Target{Table: "own", Names: map[string]string{"id": "id"}},
		make:   `create table own (id uuid primary key, aggregate_type text, event_type text, payload jsonb)`,
		insert: `insert into own select gen_random_uuid(), 'order', 'placed', '1' from generate_series($1::int, $2) i`},
}

// ulidAt makes a ULID of a time, as gen_random_ulid does of the present one.
const ulidAt = `create function ulid(at timestamptz) returns text language sql volatile as $$
	select string_agg(substr('0123456789ABCDEFGHJKMNPQRSTVWXYZ', 1 + (ms >> (5 * n) & 31)::int, 1), '' order by n desc)
		|| upper(translate(substr(md5(random()::text), 1, 16), 'ilou', 'abcd'))
	from generate_series(0, 9) n, lateral (select (extract(epoch from at) * 1000)::bigint) as t(ms) $$`

// What is done to a batch costs as much as the batch is large, and not as the table
// is, or as its statistics have it.
func TestCostFollowsTheBatch(t *testing.T) {
	t.Parallel()
	for _, l := range layouts {
		for _, size := range l.sizes {
			t.Run(fmt.Sprint(l.name, size), func(t *testing.T) {
				t.Parallel()
				planned(t, l).throughItsLife(size)
			})
		}
	}
}

// plans is an outbox of a layout, and the relay's connection to it.
type plans struct {
	*bundle
	layout layout
	store  *checkpoint.Store
	sent   *statement
	filled int
}

func planned(t *testing.T, l layout) *plans {
	t.Helper()
	b := &bundle{T: t, url: testenv.Database(t, testenv.Postgres(t))}
	b.sql = b.connect()
	l.target.Schema, l.target.Publication = "public", "outbox_relay"
	b.exec(ulidAt)
	if l.make != "" {
		b.exec(l.make)
	}
	config, err := pgx.ParseConfig(b.url)
	b.must(err)
	b.must(migrations.Up(t.Context(), config, l.target, slog.New(slog.DiscardHandler)))
	if l.after != "" {
		b.exec(l.after)
	}
	b.exec(`do $$ declare part regclass; begin for part in select relid from pg_partition_tree('` + l.target.Table + `') where isleaf
		union select oid from pg_class where oid = '` + l.target.Table + `'::regclass and relkind = 'r' loop
		execute format('alter table %s set (autovacuum_enabled = off)', part); end loop; end $$`)
	p := &plans{bundle: b, layout: l, sent: &statement{}}
	config.Tracer = p.sent
	config.RuntimeParams["plan_cache_mode"] = "force_custom_plan"
	for name, value := range outbox.LookupSettings() {
		config.RuntimeParams[name] = value
	}
	b.relay, err = pgx.ConnectConfig(t.Context(), config)
	b.must(err)
	t.Cleanup(func() { b.relay.Close(context.Background()) })
	b.table = outbox.Table{Schema: "public", Name: l.target.Table, Publication: "outbox_relay", Slot: "slot", Mode: outbox.Mark,
		Columns: event.Columns{Names: l.target.Names}}
	found, err := b.table.ReadLayout(t.Context(), b.relay)
	b.must(err)
	b.table = b.table.As(found)
	p.store = b.claimed()
	return p
}

// statement remembers what was sent last.
type statement struct {
	sql  string
	args []any
}

func (s *statement) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	s.sql, s.args = data.SQL, data.Args
	return ctx
}

func (*statement) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// throughItsLife takes the outbox from its beginning to being old, with each kind of
// statistics on the way, and measures at each.
func (p *plans) throughItsLife(size int) {
	p.Helper()
	name := p.table.Name
	p.exec(`analyze ` + name)
	p.fill(size)
	p.measure("analyzed while empty")
	p.exec(`analyze ` + name)
	p.measure("analyzed while all was pending")
	p.exec(`update ` + name + ` set status = 'published', published_at = now()`)
	p.fill(max(1000, size/4))
	p.measure("analyzed before all was published")
	p.exec(`update ` + name + ` set status = 'published', published_at = now() where status = 'pending'`)
	p.exec(`vacuum analyze ` + name)
	p.fill(max(1000, size/4))
	p.measure("analyzed after all was published")
	p.exec(`update pg_class set reltuples = 10, relpages = 1 where relname ~ $1`, "^"+name)
	p.measure("analyzed long ago")
	p.exec(`delete from pg_statistic where starelid::regclass::text ~ $1`, "^"+name)
	p.exec(`update pg_class set reltuples = -1, relpages = 0 where relname ~ $1`, "^"+name)
	p.measure("never analyzed")
}

func (p *plans) fill(rows int) {
	p.Helper()
	p.exec(p.layout.insert, p.filled+1, p.filled+rows)
	p.filled += rows
}

const measured = 500 // rows of a batch

// measure looks at every statement about a batch of pending rows, and leaves all as
// it was.
func (p *plans) measure(when string) {
	p.Helper()
	rows, err := p.sql.Query(p.Context(), `select id::text from `+p.table.Name+` where status = 'pending' order by created_at desc, id desc limit $1`, measured)
	p.must(err)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	p.must(err)
	if len(ids) != measured {
		p.Fatalf("%d rows are pending", len(ids))
	}
	var sent, bad []checkpoint.Item
	for _, id := range ids {
		sent, bad = append(sent, stored(id)), append(bad, parked(id, "too big"))
	}
	nothing := func() {}
	for _, mode := range []outbox.Mode{outbox.Mark, outbox.Delete} {
		p.table.Mode = mode
		p.require(when, "record "+string(mode), nothing, func() { p.record(p.store, sent...) })
		p.require(when, "leftovers "+string(mode), func() {
			_, err := p.relay.Exec(p.Context(), `insert into outbox_relay_leftovers (slot, id, outcome) select 'slot', unnest($1::text[]), 'published'`, ids)
			p.must(err)
		}, func() { p.sweep(p.store) })
	}
	p.require(when, "fail", nothing, func() { p.record(p.store, bad...) })
	p.require(when, "messages without a row", nothing, func() {
		_, err := p.table.WithoutRow(p.Context(), p.relay, ids)
		p.must(err)
	})
	p.require(when, "read rows", nothing, func() {
		layout, err := p.table.ReadLayout(p.Context(), p.relay)
		p.must(err)
		_, err = p.table.Rows(p.Context(), p.relay, layout, ids)
		p.must(err)
	})
	p.requireRetry(when, ids)
}

// require fails where the last statement of do handles too much for its batch, behind
// what prepares for it.
func (p *plans) require(when, what string, prepare, do func()) {
	p.Helper()
	var last statement
	p.rolledBack(func() { prepare(); do(); last = *p.sent })
	p.rolledBack(func() { prepare(); p.explain(when, what, last.sql, last.args) })
}

// rolledBack does something in a transaction of the relay's connection, and undoes it.
func (p *plans) rolledBack(do func()) {
	p.Helper()
	_, err := p.relay.Exec(p.Context(), `begin`)
	p.must(err)
	do()
	_, err = p.relay.Exec(p.Context(), `rollback`)
	p.must(err)
}

// requireRetry measures what outbox_retry reads of the table and its indexes, where
// EXPLAIN does not look. It is planned by whatever settings the caller has.
func (p *plans) requireRetry(when string, ids []string) {
	p.Helper()
	_, err := p.sql.Exec(p.Context(), `begin`)
	p.must(err)
	p.exec(`update `+p.table.Name+` set status = 'failed', failed_at = now() where id::text = any ($1)`, ids)
	before := p.read()
	retried := get[int](p.bundle, `select `+migrations.RetryFunction(p.table.Name)+`(variadic $1::text[])`, ids)
	pages := float64(p.read()-before) / measured
	p.exec(`rollback`)
	p.Logf("%s, retry: %.1f pages a row", when, pages)
	if retried != measured || pages > pagesPerRow {
		p.Errorf("%s, retry: %d rows at %.1f pages a row, want %d at %d at most", when, retried, pages, measured, pagesPerRow)
	}
}

// read counts the pages that this session has read of the table in its transaction.
func (p *plans) read() int {
	p.Helper()
	return get[int](p.bundle, `select coalesce(sum(pg_stat_get_xact_blocks_fetched(relation)), 0)::int
		from (select relid as relation from pg_partition_tree($1) union select $1::regclass
			union select indexrelid from pg_index where indrelid in (select relid from pg_partition_tree($1) union select $1::regclass)) r`, p.table.Name)
}

// node is a node of a plan, as EXPLAIN shows it.
type node struct {
	Type     string  `json:"Node Type"`
	Rows     float64 `json:"Actual Rows"` // a loop
	Loops    float64 `json:"Actual Loops"`
	Filtered float64 `json:"Rows Removed by Filter"`
	Unjoined float64 `json:"Rows Removed by Join Filter"`
	Recheck  float64 `json:"Rows Removed by Index Recheck"`
	Hit      int     `json:"Shared Hit Blocks"`
	Read     int     `json:"Shared Read Blocks"`
	Plans    []node
}

// steps counts the rows that the node and those below it handle.
func (n node) steps() float64 {
	sum := (n.Rows + n.Filtered + n.Unjoined + n.Recheck) * n.Loops
	for _, below := range n.Plans {
		sum += below.steps()
	}
	return sum
}

func (p *plans) explain(when, what, sql string, args []any) {
	p.Helper()
	var text string
	p.must(p.relay.QueryRow(p.Context(), `explain (analyze, buffers, timing off, costs off, format json) `+sql, args...).Scan(&text))
	var plan []struct{ Plan node }
	p.must(json.Unmarshal([]byte(text), &plan))
	root := plan[0].Plan
	pages, steps := float64(root.Hit+root.Read)/measured, root.steps()/measured
	p.Logf("%s, %s: %.1f pages and %.1f steps a row", when, what, pages, steps)
	if pages > pagesPerRow || steps > stepsPerRow {
		p.Errorf("%s, %s: %.1f pages and %.1f steps a row, want %d and %d at most", when, what, pages, steps, pagesPerRow, stepsPerRow)
		if testing.Verbose() {
			p.Log(text)
		}
	}
}
