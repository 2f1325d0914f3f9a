package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/checkpoint"
	"outbox-relay/outbox"
	"outbox-relay/outbox/event"
)

// variant is a way to record, and what the table is like.
type variant struct {
	name    string
	mode    outbox.Mode
	prepare string
}

var variants = []variant{
	{"mark, as migrated", outbox.Mark, ``},
	{"mark, without the index on failed_at", outbox.Mark, `drop index events_failed_at_index`},
	{"mark, fillfactor 100", outbox.Mark, `alter table events set (fillfactor = 100)`},
	{"mark, an index on status", outbox.Mark, `create index on events (status)`},
	{"delete", outbox.Delete, ``},
	{"keep", outbox.Keep, ``},
}

// costs are those of one run of a variant, a row.
type costs struct {
	insertCPU, insertWAL spread // microseconds and bytes
	recordCPU, recordWAL spread
	hot                  spread // percent of updates
	size                 spread // bytes of the table and its indexes
}

// recording measures every variant once a round.
func recording(ctx context.Context, args []string, out io.Writer) error {
	flags := flags("recording")
	rows := flags.Int("rows", 50_000, "rows a variant and round")
	batch := flags.Int("batch", 1000, "rows inserted, then recorded, in one statement")
	rounds := flags.Int("rounds", 5, "how often each variant is measured")
	s, err := begin(ctx, flags, args, map[string]string{"autovacuum": "off"}, out)
	if err != nil {
		return err
	}
	defer s.Close()
	all := make([]costs, len(variants))
	for range *rounds {
		for i, v := range variants {
			if err := s.record(ctx, v, *rows / *batch, *batch, &all[i]); err != nil {
				return fmt.Errorf("%s: %w", v.name, err)
			}
		}
	}
	fmt.Fprintf(out, "%d rounds, %d rows each, %d a statement; median (least-greatest) a row\n\n", *rounds, *rows, *batch)
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "variant\trecord, CPU us\trecord, WAL B\tHOT %\tinsert, CPU us\tinsert, WAL B\ttable and indexes, B")
	for i, v := range variants {
		c := all[i]
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", v.name, c.recordCPU, c.recordWAL, c.hot, c.insertCPU, c.insertWAL, c.size)
	}
	return table.Flush()
}

// record inserts and records so many batches in turn, in a new database, and adds
// what it cost.
func (s *server) record(ctx context.Context, v variant, batches, batch int, c *costs) error {
	d, err := s.migrated(ctx, v.prepare)
	if err != nil {
		return err
	}
	defer d.close(ctx)
	application, err := d.connect(ctx)
	if err != nil {
		return err
	}
	relay, err := d.connect(ctx)
	if err != nil {
		return err
	}
	if err := planned(ctx, relay); err != nil {
		return err
	}
	table := outbox.Table{Schema: "public", Name: "events", Slot: "costs", Mode: v.mode}
	store := checkpoint.NewStore(relay, "public", "costs")
	if err := store.Create(ctx, checkpoint.Checkpoint{SystemID: "1", Timeline: 1, Stream: "EVENTS"}); err != nil {
		return err
	}
	if _, err := store.Claim(ctx); err != nil {
		return err
	}
	// What is changed for the first time after it is logged as a whole page: from
	// here on that is not so.
	if _, err := d.sql.Exec(ctx, `checkpoint`); err != nil {
		return err
	}
	insert, record := meter{conn: application, sql: d.sql}, meter{conn: relay, sql: d.sql}
	for i := range batches {
		var ids []string
		err := insert.measure(ctx, func() (err error) {
			ids, err = insertEvents(ctx, application, batch)
			return err
		})
		if err != nil {
			return err
		}
		if err := record.measure(ctx, func() error { return recordEvents(ctx, store, table, i, ids) }); err != nil {
			return err
		}
	}
	return c.add(ctx, d.sql, relay, insert, record, float64(batches*batch))
}

func insertEvents(ctx context.Context, conn *pgx.Conn, n int) ([]string, error) {
	rows, err := conn.Query(ctx, `insert into events (aggregate_type, aggregate_id, event_type, payload)
		select 'order', 'order-' || i, 'created', jsonb_build_object('line', i, 'text', repeat('x', 160)) from generate_series(1, $1) i returning id`, n)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// recordEvents is the relay's own statement.
func recordEvents(ctx context.Context, store *checkpoint.Store, table outbox.Table, batch int, ids []string) error {
	items := make([]checkpoint.Item, len(ids))
	for i, id := range ids {
		items[i] = checkpoint.Item{ID: []byte(id), Outcome: checkpoint.Stored}
	}
	var recorded outbox.Recorded
	effects, err := table.Outcomes(items, &recorded)
	if err != nil {
		return err
	}
	position := event.Position{Commit: 1, Ordinal: uint64((batch + 1) * len(ids))}
	if err := store.Advance(ctx, checkpoint.Advance{Position: position, Sequence: position.Ordinal}, effects); err != nil {
		return err
	}
	if table.Mode != outbox.Keep && recorded.Published != len(ids) {
		return fmt.Errorf("%d of %d rows are recorded", recorded.Published, len(ids))
	}
	return nil
}

func (c *costs) add(ctx context.Context, sql, relay *pgx.Conn, insert, record meter, rows float64) error {
	if _, err := relay.Exec(ctx, `select pg_stat_force_next_flush()`); err != nil {
		return err
	}
	if _, err := relay.Exec(ctx, `select 1`); err != nil { // figures are flushed behind a transaction
		return err
	}
	hot, err := value[float64](ctx, sql, `select coalesce(100.0 * n_tup_hot_upd / nullif(n_tup_upd, 0), 0)::float8
		from pg_stat_user_tables where relid = 'events'::regclass`)
	if err != nil {
		return err
	}
	size, err := value[float64](ctx, sql, `select pg_total_relation_size('events')::float8`)
	if err != nil {
		return err
	}
	perRow := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 / rows }
	c.insertCPU, c.insertWAL = append(c.insertCPU, perRow(insert.cpu)), append(c.insertWAL, float64(insert.wal)/rows)
	c.recordCPU, c.recordWAL = append(c.recordCPU, perRow(record.cpu)), append(c.recordWAL, float64(record.wal)/rows)
	c.hot, c.size = append(c.hot, hot), append(c.size, size/rows)
	return nil
}
