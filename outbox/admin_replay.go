package outbox

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/lsn"
)

// Selection chooses rows that are to be published again. What is empty chooses
// all; a failed row is never chosen, since it is for a retry.
type Selection struct {
	From, To      time.Time // created_at is in [From, To)
	AggregateType string
	EventType     string
	IDs           []string
	After         string // only ids behind it
}

// where is a condition on table e.
func (s Selection) where(t Table) (condition string, args pgx.NamedArgs) {
	parts := []string{"e.status <> 'failed'"}
	args = pgx.NamedArgs{}
	add := func(part, name string, value any) {
		parts = append(parts, part)
		args[name] = value
	}
	if !s.From.IsZero() {
		add("e."+t.column("created_at")+" >= @from", "from", s.From.UTC())
	}
	if !s.To.IsZero() {
		add("e."+t.column("created_at")+" < @to", "to", s.To.UTC())
	}
	if s.AggregateType != "" {
		add("e."+t.column("aggregate_type")+"::text = @aggregate_type", "aggregate_type", s.AggregateType)
	}
	if s.EventType != "" {
		add("e."+t.column("event_type")+"::text = @event_type", "event_type", s.EventType)
	}
	if len(s.IDs) > 0 {
		add(t.id("e")+" = any (@ids)", "ids", s.IDs)
	}
	if s.After != "" {
		add(t.order()+" > "+t.ordered("@after"), "after", s.After)
	}
	return strings.Join(parts, " and "), args
}

// Kind is how many of the chosen rows have one aggregate and event type.
type Kind struct {
	AggregateType, EventType string
	Rows                     int64
}

// Chosen counts the chosen rows by their types.
func (t Table) Chosen(ctx context.Context, conn *pgx.Conn, s Selection) ([]Kind, error) {
	where, args := s.where(t)
	kinds, err := shown(func(text func(string) string) ([]Kind, error) {
		rows, err := conn.Query(ctx, `select `+text(`e.`+t.column("aggregate_type")+`::text`)+`, `+text(`e.`+t.column("event_type")+`::text`)+`, count(*)
			from `+t.String()+` e where `+where+` group by 1, 2 order by 1, 2`, args)
		if err != nil {
			return nil, err
		}
		return pgx.CollectRows(rows, pgx.RowToStructByPos[Kind])
	})
	if err != nil {
		return nil, fmt.Errorf("count rows of %s: %w", t, err)
	}
	return kinds, nil
}

// Bounds returns the first and the last id of the selection; none where it is empty.
func (t Table) Bounds(ctx context.Context, conn *pgx.Conn, s Selection) (first, last string, err error) {
	where, args := s.where(t)
	bound := func(direction string) string {
		return `coalesce((select ` + t.id("e") + ` from ` + t.String() + ` e where ` + where + ` order by ` + t.order() + direction + ` limit 1), '')`
	}
	if err := conn.QueryRow(ctx, `select `+bound("")+`, `+bound(" desc"), args).Scan(&first, &last); err != nil {
		return "", "", fmt.Errorf("read ids of %s: %w", t, err)
	}
	return first, last, nil
}

// NextChosen reads the ids of the next rows of the selection, in their order.
func (t Table) NextChosen(ctx context.Context, conn *pgx.Conn, s Selection, limit int) ([]string, error) {
	where, args := s.where(t)
	args["limit"] = limit
	rows, err := conn.Query(ctx, `select `+t.id("e")+` from `+t.String()+` e where `+where+` order by `+t.order()+` limit @limit`, args)
	if err != nil {
		return nil, fmt.Errorf("read ids of %s: %w", t, err)
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("read ids of %s: %w", t, err)
	}
	return ids, nil
}

// Asked is a request that is in WAL.
type Asked struct {
	Rows  int
	Last  string        // id of the last row
	Start pglogrepl.LSN // of the message
	End   pglogrepl.LSN // at or behind the end of its transaction
}

// AskReplay asks the relay, in a transaction of its own, to publish these rows
// once more under the run's name: at most 1000, in this order.
func (t Table) AskReplay(ctx context.Context, conn *pgx.Conn, run string, ids []string) (Asked, error) {
	asked := Asked{Rows: len(ids), Last: ids[len(ids)-1]}
	content, err := json.Marshal(map[string]any{"replay": run, "ids": ids})
	if err != nil {
		return asked, fmt.Errorf("ask for a replay: %w", err)
	}
	var start, end string
	err = conn.QueryRow(ctx, `select `+t.function("outbox_relay_ask")+`(pg_catalog.to_regclass($1), $2)::text`, t.String(), string(content)).Scan(&start)
	if err == nil {
		err = conn.QueryRow(ctx, `select pg_catalog.pg_current_wal_insert_lsn()::text`).Scan(&end)
	}
	if err == nil {
		asked.Start, err = lsn.Parse(start)
	}
	if err == nil {
		asked.End, err = lsn.Parse(end)
	}
	if err != nil {
		return asked, fmt.Errorf("ask for a replay: %w", err)
	}
	return asked, nil
}

// Passed reports whether the relay is done with a request of this run: its batch
// is, or all that was committed before its end. A batch is begun when all before
// it is done.
func (p Progress) Passed(run string, asked Asked) (bool, error) {
	var positions []string
	if p.Slot != nil {
		positions = append(positions, p.Slot.ConfirmedLSN)
	}
	if p.Checkpoint != nil {
		positions = append(positions, p.Checkpoint.CommitLSN, p.Checkpoint.ConfirmedLSN)
	}
	for _, text := range positions {
		if at, err := lsn.Parse(text); err != nil || at >= asked.End {
			return err == nil, err
		}
	}
	if p.Batch == nil {
		return false, nil
	}
	at, err := lsn.Parse(p.Batch.CommitLSN)
	ours := p.Batch.Run == run && p.Batch.Done == p.Batch.Rows && at >= asked.Start
	return err == nil && (ours || at >= asked.End), err
}

// MovedSince reports whether the relay has recorded anything since.
func (p Progress) MovedSince(q Progress) bool {
	return !same(p.Checkpoint, q.Checkpoint) || !same(p.Batch, q.Batch)
}

func same[T comparable](a, b *T) bool { return a == b || a != nil && b != nil && *a == *b }
