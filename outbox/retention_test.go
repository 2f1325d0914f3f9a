package outbox_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"outbox-relay/outbox"
)

// remove walks to the end, a few rows a step.
func (b *bundle) remove(age time.Duration, limit int) (removed, steps int) {
	b.Helper()
	for after := ""; ; steps++ {
		r, err := b.table.RemovePublished(b.Context(), b.relay, after, age, limit)
		b.must(err)
		removed += r.Removed
		if r.End {
			return removed, steps + 1
		}
		after = r.Last
	}
}

// left lists the ids that the table has.
func (b *bundle) left() string {
	b.Helper()
	return get[string](b, `select coalesce(string_agg(id, ' ' order by id collate "C"), '') from events`)
}

func (b *bundle) requireLeft(want ...string) {
	b.Helper()
	if got := b.left(); got != strings.Join(want, " ") {
		b.Errorf("left are\n%s\nwant\n%s", got, strings.Join(want, "\n"))
	}
}

// ownIDs lets the application choose id and created_at.
func (b *bundle) ownIDs() {
	b.Helper()
	b.exec(`alter table events disable trigger on_events_create`)
}

// put inserts a row that was made and published so long ago; empty: not.
func (b *bundle) put(id, status, created, published string) {
	b.Helper()
	b.exec(`insert into events (id, aggregate_type, event_type, payload, status, created_at, published_at)
		values ($1, 'order', 'created', '{}', $2, now() - $3::text::interval, now() - nullif($4::text, '')::interval)`,
		id, status, created, published)
}

func TestRetentionRemovesWhatIsOldAndPublished(t *testing.T) {
	t.Parallel()
	b := setupFresh(t)
	b.ownIDs()
	b.put("a old", "published", "3 h", "2 h")
	b.put("b pending", "pending", "3 h", "")
	b.put("c pending again", "pending", "3 h", "2 h")
	b.put("d failed", "failed", "3 h", "")
	b.put("e failed in a retry", "failed", "3 h", "2 h")
	b.put("f young", "published", "3 h", "50 min")
	b.put("g leftover", "published", "3 h", "2 h")
	b.put("h kept whole once", "published", "3 h", "2 h")
	b.put("i in the open batch", "published", "3 h", "2 h")
	b.put("j locked", "published", "3 h", "2 h")
	b.put("k old", "published", "3 h", "2 h")
	b.exec(`insert into outbox_relay_leftovers (slot, id, outcome, waiting) values ('slot', 'g leftover', 'published', true), ('slot', 'h kept whole once', 'failed', false)`)
	b.exec(`insert into outbox_relay_batches (slot, kind, run, ids, commit_lsn, ordinal) values ('slot', 'replay', 'r', '{k old,i in the open batch,else}', '0/1', 1);
		update outbox_relay_batches set done = 1`)
	release := b.lock("key share", "j locked")
	if removed, _ := b.remove(time.Hour, 3); removed != 3 {
		t.Errorf("removed %d, want 3", removed)
	}
	b.requireLeft("b pending", "c pending again", "d failed", "e failed in a retry", "f young", "g leftover", "i in the open batch", "j locked")
	release()
	if removed, _ := b.remove(time.Hour, 100); removed != 1 {
		t.Errorf("removed %d, want the one that was locked", removed)
	}
	b.exec(`delete from events`)
	if removed, steps := b.remove(time.Hour, 3); removed != 0 || steps != 1 {
		t.Errorf("removed %d of none in %d steps", removed, steps)
	}
}

// With ULIDs a pass ends behind the first rows that are too young, unless ids
// of another make stand behind them.
func TestRetentionGoesNoFurtherThanULIDsNeed(t *testing.T) {
	t.Parallel()
	b := setupFresh(t)
	ids := b.insert(50)
	b.exec(`update events set status = 'published', published_at = now() - interval '1 h' where id = $1`, ids[0])
	if removed, steps := b.remove(time.Minute, 10); removed != 1 || steps != 1 {
		t.Errorf("removed %d in %d steps, want 1 in 1", removed, steps)
	}
	b.ownIDs()
	b.put("event_f47ac10b-58cc-4372-a567-0e02b2c3d479", "published", "1 h", "1 h")
	if removed, steps := b.remove(time.Minute, 10); removed != 1 || steps != 6 {
		t.Errorf("removed %d in %d steps, want 1 in 6", removed, steps)
	}
	b.requireLeft(ids[1:]...)
}

// Whatever the ids are, each row is looked at.
func TestRetentionWithUUIDs(t *testing.T) {
	t.Parallel()
	b := setupFresh(t)
	b.ownIDs()
	b.exec(`insert into events (id, aggregate_type, event_type, payload, status, created_at, published_at)
		select 'event_' || gen_random_uuid(), 'order', 'created', '{}', 'published', now(),
			now() - interval '1 h' * (i % 2) from generate_series(1, 1000) i`)
	if removed, steps := b.remove(time.Minute, 30); removed != 500 || steps < 33 {
		t.Errorf("removed %d in %d steps, want 500 in 34", removed, steps)
	}
	if n := get[int](b, `select count(*)::int from events where published_at < now() - interval '1 min'`); n != 0 {
		t.Errorf("%d are left", n)
	}
}

