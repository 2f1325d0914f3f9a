package outbox_test

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"outbox-relay/checkpoint"
	"outbox-relay/migrations"
	"outbox-relay/outbox"
	"outbox-relay/outbox/event"
)

// In an outbox of the application's own, with uuids for ids, rows are found by the
// index that migrate has made, also before anybody has analyzed the table.
func TestOwnOutboxIsFoundByIndex(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`create table own (id uuid primary key, aggregate_type text, event_type text, payload jsonb) with (autovacuum_enabled = off)`)
	config, err := pgx.ParseConfig(b.url)
	b.must(err)
	names := map[string]string{"id": "id"}
	b.must(migrations.Up(t.Context(), config, migrations.Target{Schema: "public", Table: "own", Publication: "own", Names: names}, slog.New(slog.DiscardHandler)))
	b.exec(`insert into own select gen_random_uuid(), 'order', 'placed', '1' from generate_series(1, 100000)`)
	var items []checkpoint.Item
	for i := range 100 {
		id := fmt.Append(nil, "stored ", i)
		items = append(items, checkpoint.Item{Outcome: checkpoint.Stored, ID: id},
			checkpoint.Item{Outcome: checkpoint.Parked, ID: id, Detail: &outbox.Rejected{Event: event.Event{ID: id, Payload: []byte("1")}}})
	}
	for _, mode := range []outbox.Mode{outbox.Mark, outbox.Delete} {
		table := outbox.Table{Schema: "public", Name: "own", Slot: "slot", Mode: mode, Columns: event.Columns{Names: names}}
		effects, err := table.Outcomes(items, &outbox.Recorded{})
		b.must(err)
		leftovers := table.WriteLeftovers([]outbox.Leftover{{ID: "stored 1", Outcome: "published"}}, &outbox.LeftoversWritten{})
		for name, value := range leftovers.Args {
			effects.Args[name] = value
		}
		effects.Args["slot"] = "slot"
		for _, sql := range []string{
			`with advanced as (select)` + effects.CTE + ` select 1` + effects.Result,
			`with advanced as (select)` + leftovers.CTE + ` select 1`,
		} {
			rows, err := b.sql.Query(t.Context(), `explain (costs off) `+sql, effects.Args)
			b.must(err)
			lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
			b.must(err)
			if plan := strings.Join(lines, "\n"); strings.Contains(plan, "Seq Scan on own") || !strings.Contains(plan, "own_id_text_index") {
				t.Errorf("%s:\n%s", mode, plan)
			}
		}
	}
}
