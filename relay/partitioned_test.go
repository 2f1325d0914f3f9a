package relay_test

import (
	"testing"
	"time"

	"outbox-relay/internal/testenv"
)

// An outbox that is partitioned by time: its backlog and what comes from several
// partitions at once goes out under the root's name, by id and in commit order,
// and its rows are recorded where they are.
func TestPartitionedOutbox(t *testing.T) {
	for _, mode := range []string{"mark", "delete"} {
		t.Run(mode, func(t *testing.T) {
			b := setupEmpty(t, testenv.Postgres(t), testenv.NATSOptions{})
			if code := testenv.StartRelay(t, b.with(), "migrate", "--partitioned").Wait(time.Minute); code != 0 {
				t.Fatalf("migrate ends with %d", code)
			}
			b.grant()
			b.exec(`select outbox_relay_add_partitions('events', 'month', 1)`)
			spread := func(n int) []string {
				var ids []string
				b.must(b.sql.QueryRow(t.Context(), `with spread as (insert into events (aggregate_type, event_type, payload, created_at)
					select 'order', 'created', '{}', now() + (i % 3 - 1) * interval '40 days' from generate_series(1, $1) i returning id)
					select array_agg(id) from spread`, n).Scan(&ids))
				return ids
			}
			backlog := spread(300)
			if n := b.count(`select count(distinct tableoid) from events`); n < 2 {
				t.Fatalf("the rows are in %d partitions", n)
			}
			r := b.start(noWindow, "AFTER_PUBLISH="+mode)
			r.WaitLog("msg=streaming")
			w := b.write(2)
			w.await(500)
			r.Kill()
			r = b.streaming(noWindow, "AFTER_PUBLISH="+mode)
			w.stop()
			ids := append(backlog, spread(300)...)
			b.requireDone(mode, ids)
			testenv.Eventually(t, "every row's outcome", func() bool { return b.count(`select count(*) from events where status = 'pending'`) == 0 })
			seen := map[string]int{}
			for _, m := range b.messages() {
				seen[m.id]++
			}
			for _, id := range ids {
				if seen[id] != 1 {
					t.Fatalf("event %s is in the stream %d times", id, seen[id])
				}
			}
			requireLeaves(t, r)
		})
	}
}

// An old partition goes while events come steadily, however long it takes to read:
// the recorder, which waits for it meanwhile, does not keep it for ever.
func TestOldPartitionIsDroppedUnderLoad(t *testing.T) {
	b := setupEmpty(t, testenv.Postgres(t), testenv.NATSOptions{})
	if code := testenv.StartRelay(t, b.with(), "migrate", "--partitioned").Wait(time.Minute); code != 0 {
		t.Fatalf("migrate ends with %d", code)
	}
	b.grant()
	b.exec(`create table old partition of events for values from ('2024-01-01') to ('2024-02-01')`)
	const lockedAndRead = "doomed := doomed || part.name;"
	b.exec(`do $$ begin execute replace(pg_get_functiondef('outbox_relay_drop_partitions'::regproc), '` + lockedAndRead + `',
		'perform pg_sleep(0.5); ` + lockedAndRead + `'); end $$`)
	if b.count(`select count(*) from pg_proc where proname = 'outbox_relay_drop_partitions' and prosrc like '%pg_sleep%'`) != 1 {
		t.Fatal("reading takes no longer")
	}
	r := b.streaming("RETENTION=10s")
	var ids []string
	testenv.Eventually(t, "the old partition gone", func() bool {
		ids = append(ids, b.insert(1)...)
		return b.count(`select count(*) from pg_class where relname = 'old'`) == 0
	})
	b.requireStatus("published", ids)
	b.requireStream(ids)
	requireLeaves(t, r)
}

// A table with pending rows that becomes a partition brings them along without an insert:
// they are reported. What is inserted into it then is published as ever, and a partition
// that was made empty is nothing to report.
func TestTableIsAttachedWithPendingRows(t *testing.T) {
	t.Parallel()
	b := setupEmpty(t, testenv.Postgres(t), testenv.NATSOptions{})
	migrate := testenv.StartRelay(t, b.env, "migrate", "--partitioned")
	if code := migrate.Wait(time.Minute); code != 0 {
		t.Fatalf("migrate ends with %d", code)
	}
	b.grant()
	r := b.streaming()
	b.requireStream(b.insert(3))
	b.exec(`create table other (like events including all);
		insert into other (id, version, aggregate_type, event_type, payload, status, created_at)
			select 'other-' || i, 0, 'order', 'created', '{}', case when i > 2 then 'pending' else 'published' end, '2020-01-01' from generate_series(1, 7) i;
		alter table events attach partition other for values from ('2019-01-01') to ('2021-01-01');
		create table empty partition of events for values from ('2021-01-01') to ('2022-01-01')`)
	b.exec(`insert into events (aggregate_type, event_type, payload, created_at) select 'order', 'created', '{}', d from unnest('{2020-06-01, 2021-06-01}'::date[]) d`)
	r.WaitLog("a table with pending rows was attached as a partition")
	r.WaitLog("partition=public.other rows=5")
	testenv.Eventually(t, "5 messages", func() bool { return b.last() == 5 })
	requireLeaves(t, r)

	// So are those of one that was attached while no relay ran, also below another one.
	b.exec(`create table old (like events including all) partition by range (created_at);
		create table old_2018 partition of old for values from ('2018-01-01') to ('2019-01-01');
		insert into old (id, version, aggregate_type, event_type, payload, status, created_at) values ('old-1', 0, 'order', 'created', '{}', 'pending', '2018-01-01');
		alter table events attach partition old for values from ('2017-01-01') to ('2019-01-01')`)
	r = b.streaming()
	r.WaitLog("partition=public.old_2018 rows=1")
	requireLeaves(t, r)
}
