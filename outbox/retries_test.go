package outbox_test

import (
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/migrations"
	"outbox-relay/outbox"
)

// fail lets a row have failed so long ago, after so many retries.
func (b *bundle) fail(id, ago string, retries int) {
	b.Helper()
	b.exec(`update events set status = 'failed', failed_at = now() - $2::text::interval, failed_attempts = $3 + 1, retried_attempts = $3,
		failed_reasons = '{too big}' where id = $1`, id, ago, retries)
}

// due walks through all failures that are due, a few a step.
func (b *bundle) due(r outbox.Retries, limit int, except ...string) []string {
	b.Helper()
	ids := []string{}
	for after := (outbox.Failure{}); ; {
		due, err := r.Due(b.Context(), b.relay, b.table, after, except, limit)
		b.must(err)
		for _, failure := range due {
			ids = append(ids, failure.ID)
			after = failure
		}
		if len(due) < limit {
			return ids
		}
	}
}

func requireIDs(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: %q, want %q", what, got, want)
	}
}

// Each retry waits twice as long as the one before, and there are only so many.
func TestRetriesAreDue(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.insert(9)
	b.fail(ids[0], "59 s", 0)
	b.fail(ids[1], "61 s", 0)
	b.fail(ids[2], "119 s", 1)
	b.fail(ids[3], "121 s", 1)
	b.fail(ids[4], "239 s", 2)
	b.fail(ids[5], "241 s", 2)
	b.fail(ids[6], "1 year", 3)
	b.fail(ids[7], "1 year", 0)
	b.exec(`update events set status = 'published' where id = $1`, ids[7]) // by a retry that was asked for
	r := outbox.Retries{Attempts: 3, Backoff: time.Minute}
	requireIDs(t, "all", b.due(r, 100), ids[5], ids[3], ids[1])
	requireIDs(t, "one a step", b.due(r, 1), ids[5], ids[3], ids[1])
	requireIDs(t, "without some", b.due(r, 2, ids[3], "x"), ids[5], ids[1])
	requireIDs(t, "one attempt", b.due(outbox.Retries{Attempts: 1, Backoff: time.Minute}, 100), ids[1])
	requireIDs(t, "half a year", b.due(outbox.Retries{Attempts: 100, Backoff: 180 * 24 * time.Hour}, 100))
	b.exec(`update events set retried_attempts = 2000000000 where id = $1`, ids[6])
	requireIDs(t, "no overflow", b.due(outbox.Retries{Attempts: 2147483647, Backoff: 1000 * time.Hour}, 100))
}

// Failures of one moment, as of one statement, are told apart by their ids.
func TestRetriesOfOneMoment(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.insert(10)
	b.exec(`update events set status = 'failed', failed_at = now() - interval '1 h' where id = any ($1)`, ids)
	slices.Sort(ids)
	requireIDs(t, "three a step", b.due(outbox.Retries{Attempts: 1, Backoff: time.Minute}, 3), ids...)
}

func TestDueFailuresAreFoundByTheIndex(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.insert(20_000)
	b.fail(ids[0], "1 h", 0)
	b.exec(`vacuum analyze events`)
	before := b.wholeScans(b.sql)
	for range 8 {
		requireIDs(t, "due", b.due(outbox.Retries{Attempts: 1, Backoff: time.Minute}, 100), ids[0])
	}
	if n := b.wholeScans(b.relay) - before; n > 0 {
		t.Errorf("%d scans of the whole table", n)
	}
}

func TestRetry(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.insert(3)
	b.fail(ids[0], "1 h", 0)
	b.fail(ids[1], "1 h", 1)
	retried, err := b.table.Retry(t.Context(), b.relay, append(ids, "gone"))
	b.must(err)
	if retried != 2 {
		t.Errorf("%d retried, want 2", retried)
	}
	b.requireStatus(ids[0], `pending failed_at 1 {"too big"}`)
	if n := get[int](b, `select retried_attempts from events where id = $1`, ids[1]); n != 2 {
		t.Errorf("%d attempts, want 2", n)
	}
}

// Another table has a function of its own.
func TestRetryInAnotherTable(t *testing.T) {
	t.Parallel()
	b := setup(t)
	config, err := pgx.ParseConfig(b.url)
	b.must(err)
	b.must(migrations.Up(t.Context(), config, migrations.Target{Schema: "public", Table: "Out box", Publication: "other"}, slog.New(slog.DiscardHandler)))
	b.exec(`insert into "Out box" (aggregate_type, event_type, payload) values ('order', 'created', '{}')`)
	b.exec(`update "Out box" set status = 'failed', failed_at = now()`)
	other := outbox.Table{Schema: "public", Name: "Out box", Slot: "slot"}
	retried, err := other.Retry(t.Context(), b.relay, []string{get[string](b, `select id from "Out box"`)})
	b.must(err)
	if retried != 1 {
		t.Errorf("%d retried, want 1", retried)
	}
}
