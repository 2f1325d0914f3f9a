package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
)

// triggerWith is the migrated one with another id.
func triggerWith(id string) string {
	return `create or replace function on_events_create() returns trigger as $$
		begin
			new.id = ` + id + `;
			new.version = 0;
			new.status = 'pending';
			new.published_at = null;
			new.failed_at = null;
			new.failed_reasons = null;
			new.failed_attempts = 0;
			new.retried_at = null;
			new.retried_attempts = 0;
			new.created_at = now();
			return new;
		end;
		$$ language plpgsql;`
}

// ulidBySubstr is what is mostly found for plpgsql: character by character.
const ulidBySubstr = `create or replace function gen_random_ulid() returns text as $$
	declare
		digits constant text := '0123456789ABCDEFGHJKMNPQRSTVWXYZ';
		ms bigint := floor(extract(epoch from clock_timestamp()) * 1000);
		random bytea := uuid_send(gen_random_uuid());
		ulid text := '';
	begin
		for i in 1..10 loop
			ulid := substr(digits, (ms % 32)::int + 1, 1) || ulid;
			ms := ms / 32;
		end loop;
		for i in 0..15 loop
			ulid := ulid || substr(digits, get_byte(random, i) % 32 + 1, 1);
		end loop;
		return ulid;
	end;
	$$ language plpgsql volatile;`

// ulidInSQL has the time of its statement and no trouble to be ever greater.
const ulidInSQL = `create or replace function gen_random_ulid() returns text as $$
	select string_agg(substr('0123456789ABCDEFGHJKMNPQRSTVWXYZ', (case when i < 10
			then (v.ms >> (5 * (9 - i))) & 31 else get_byte(v.random, i - 10) % 32 end)::int + 1, 1), '' order by i)
	from (select floor(extract(epoch from clock_timestamp()) * 1000)::bigint as ms, uuid_send(gen_random_uuid()) as random) as v,
		generate_series(0, 25) as i
	$$ language sql volatile;`

// insertion is a way that the table could be.
type insertion struct {
	name    string
	prepare string
	since   int // Postgres version
	into    string
	values  string // in front of the event's own
}

var insertions = []insertion{
	{name: "as migrated"},
	{name: "id of gen_random_uuid()", prepare: triggerWith(`'event_' || gen_random_uuid()`)},
	{name: "id of uuidv7()", prepare: triggerWith(`'event_' || uuidv7()`), since: 18},
	{name: "ULID by substr in a loop", prepare: ulidBySubstr},
	{name: "ULID in SQL", prepare: ulidInSQL},
	{name: "no trigger, id of gen_random_uuid()", prepare: `drop trigger on_events_create on events`,
		into: `id, version, status, created_at, `, values: `'event_' || gen_random_uuid(), 0, 'pending', now(), `},
	{name: "no trigger, id of gen_random_ulid()", prepare: `drop trigger on_events_create on events`,
		into: `id, version, status, created_at, `, values: `'event_' || gen_random_ulid(), 0, 'pending', now(), `},
	{name: "without the unique (id, version)", prepare: `alter table events drop constraint events_id_version_unique`},
	{name: "without its checks", prepare: `alter table events drop constraint events_id_check, drop constraint events_version_check,
		drop constraint events_aggregate_type_check, drop constraint events_event_type_check, drop constraint events_status_check`},
	{name: "fillfactor 100", prepare: `alter table events set (fillfactor = 100)`},
}

type insertCosts struct{ many, ratio, wal, single, singleRatio spread }

// insert measures what an insert is made of.
func insert(ctx context.Context, args []string, out io.Writer) error {
	flags := flags("insert")
	rows := flags.Int("rows", 30_000, "rows inserted a variant and round, 1000 a statement")
	singles := flags.Int("singles", 3000, "rows inserted a variant and round, one a transaction")
	rounds := flags.Int("rounds", 5, "how often each variant is measured")
	s, err := begin(ctx, flags, args, map[string]string{"autovacuum": "off"}, out)
	if err != nil {
		return err
	}
	defer s.Close()
	all := make([]insertCosts, len(insertions))
	for round := range *rounds {
		if err := s.insertRound(ctx, round, *rows, *singles, all); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "%d rounds; median (least-greatest)\n\n", *rounds)
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "variant\t1000 a statement, CPU us a row\tof the first line's\tWAL B a row\t1 a transaction, CPU us\tof the first line's")
	for i, v := range insertions {
		if c := all[i]; c.many != nil {
			fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\n", v.name, c.many, c.ratio, c.wal, c.single, c.singleRatio)
		}
	}
	return table.Flush()
}

// insertRound measures each variant once, in an order that moves on each round.
func (s *server) insertRound(ctx context.Context, round, rows, singles int, all []insertCosts) error {
	many, single := make([]meter, len(insertions)), make([]meter, len(insertions))
	for i := range insertions {
		i = (i + round) % len(insertions)
		v := insertions[i]
		if v.since > s.Version() {
			continue
		}
		var err error
		if many[i], single[i], err = s.insertVariant(ctx, v, rows, singles); err != nil {
			return fmt.Errorf("%s: %w", v.name, err)
		}
	}
	for i := range insertions {
		if many[i].cpu == 0 {
			continue
		}
		c := &all[i]
		c.many = append(c.many, float64(many[i].cpu.Nanoseconds())/1e3/float64(rows))
		c.ratio = append(c.ratio, many[i].cpu.Seconds()/many[0].cpu.Seconds())
		c.wal = append(c.wal, float64(many[i].wal)/float64(rows))
		c.single = append(c.single, float64(single[i].cpu.Nanoseconds())/1e3/float64(singles))
		c.singleRatio = append(c.singleRatio, single[i].cpu.Seconds()/single[0].cpu.Seconds())
	}
	return nil
}

func (s *server) insertVariant(ctx context.Context, v insertion, rows, singles int) (many, single meter, err error) {
	d, err := s.migrated(ctx, v.prepare)
	if err != nil {
		return many, single, err
	}
	defer func() { err = errors.Join(err, s.drop(ctx, d)) }()
	application, err := d.connect(ctx)
	if err != nil {
		return many, single, err
	}
	statement := `insert into events (` + v.into + `aggregate_type, aggregate_id, event_type, payload)
		select ` + v.values + `'order', 'order-' || i, 'created', jsonb_build_object('line', i, 'text', repeat('x', 160)) from generate_series(1, $1) i`
	add := func(statements, each int) func() error {
		return func() error {
			for range statements {
				if _, err := application.Exec(ctx, statement, each); err != nil {
					return err
				}
			}
			return nil
		}
	}
	// What comes first fills caches and makes plans. Behind a checkpoint, pages that
	// are changed for the first time are logged whole: hence after it.
	if _, err := d.sql.Exec(ctx, `checkpoint`); err != nil {
		return many, single, err
	}
	if err := add(20, 10)(); err != nil {
		return many, single, err
	}
	many, single = meter{conn: application, sql: d.sql}, meter{conn: application, sql: d.sql}
	if err := many.measure(ctx, add(rows/1000, 1000)); err != nil {
		return many, single, err
	}
	return many, single, single.measure(ctx, add(singles, 1))
}
