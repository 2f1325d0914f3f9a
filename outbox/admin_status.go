package outbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// SlotState is what Postgres says of a relay's slot, for people.
type SlotState struct {
	Plugin       string
	Active       bool
	PID          int    // of the walsender that has it; 0: none
	WALStatus    string // reserved, extended, unreserved or lost
	Invalidation string // why it is lost; empty: it is not, or the server does not say
	SafeWALSize  *int64 // bytes that can be written before it is in danger; nil: without limit
	RestartLSN   string
	ConfirmedLSN string
	Lag          int64 // bytes of WAL behind ConfirmedLSN
	Held         int64 // bytes of WAL kept for it, from RestartLSN on
}

// CheckpointState is a relay's checkpoint, for people: of whatever format.
type CheckpointState struct {
	Format           int
	Phase            string
	CommitLSN        string
	Ordinal          int64
	ConfirmedLSN     string
	Stream           string
	Sequence         int64
	Foreign          bool
	Backfilled       int64
	SystemIdentifier string
	UpdatedAt        time.Time
}

// BatchState is the rows that a relay publishes from the table at present, or
// published last.
type BatchState struct {
	Kind       string
	Run        string // of a replay
	Rows       int
	Done       int // how many of them are recorded
	CommitLSN  string
	RecordedAt time.Time
}

// Progress is how far a relay has come; what is nil is not there.
type Progress struct {
	At         time.Time // Postgres's clock
	Slot       *SlotState
	Checkpoint *CheckpointState
	Batch      *BatchState
	Waiting    int    // outcomes to be written later: the application holds the row locked, or Postgres refuses to change it
	Refused    int    // those of them that Postgres has refused to write
	Refusal    string // why, of one of these
	Kept       int    // rejected events whose row is gone
}

// maxLeftovers bounds what is counted of the leftovers.
const maxLeftovers = 10_000

// Progress reads how far the relay of the table's slot has come.
func (t Table) Progress(ctx context.Context, conn *pgx.Conn) (Progress, error) {
	p := Progress{Slot: &SlotState{}, Checkpoint: &CheckpointState{}, Batch: &BatchState{}}
	err := conn.QueryRow(ctx, `select now(),
		(select count(*) from (select from `+t.leftovers()+` where slot = $1 and waiting limit $2) l),
		(select count(*) from (select from `+t.leftovers()+` where slot = $1 and waiting and refused is not null limit $2) l),
		coalesce((select id || ': ' || refused from `+t.leftovers()+` where slot = $1 and waiting and refused is not null limit 1), ''),
		(select count(*) from (select from `+t.leftovers()+` where slot = $1 and not waiting limit $2) l)`, t.Slot, maxLeftovers).
		Scan(&p.At, &p.Waiting, &p.Refused, &p.Refusal, &p.Kept)
	if err != nil {
		return p, fmt.Errorf("count the leftovers of slot %s: %w", t.Slot, err)
	}
	if err := optional(t.readSlot(ctx, conn, p.Slot), &p.Slot); err != nil {
		return p, fmt.Errorf("read slot %s: %w", t.Slot, err)
	}
	if err := optional(t.readCheckpoint(ctx, conn, p.Checkpoint), &p.Checkpoint); err != nil {
		return p, fmt.Errorf("read checkpoint of slot %s: %w", t.Slot, err)
	}
	if err := optional(t.readBatch(ctx, conn, p.Batch), &p.Batch); err != nil {
		return p, fmt.Errorf("read the batch beside the checkpoint of slot %s: %w", t.Slot, err)
	}
	return p, nil
}

// optional makes what has no row nil.
func optional[T any](err error, of **T) error {
	if errors.Is(err, pgx.ErrNoRows) {
		*of = nil
		return nil
	}
	return err
}

