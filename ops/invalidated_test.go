package ops_test

import (
	"strings"
	"testing"

	"outbox-relay/internal/testenv"
)

// A slot that Postgres has invalidated is not ok, and the advice is about the setting by
// which it did: the one that bounds idle slots from 18 on, and the one that bounds WAL.
func TestSlotIsInvalidated(t *testing.T) {
	t.Parallel()
	d := setupOn(t, testenv.OwnPostgres(t, map[string]string{"min_wal_size": "32MB", "max_wal_size": "32MB"}))
	r := d.relay()
	if code := r.Terminate(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	setting, other, line := "max_slot_wal_keep_size", "idle_replication_slot_timeout", `alter system set max_slot_wal_keep_size = '1MB'`
	if ask[int](d, `select current_setting('server_version_num')::int`) >= 180000 {
		setting, other, line = other, setting, `alter system set idle_replication_slot_timeout = '1s'`
	}
	d.exec(line)
	d.exec(`select pg_reload_conf()`)
	if limits := d.diagnose(d.doctor())["postgres.slot_limits"]; setting == "idle_replication_slot_timeout" {
		d.requireLine(ailment{check: "postgres.slot_limits", state: "warning", words: []string{"idle_replication_slot_timeout is 1s"}}, limits)
	}
	testenv.Eventually(t, "the slot to be invalidated", func() bool {
		d.exec(`select pg_logical_emit_message(false, 'filler', repeat('x', 1000000)), pg_switch_wal()`)
		d.exec(`checkpoint`)
		return ask[string](d, `select wal_status from pg_replication_slots where slot_name = $1`, d.slot) == "lost"
	})
	lines := d.diagnose(d.doctor())
	d.requireLine(ailment{check: "postgres.slot", state: "warning", words: []string{"is invalidated", "start the relay"}}, lines["postgres.slot"])
	d.requireLine(ailment{check: "postgres.slot_wal", state: "warning", words: []string{setting}}, lines["postgres.slot_wal"])
	d.silent(other, lines["postgres.slot_wal"].Remedy+lines["postgres.slot_wal"].SQL)
	code, out := d.command("status")
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
	d.says(out, "the slot is lost", setting)
	d.silent(other, out)
	r = d.relay()
	d.insert(1, "order", "placed")
	d.ids(1)
	d.says(r.Logs(), setting)
	d.silent(other, r.Logs())
}

// silent requires that the text has not that word.
func (d *desk) silent(word, text string) {
	d.Helper()
	if strings.Contains(text, word) {
		d.Errorf("%s is in: %s", word, text)
	}
}
