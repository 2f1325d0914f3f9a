package outbox_test

import (
	"testing"

	"outbox-relay/migrations"
	"outbox-relay/outbox"
)

// A row is found wherever it is, also where its id is of another time than its
// partition: then its outcome is a leftover, which is looked for everywhere.
func TestRowsAstray(t *testing.T) {
	t.Parallel()
	few := layouts[1]
	few.after = `alter table events disable trigger user;
		create table events_2020 partition of events for values from ('2019-12-01') to ('2020-02-01');
		create table events_since partition of events for values from ('2022-01-01') to (maxvalue)`
	p := planned(t, few)
	p.fill(100)
	p.exec(`insert into events (id, aggregate_type, event_type, payload, status, created_at)
		select 'event_' || ulid('2020-01-01'), 'order', 'created', '{}', 'pending', now() from generate_series(1, 3)`)
	ids := get[[]string](p.bundle, `select array_agg(id order by created_at desc) from (select id, created_at from events order by created_at desc limit 5) newest`)
	astray := get[[]string](p.bundle, `select array_agg(id) from events where created_at = (select max(created_at) from events)`)
	if near := p.table.Near(ids); near != len(astray) {
		t.Errorf("one statement is to look up %d rows, want %d: the others are of another time", near, len(astray))
	}

	got := p.record(p.store, stored(astray[0]), parked(astray[1], "bad"), stored("event_01DXF6DT00TSV4RRFFQ69G5FAV"), stored("absent"))
	requireCounts(t, got, outbox.Recorded{FailedLocked: 1}, 1)
	if got.Astray != 2 {
		t.Errorf("%d rows are astray, want 2", got.Astray)
	}
	for pass := range 2 { // in the partitions that the ids tell, then in all
		batch, last, err := p.table.NextLeftovers(t.Context(), p.relay, "", 100)
		p.must(err)
		var written outbox.LeftoversWritten
		effects := p.table.WriteLeftovers(batch, &written)
		if pass == 1 {
			effects = p.table.WriteLeftoversAnywhere(batch, &written)
		}
		p.must(p.store.Guarded(t.Context(), effects))
		if want := []int{0, 3}[pass]; written.Done != want || len(written.Astray) != 3-want || len(batch) != 3 || !last {
			t.Errorf("pass %d writes %d of %d leftovers, %d are astray", pass, written.Done, len(batch), len(written.Astray))
		}
	}
	p.requireStatus(astray[0], "published published_at 0")
	p.requireStatus(astray[1], "failed failed_at 1 {bad}")
	p.requireStatus(astray[2], "pending 0")

	if n := get[int](p.bundle, `select `+migrations.RetryFunction("events")+`(variadic $1::text[])`, append(astray, ids[4])); n != 1 {
		t.Errorf("%d rows are retried, want the one that failed", n)
	}
	without, err := p.table.WithoutRow(t.Context(), p.relay, append([]string{"absent"}, astray...))
	p.must(err)
	if len(without) != 1 || without[0] != "absent" {
		t.Errorf("rows %q are taken to be absent", without)
	}
}

// One statement looks up ids of about the same time only, so that each is looked for in
// few partitions.
func TestNear(t *testing.T) {
	t.Parallel()
	const monday, tuesday, friday = "event_01ARYZ6S41TSV4RRFFQ69G5FAV", "01ARZXM8N1TSV4RRFFQ69G5FAV", "0155KP5TW1TSV4RRFFQ69G5FAV"
	const uuid7, uuid4 = "0155ce51-3c1d-7cc3-98c4-dc0c0c07398f", "0155ce51-3c1d-4cc3-98c4-dc0c0c07398f"
	for _, c := range []struct {
		ids  []string
		want int
	}{
		{nil, 0},
		{[]string{monday}, 1},
		{[]string{monday, tuesday, friday}, 2},
		{[]string{friday, monday}, 1},
		{[]string{"1", "2", uuid4}, 3},
		{[]string{"1", monday}, 1},
		{[]string{monday, "1"}, 1},
		{[]string{uuid7, uuid7, uuid4}, 2},
	} {
		if got := (outbox.Table{ByTime: true}).Near(c.ids); got != c.want {
			t.Errorf("%q: %d near, want %d", c.ids, got, c.want)
		}
		if got := (outbox.Table{}).Near(c.ids); got != len(c.ids) {
			t.Errorf("%q: %d near in a table without partitions", c.ids, got)
		}
	}
}

// Rows are read until they have so many bytes, also those that are looked for in all
// partitions; what is left out is read by the next call, and no row twice.
func TestFirstRowsOfAnyPartition(t *testing.T) {
	t.Parallel()
	few := layouts[1]
	few.after = `alter table events disable trigger user;
		create table events_2020 partition of events for values from ('2019-12-01') to ('2020-02-01');
		create table events_since partition of events for values from ('2022-01-01') to (maxvalue)`
	p := planned(t, few)
	const size = 10_000
	p.exec(`insert into events (id, aggregate_type, event_type, payload, status, created_at)
		select 'event_' || ulid(case when i % 3 = 0 then now() else '2020-01-01' end), 'order', 'created', to_jsonb(repeat('x', $1)), 'pending', now() from generate_series(1, 60) i`, size)
	ids := append(get[[]string](p.bundle, `select array_agg(id order by created_at, id) from events`), "event_01DXF6DT00TSV4RRFFQ69G5FAV", "absent")
	layout, err := p.table.Inspect(t.Context(), p.relay)
	p.must(err)
	read := 0
	for left := ids; len(left) > 0; {
		rows, n, err := p.table.FirstRows(t.Context(), p.relay, layout, left, 5*size)
		p.must(err)
		if n == 0 {
			t.Fatal("no row is read")
		}
		if len(rows) > 13 { // so many bytes of either kind, and a row more
			t.Errorf("%d rows are held at once", len(rows))
		}
		for _, id := range left[:n] {
			if rows[id] != nil {
				read++
			}
		}
		left = left[n:]
	}
	if read != len(ids)-2 {
		t.Errorf("%d rows are read, want %d", read, len(ids)-2)
	}
}