func (t Table) readSlot(ctx context.Context, conn *pgx.Conn, s *SlotState) error {
	return conn.QueryRow(ctx, `select coalesce(plugin, ''), active, coalesce(active_pid, 0), coalesce(wal_status, ''), coalesce(pg_catalog.to_jsonb(r) ->> 'invalidation_reason', ''), safe_wal_size,
			coalesce(restart_lsn, '0/0')::text, coalesce(confirmed_flush_lsn, '0/0')::text,
			coalesce(pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), confirmed_flush_lsn), 0)::bigint,
			coalesce(pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), restart_lsn), 0)::bigint
		from pg_catalog.pg_replication_slots r where slot_name = $1`, t.Slot).
		Scan(&s.Plugin, &s.Active, &s.PID, &s.WALStatus, &s.Invalidation, &s.SafeWALSize, &s.RestartLSN, &s.ConfirmedLSN, &s.Lag, &s.Held)
}

func (t Table) readCheckpoint(ctx context.Context, conn *pgx.Conn, c *CheckpointState) error {
	return conn.QueryRow(ctx, `select format, phase, commit_lsn::text, ordinal, confirmed_lsn::text, stream, stream_sequence,
			foreign_seen, backfilled, system_identifier, updated_at
		from `+t.own("outbox_relay_checkpoints")+` where slot = $1`, t.Slot).
		Scan(&c.Format, &c.Phase, &c.CommitLSN, &c.Ordinal, &c.ConfirmedLSN, &c.Stream, &c.Sequence,
			&c.Foreign, &c.Backfilled, &c.SystemIdentifier, &c.UpdatedAt)
}

func (t Table) readBatch(ctx context.Context, conn *pgx.Conn, b *BatchState) error {
	return conn.QueryRow(ctx, `select kind, coalesce(run, ''), cardinality(ids), done, commit_lsn::text, recorded_at
		from `+t.own("outbox_relay_batches")+` where slot = $1`, t.Slot).
		Scan(&b.Kind, &b.Run, &b.Rows, &b.Done, &b.CommitLSN, &b.RecordedAt)
}

// What a census reads at most: the rows with the newest ids, pages for those
// before them, and rows that have failed once.
const (
	CensusNewest = 10_000
	CensusPages  = 1_000
	CensusFailed = 10_000
)

// CensusSettings are the settings of a session that counts rows and must not be a
// burden: no plan reads the whole table, and none takes long.
func CensusSettings() map[string]string {
	return map[string]string{"enable_seqscan": "off", "enable_bitmapscan": "off", "jit": "off",
		"max_parallel_workers_per_gather": "0", "statement_timeout": "10s"}
}

// Census is how many rows have which status. No index can tell: one that names
// status would end HOT updates of the rows that are marked. So it counts the
// newest rows by their ids, among which are those that wait while all is well,
// and samples the others: one page of every Step pages, evenly over the whole
// table. A stretch of rows with one status, such as an outage leaves, is then met
// with an error of about one step. What it reads does not grow with the table.
type Census struct {
	Pending, Published int64
	Exact              bool       // the table was read whole; else Pending and Published are estimates
	Newest             int64      // rows that were counted one by one
	NewestPending      int64      // those of them that are pending
	Step               int64      // of so many pages, one was read for the rows before them; 0: none was
	OldestPending      *time.Time // created_at of the oldest pending row that was seen
}

