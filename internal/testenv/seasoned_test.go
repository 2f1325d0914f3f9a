package testenv

import "testing"

// What makes a database seasoned is there, in each of two that are made at once.
func TestSeasonedDatabase(t *testing.T) {
	for range 2 {
		t.Run("one", func(t *testing.T) {
			t.Parallel()
			url := SeasonedDatabase(t, Postgres(t))
			for what, sql := range map[string]string{
				"published rows":                     `select count(*) > 19000 from events where status = 'published' and published_at is not null`,
				"failed rows":                        `select count(*) > 50 from events where status = 'failed' and failed_at is not null`,
				"nothing pending":                    `select count(*) = 0 from events where status = 'pending'`,
				"rows of its history alone":          `select count(*) = 0 from events where aggregate_type <> 'history'`,
				"rows that were retried":             `select count(*) > 50 from events where status = 'published' and retried_attempts > 0`,
				"statistics that say published":      `select most_common_freqs[1] > 0.98 from pg_stats where tablename = 'events' and attname = 'status'`,
				"statistics of its size":             `select reltuples between 19000 and 21000 from pg_class where oid = 'events'::regclass`,
				"pages that are half empty":          `select pg_relation_size('events') > 1.5 * sum(pg_column_size(e)) from events e`,
				"dropped columns":                    `select count(*) = 2 from pg_attribute where attrelid = 'events'::regclass and attisdropped`,
				"a column that was added later":      `select count(*) = 1 from pg_attribute where attrelid = 'events'::regclass and atthasmissing`,
				"a column that needs quotes":         `select count("Tenant Id") > 0 from events`,
				"eager autovacuum":                   `select 'autovacuum_analyze_scale_factor=0' = any (reloptions) from pg_class where oid = 'events'::regclass`,
				"another publication":                `select count(*) = 1 from pg_publication where pubname = 'Data Warehouse'`,
				"another tool's slot":                `select count(*) = 1 from pg_replication_slots where slot_name = 'data_warehouse' and not active`,
				"a neighbour":                        `select count(*) > 10000 from "Shop Floor"."Order Lines"`,
				"settings of the database":           `select current_setting('TimeZone') = 'Asia/Kathmandu' and current_setting('DateStyle') = 'SQL, DMY'`,
				"a name that needs quotes":           `select quote_ident(current_database()) <> current_database()`,
				"a publication of the outbox itself": `select count(*) = 1 from pg_publication_tables where pubname = 'outbox_relay' and tablename = 'events'`,
			} {
				if !query[bool](t, url, sql) {
					t.Errorf("not there: %s", what)
				}
			}
			if got := query[string](t, AsRelay(t, url), `show default_transaction_isolation`); got != "serializable" {
				t.Errorf("the relay's role works at %s", got)
			}
			if name := SlotName(t, url); !query[bool](t, url, `select $1 <> '' and starts_with(current_database(), $1)`, name) {
				t.Errorf("slot name %q", name)
			}
		})
	}
}

// A database that nobody migrated has all but the outbox.
func TestInhabitedDatabase(t *testing.T) {
	url := InhabitedDatabase(t, Postgres(t))
	if !query[bool](t, url, `select to_regclass('events') is null and to_regclass('"Shop Floor"."Order Lines"') is not null`) {
		t.Error("an outbox, or no neighbours")
	}
}

// A busy neighbour changes its rows until it is stopped.
func TestBusyNeighbour(t *testing.T) {
	url := InhabitedDatabase(t, Postgres(t))
	Busy(t, url, 10_000)
	Eventually(t, "rows that change", func() bool {
		return query[bool](t, url, `select count(*) > 1000 from "Shop Floor"."Order Lines" where changed > (select min(changed) from "Shop Floor"."Order Lines")`)
	})
}
