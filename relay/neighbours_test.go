package relay_test

import (
	"strings"
	"testing"
	"time"

	"outbox-relay/internal/testenv"
)

// Row level security hides rows from the relay's role: it would take them for deleted. The
// relay does not start, and one that runs ends, each time with the table, the role and the
// remedy; so do the commands.
func TestRowLevelSecurity(t *testing.T) {
	t.Parallel()
	const remedy = `ALTER ROLE "relay" BYPASSRLS`
	policies := map[string]string{
		"of the outbox, without a policy":         `alter table events enable row level security`,
		"of the outbox, with a policy for others": `alter table events enable row level security; create policy mine on events using (aggregate_type = 'mine')`,
		"of the checkpoints":                      `alter table outbox_relay_checkpoints enable row level security`,
		"of the leftovers":                        `alter table outbox_relay_leftovers enable row level security; create policy none on outbox_relay_leftovers using (false)`,
	}
	for name, enable := range policies {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			r := b.streaming()
			b.requireStream(b.insert(3))
			b.exec(enable)
			b.exec(insertTexts, 3)
			b.requireFatal(r, remedy)
			r = b.start()
			b.requireFatal(r, "hides rows from role relay")
			for _, command := range [][]string{{"status"}, {"doctor"}, {"retry", "--all"}, {"replay", "--all", "--dry-run"}} {
				c := testenv.StartRelay(t, b.asRelay(b.with()), command...)
				if code := c.Wait(time.Minute); code != 1 || !strings.Contains(strings.Join(strings.Fields(c.Logs()), " "), remedy) {
					t.Errorf("%s ends with %d:\n%s", command, code, c.Logs())
				}
			}
		})
	}
}

// A role that row level security does not concern works as ever.
func TestRowLevelSecurityBypassed(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.OwnPostgres(t, nil), testenv.NATSOptions{})
	b.exec(`alter table events enable row level security; alter table events force row level security; alter role relay bypassrls`)
	ids := b.insert(10)
	b.streaming()
	b.requireStream(ids)
	b.requireStatus("published", ids)
}

// Other tools publish all tables, or all of a schema: Debezium and wal-listener do so by
// default. The relay's own tables are among them. It starts, runs on when such a
// publication is made, heals, and goes.
func TestPublicationOfAllTables(t *testing.T) {
	t.Parallel()
	for name, of := range map[string]string{"all tables": "all tables", "a schema": "tables in schema public"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.exec(`drop publication if exists "Everything"`)
			r := b.streaming("CONFIRM_DELAY=1s") // keeps a history
			ids := b.insert(100)
			b.requireStream(ids)
			b.exec(`create publication everything for ` + of)
			ids = append(ids, b.insert(100)...)
			b.requireStream(ids)
			b.requireStatus("published", ids)
			r.Kill()

			more := b.insert(10)
			b.dropSlot()
			r = b.streaming("CONFIRM_DELAY=1s")
			ids = append(ids, more...)
			b.requireStream(ids)
			b.requireStatus("published", ids)
			if code := r.Terminate(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			for _, command := range [][]string{{"doctor"}, {"drop", b.slot()}} {
				c := testenv.StartRelay(t, b.with(), command...)
				if code := c.Wait(time.Minute); code != 0 {
					t.Errorf("%s ends with %d:\n%s", command, code, c.Logs())
				}
			}
		})
	}
}

// Where default privileges let nobody execute new functions, what roles.sql grants is
// enough for all that the relay does, and the commands as its role.
func TestFunctionsAreForNobody(t *testing.T) {
	t.Parallel()
	b := setupEmpty(t, testenv.Postgres(t), testenv.NATSOptions{})
	b.exec(`alter default privileges revoke execute on functions from public`)
	b.migrate()
	b.grant()
	r := b.streaming("RETRY_ATTEMPTS=3", "RETRY_BACKOFF=1s", "RETENTION=1h")
	ids := b.insert(2)
	failed := b.reject(2)
	b.requireStatus("failed", failed)
	b.mend()
	b.requireStatus("published", failed)
	b.requireStream(append(ids, failed...))
	requireLeaves(t, r)
	r = b.streaming()
	failed = b.reject(2)
	b.requireStatus("failed", failed)
	b.mend()
	env := b.asRelay(b.with())
	requireEnd(t, testenv.StartRelay(t, env, "retry", failed[0]), 0)
	requireEnd(t, testenv.StartRelay(t, env, "retry", "--all"), 0)
	b.requireStatus("published", failed)
	requireEnd(t, testenv.StartRelay(t, env, "replay", "--id", ids[0], "--run", "again", "--yes"), 0)
	requireEnd(t, testenv.StartRelay(t, env, "status"), 0)
	requireLeaves(t, r)
}
