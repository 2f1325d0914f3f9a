package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// backlog is what is written to be read: transactions of so many events each, of a
// thousand aggregates, to the tables in turn.
type backlog struct {
	transactions, events int
	tables               []string
	marked               bool // each row, behind its transaction, as the relay does it
	text                 int  // characters in a payload; 0: usualText
}

// usualText makes a payload of 200 bytes.
const usualText = 160

// outboxOnly is the usual table.
var outboxOnly = []string{"events"}

func (d *database) writeBacklog(ctx context.Context, b backlog) error {
	_, err := d.sql.Exec(ctx, `set synchronous_commit = off;
		create or replace procedure write_backlog(transactions int, events int, tables text[], marked bool, text int) language plpgsql as $$
		declare
			target text;
		begin
			for t in 1..transactions loop
				target := tables[1 + t % array_length(tables, 1)];
				execute format('insert into %I (aggregate_type, aggregate_id, event_type, payload)
					select ''order'', ''order-'' || ($1 * $2 + i) %% 1000, ''created'',
						jsonb_build_object(''line'', i, ''text'', repeat(''x'', $3)) from generate_series(1, $2) i', target) using t, events, text;
				commit;
				if marked then
					execute format('update %I set status = ''published'', published_at = now() where status = ''pending''', target);
					commit;
				end if;
			end loop;
		end $$`)
	if err != nil {
		return err
	}
	if _, err := d.sql.Exec(ctx, `call write_backlog($1, $2, $3, $4, $5)`, b.transactions, b.events, b.tables, b.marked, cmp.Or(b.text, usualText)); err != nil {
		return err
	}
	_, err = d.sql.Exec(ctx, `checkpoint`)
	return err
}

// piledUp is a new database with so many slots and the backlog behind them; prepare is
// SQL to run before.
func (s *server) piledUp(ctx context.Context, prepare string, slots int, b backlog) (*database, error) {
	d, err := s.migrated(ctx, prepare)
	if err != nil {
		return nil, err
	}
	for i := range slots {
		if err := d.createSlot(ctx, d.slot(i)); err != nil {
			return nil, errors.Join(err, s.drop(ctx, d))
		}
	}
	if err := d.writeBacklog(ctx, b); err != nil {
		return nil, errors.Join(err, s.drop(ctx, d))
	}
	return d, nil
}

// slot is unique in the cluster.
func (d *database) slot(number int) string {
	return fmt.Sprintf("%s_%d", d.sql.Config().Database, number)
}

func (d *database) createSlot(ctx context.Context, name string) error {
	_, err := d.sql.Exec(ctx, `select pg_create_logical_replication_slot($1, 'pgoutput')`, name)
	return err
}

// drop removes the database and its slots, which free themselves a little after
// their readers have ended.
func (s *server) drop(ctx context.Context, d *database) error {
	ctx = context.WithoutCancel(ctx)
	for left := 1; left > 0; time.Sleep(5 * time.Millisecond) {
		_, err := d.sql.Exec(ctx, `select pg_drop_replication_slot(slot_name) from pg_replication_slots
			where database = current_database() and not active`)
		if err == nil {
			left, err = value[int](ctx, d.sql, `select count(*) from pg_replication_slots where database = current_database()`)
		}
		if err != nil {
			return err
		}
	}
	name := d.sql.Config().Database
	d.close(ctx)
	admin, err := pgx.Connect(ctx, s.URL("postgres"))
	if err != nil {
		return err
	}
	_, err = admin.Exec(ctx, `drop database `+name+` with (force)`)
	return errors.Join(err, admin.Close(ctx))
}
