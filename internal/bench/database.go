package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

const publication = "outbox_relay"

// database is an outbox of its own: no reading finds what an earlier one has left.
type database struct {
	servers *servers
	name    string
	url     string
	sql     *pgx.Conn
}

// newDatabase makes a copy of the migrated template.
func (s *servers) newDatabase(ctx context.Context) (*database, error) {
	return s.copyDatabase(ctx, template)
}

// copyDatabase makes a copy of the template: of its files, since a large one's pages
// would be WAL that walsenders read.
func (s *servers) copyDatabase(ctx context.Context, template string) (*database, error) {
	s.databases++
	d := &database{servers: s, name: fmt.Sprintf("bench_%d", s.databases)}
	d.url = s.postgres.URL(d.name)
	if _, err := s.sql.Exec(ctx, fmt.Sprintf(`create database %s template %s strategy file_copy`, d.name, template)); err != nil {
		return nil, err
	}
	var err error
	d.sql, err = pgx.Connect(ctx, d.url)
	return d, err
}

// seasonedTemplate is a template whose outbox has that many published rows, made
// once a run; the migrated one where it is to have none.
func (s *servers) seasonedTemplate(ctx context.Context, rows int) (name string, err error) {
	if rows == 0 {
		return template, nil
	}
	name = fmt.Sprintf("%s_%d", template, rows)
	var there bool
	err = s.sql.QueryRow(ctx, `select exists (select from pg_database where datname = $1)`, name).Scan(&there)
	if err != nil || there {
		return name, err
	}
	if _, err := s.sql.Exec(ctx, fmt.Sprintf(`create database %s template %s`, name, template)); err != nil {
		return "", err
	}
	conn, err := pgx.Connect(ctx, s.postgres.URL(name))
	if err != nil {
		return "", err
	}
	return name, errors.Join(publishHistory(ctx, conn, rows), conn.Close(ctx))
}

// publishHistory inserts rows as they are once they have been published, and has
// the statistics say so. Their ids are below those of all that come.
func publishHistory(ctx context.Context, conn *pgx.Conn, rows int) error {
	for _, sql := range []string{
		`set synchronous_commit = off`,
		`alter table events disable trigger on_events_create`,
		fmt.Sprintf(`insert into events (id, version, status, created_at, published_at, aggregate_type, aggregate_id, event_type, payload)
			select 'event_' || lpad(i::text, 26, '0'), 0, 'published', now() - interval '1 day', now() - interval '1 day', 'order', 'order-' || i / 100,
				'created', jsonb_build_object('order', i / 100, 'line', i %% 100, 'text', repeat(md5(i::text), 5)) from generate_series(1, %d) i`, rows),
		`alter table events enable trigger on_events_create`,
		`vacuum (analyze) events`,
		`checkpoint`,
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

// slot is the name of a reader's slot: names are the cluster's.
func (d *database) slot(reader string) string { return d.name + "_" + reader }

func (d *database) createSlot(ctx context.Context, reader string) error {
	_, err := d.sql.Exec(ctx, `select pg_create_logical_replication_slot($1, 'pgoutput')`, d.slot(reader))
	return err
}

// drop removes the database and its slots, which free themselves a little after
// their readers have ended.
func (d *database) drop(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	err := await(ctx, "the slots to be free", 5*time.Millisecond, func() (bool, error) {
		var left int
		if _, err := d.sql.Exec(ctx, `select pg_drop_replication_slot(slot_name) from pg_replication_slots
			where database = current_database() and not active`); err != nil {
			return false, err
		}
		err := d.sql.QueryRow(ctx, `select count(*) from pg_replication_slots where database = current_database()`).Scan(&left)
		return left == 0, err
	})
	err = errors.Join(err, d.sql.Close(ctx))
	_, dropErr := d.servers.sql.Exec(ctx, fmt.Sprintf(`drop database %s with (force)`, d.name))
	return errors.Join(err, dropErr)
}

// fill writes the backlog and returns where WAL ends behind it. The payload's text
// is of random hexadecimal digits: long ones are stored out of line, hardly
// compressed.
func (d *database) fill(ctx context.Context, w Workload) (end string, err error) {
	_, err = d.sql.Exec(ctx, `set synchronous_commit = off;
		create or replace procedure fill(transactions int, events int, bytes int) language plpgsql as $$
		declare
			pool text;
		begin
			select string_agg(md5(random()::text), '') into pool from generate_series(1, bytes / 32 + 100);
			for t in 1..transactions loop
				insert into events (aggregate_type, aggregate_id, event_type, payload)
				select 'order', 'order-' || t, 'created',
					jsonb_build_object('order', t, 'line', i, 'text', substr(pool, 1 + (t + i) % 3000, greatest(0, bytes - 40)))
				from generate_series(1, events) i;
				commit;
			end loop;
		end $$;`)
	if err != nil {
		return "", err
	}
	if _, err := d.sql.Exec(ctx, `call fill($1, $2, $3)`, w.Events/w.PerTransaction, w.PerTransaction, w.Payload); err != nil {
		return "", err
	}
	if _, err := d.sql.Exec(ctx, `checkpoint`); err != nil {
		return "", err
	}
	err = d.sql.QueryRow(ctx, `select pg_current_wal_lsn()::text`).Scan(&end)
	return end, err
}

// walsenderCPU is what the walsender of the slot has used since it was connected.
func (d *database) walsenderCPU(ctx context.Context, slot string) (time.Duration, error) {
	var pid int
	err := d.sql.QueryRow(ctx, `select active_pid from pg_replication_slots where slot_name = $1`, slot).Scan(&pid)
	if err != nil {
		return 0, err
	}
	return cpuTime(pid)
}

// pending counts the rows that have no outcome yet.
func (d *database) pending(ctx context.Context) (n int, err error) {
	err = d.sql.QueryRow(ctx, `select count(*) from events where status = 'pending'`).Scan(&n)
	return n, err
}