// What the application does not let go stays, and the error says so.
func TestRetentionIsRefused(t *testing.T) {
	t.Parallel()
	b := setupFresh(t)
	b.ownIDs()
	b.put("a", "published", "3 h", "2 h")
	b.exec(`create table orders (event text references events (id)); insert into orders values ('a')`)
	_, err := b.table.RemovePublished(t.Context(), b.relay, "", time.Hour, 10)
	if err == nil || !strings.Contains(err.Error(), `remove published rows of "public"."events"`) || !strings.Contains(err.Error(), "orders_event_fkey") {
		t.Errorf("error %v, want one that names both tables", err)
	}
	b.requireLeft("a")
}

// Each step finds its rows by the primary key, however large the table is and
// however often the statement was used.
func TestRetentionReadsNoWholeTable(t *testing.T) {
	t.Parallel()
	b := setupFresh(t)
	b.insert(20_000)
	b.exec(`update events set status = 'published', published_at = now() - interval '1 h' where id in (select id from events order by id limit 10000)`)
	b.exec(`vacuum analyze events`)
	before := b.wholeScans(b.sql)
	for range 8 {
		_, err := b.table.RemovePublished(t.Context(), b.relay, "", time.Minute, 100)
		b.must(err)
	}
	if n := b.wholeScans(b.relay) - before; n > 0 {
		t.Errorf("%d scans of the whole table", n)
	}
	if n := get[int](b, `select count(*)::int from events where status = 'published'`); n != 10_000-800 {
		t.Errorf("%d published rows are left", n)
	}
}

// wholeScans counts the scans of the whole table, those of conn and of who told
// before.
func (b *bundle) wholeScans(conn *pgx.Conn) int {
	b.Helper()
	_, err := conn.Exec(b.Context(), `select pg_stat_force_next_flush()`)
	b.must(err)
	_, err = conn.Exec(b.Context(), `select 1`) // a transaction's figures are flushed behind it
	b.must(err)
	return get[int](b, `select seq_scan::int from pg_stat_all_tables where relid = 'events'::regclass`)
}

// One table's rows, wherever it is.
func TestRetentionOfAnotherTable(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`create schema "Shop"`)
	for _, name := range []string{"outbox_relay_leftovers", "outbox_relay_batches"} {
		b.exec(fmt.Sprintf(`create table "Shop".%s (like %[1]s including all)`, name))
	}
	b.exec(`create table "Shop"."Out box" (like events including all)`)
	b.exec(`insert into "Shop"."Out box" (id, aggregate_type, event_type, payload, status, created_at, published_at)
		values ('x', 'order', 'created', '{}', 'published', now(), now() - interval '1 h')`)
	other := outbox.Table{Schema: "Shop", Name: "Out box", Slot: "slot"}
	r, err := other.RemovePublished(t.Context(), b.relay, "", time.Minute, 10)
	b.must(err)
	if r.Removed != 1 || !r.End {
		t.Errorf("%+v, want one removed", r)
	}
}

// While applications insert, lock, change and delete rows, exactly those go that
// are old and published, and nobody's change is lost.
func TestRetentionUnderWriters(t *testing.T) {
	t.Parallel()
	b := setupFresh(t)
	b.ownIDs()
	const writers, each = 3, 300
	var writing errgroup.Group
	stay := make([][]string, writers)
	for w := range writers {
		conn := b.connect()
		writing.Go(func() error {
			for i := range each {
				id, err := writeForRetention(t.Context(), conn, w, i)
				if err != nil {
					return err
				}
				if id != "" {
					stay[w] = append(stay[w], id)
				}
			}
			return nil
		})
	}
	ended := make(chan error, 1)
	go func() { ended <- writing.Wait() }()
	for running := true; running; {
		select {
		case err := <-ended:
			b.must(err)
			running = false
		default:
		}
		b.remove(time.Hour, 7)
	}
	want := slices.Concat(stay...)
	slices.Sort(want)
	if got := b.left(); got != strings.Join(want, " ") {
		t.Errorf("%d rows are left, want %d", len(strings.Fields(got)), len(want))
	}
}

// writeForRetention writes a row of one of several kinds. It returns its id where
// the row has to stay.
func writeForRetention(ctx context.Context, conn *pgx.Conn, writer, i int) (stays string, err error) {
	id := fmt.Sprintf("%04d_%d", i*7919%1000, writer)
	insert := func(status, published string) error {
		_, err := conn.Exec(ctx, `insert into events (id, aggregate_type, event_type, payload, status, created_at, published_at)
			values ($1, 'order', 'created', '{}', $2, now() - interval '3 h', now() - $3::text::interval)`, id, status, published)
		return err
	}
	switch i % 6 {
	case 0, 1:
		return "", insert("published", "2 h")
	case 2:
		return id, insert("published", "1 s")
	case 3:
		return id, insert("pending", "2 h")
	case 4:
		return id, insert("failed", "2 h")
	}
	if err := insert("published", "2 h"); err != nil {
		return "", err
	}
	tag, err := conn.Exec(ctx, `update events set status = 'pending' where id = $1`, id)
	if err != nil || tag.RowsAffected() == 0 { // it was removed before
		return "", err
	}
	return id, nil
}