// Census counts the rows.
func (t Table) Census(ctx context.Context, conn *pgx.Conn) (Census, error) {
	var c Census
	var older, olderPublished int64
	err := conn.QueryRow(ctx, `with newest as materialized (
			select `+t.order()+` as id, status, `+t.column("created_at")+` as created_at from `+t.String()+` e
			order by `+t.order()+` desc limit $2
		), counted as materialized (
			select count(*) as rows, (select id from newest order by id limit 1) as edge,
				count(*) filter (where status = 'pending') as pending,
				count(*) filter (where status = 'published') as published,
				min(created_at) filter (where status = 'pending') as oldest
			from newest
		), size as (
			select coalesce(sum(pages), 0) as pages, coalesce(max(pages), 0)::bigint as longest
			from (select pg_catalog.to_regclass($1) as leaf -- a partitioned one has no pages
					union select relid from pg_catalog.pg_partition_tree(pg_catalog.to_regclass($1))) as tree,
				lateral (select pg_catalog.pg_relation_size(leaf) / pg_catalog.current_setting('block_size')::bigint) as s(pages)
		), every as materialized (
			select greatest(1, ceil(pages / $3::bigint))::bigint as step, longest, random() as start from size
			where (select rows from counted) = $2
		), older as (
			select sum(sample.pending) as pending, sum(sample.published) as published, min(sample.oldest) as oldest
			from every, counted,
				generate_series(floor(start * step)::bigint, longest - 1, step) as page,
				lateral (select
						count(*) filter (where status = 'pending' and `+t.order()+` < edge) as pending,
						count(*) filter (where status = 'published' and `+t.order()+` < edge) as published,
						min(`+t.column("created_at")+`) filter (where status = 'pending' and `+t.order()+` < edge) as oldest
					from `+t.String()+` e
					where ctid >= format('(%s,0)', page)::tid and ctid < format('(%s,0)', page + 1)::tid) as sample
		)
		select c.rows, c.pending, c.published, coalesce((select step from every), 0),
			coalesce(o.pending, 0)::bigint, coalesce(o.published, 0)::bigint, least(c.oldest, o.oldest)
		from counted as c, older as o`, t.String(), CensusNewest, CensusPages).
		Scan(&c.Newest, &c.NewestPending, &c.Published, &c.Step, &older, &olderPublished, &c.OldestPending)
	if err != nil {
		return c, fmt.Errorf("count the rows of %s: %w", t, err)
	}
	c.Pending = c.NewestPending + older*c.Step
	c.Published += olderPublished * c.Step
	c.Exact = c.Step <= 1
	return c, nil
}

// FailedRow is a row that has failed, for people.
type FailedRow struct {
	ID            string    `json:"id"`
	AggregateType string    `json:"aggregate_type"`
	EventType     string    `json:"event_type"`
	FailedAt      time.Time `json:"failed_at"`
	Reason        string    `json:"reason"` // the last one
	Attempts      int       `json:"failed_attempts"`
}

// Failures counts the rows that have failed, by the index on failed_at, and lists
// the newest of them. Rows that failed once and were retried since stand in the
// index, too: where there are very many, exact is false and failed a lower bound.
func (t Table) Failures(ctx context.Context, conn *pgx.Conn, list int) (failed int64, exact bool, newest []FailedRow, err error) {
	recent := ` from (select ` + t.id("e") + ` as id, ` + t.column("aggregate_type") + `::text as aggregate_type, ` + t.column("event_type") + `::text as event_type,
			failed_at, failed_reasons, failed_attempts, status from ` + t.String() + ` e
		where failed_at is not null order by failed_at desc limit $1) as recent`
	var seen int
	err = conn.QueryRow(ctx, `select count(*) filter (where status = 'failed'), count(*)`+recent, CensusFailed).Scan(&failed, &seen)
	if err != nil {
		return 0, false, nil, fmt.Errorf("count the failed rows of %s: %w", t, err)
	}
	newest, err = shown(func(text func(string) string) ([]FailedRow, error) {
		rows, err := conn.Query(ctx, `select `+text("id")+`, `+text("aggregate_type")+`, `+text("event_type")+`, failed_at,
				`+text("coalesce(failed_reasons[cardinality(failed_reasons)], '')")+`, failed_attempts`+recent+`
			where status = 'failed' order by failed_at desc limit $2`, CensusFailed, list)
		if err != nil {
			return nil, err
		}
		return pgx.CollectRows(rows, pgx.RowToStructByPos[FailedRow])
	})
	if err != nil {
		return 0, false, nil, fmt.Errorf("list the failed rows of %s: %w", t, err)
	}
	return failed, seen < CensusFailed, newest, nil
}
