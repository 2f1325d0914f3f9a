package relay_test

import (
	"context"
	"fmt"
	"testing"

	"outbox-relay/internal/testenv"
)

// A slot can't be made before every open transaction has ended: the relay says
// which one it waits for, leaves at once when told to, and takes the slot up
// where it was left.
func TestSlotWaitsForAnOpenTransaction(t *testing.T) {
	b := setupOn(t, testenv.OwnPostgres(t, nil), testenv.NATSOptions{})
	application := b.connect()
	tx, err := application.Begin(t.Context())
	b.must(err)
	early := insert(b, tx, 1)
	r := b.start()
	r.WaitLog(fmt.Sprintf("pid=%d", application.PgConn().PID()))
	if code := r.Terminate(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	b.start()
	b.must(tx.Commit(context.Background()))
	testenv.Eventually(t, "a slot", func() bool {
		return b.count(`select count(*) from outbox_relay_checkpoints where phase = 'streaming'`) == 1
	})
	ids := append(early, b.insert(3)...) // from before the slot, and through it
	b.requireStatus("published", ids)
	b.requireStream(ids)
}

// A prepared transaction, which no backend has, is named like any other.
func TestSlotWaitsForAPreparedTransaction(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.OwnPostgres(t, map[string]string{"max_prepared_transactions": "1"}), testenv.NATSOptions{})
	b.exec(`begin`)
	ids := b.insert(1)
	b.exec(`prepare transaction 'it''s forgotten'`)
	r := b.start()
	r.WaitLog(`COMMIT PREPARED 'it''s forgotten' or ROLLBACK PREPARED`)
	b.exec(`commit prepared 'it''s forgotten'`)
	b.requireStatus("published", ids)
	b.requireStream(ids)
	requireLeaves(t, r)
}

// The first start of two relays at once, and a start after kill -9 while the slot
// is being created, which its old walsender goes on with: both stand by.
func TestSlotIsBeingCreatedByAnother(t *testing.T) {
	b := setupOn(t, testenv.OwnPostgres(t, nil), testenv.NATSOptions{})
	application := b.connect()
	tx, err := application.Begin(t.Context())
	b.must(err)
	_, err = tx.Exec(t.Context(), `create table other ()`)
	b.must(err)
	first := b.start()
	testenv.Eventually(t, "the slot to be created", func() bool {
		return b.count(`select count(*) from pg_replication_slots where slot_name = $1`, b.slot()) == 1
	})
	second := b.start()
	second.WaitLog("standing by")
	first.Kill()
	third := b.start()
	third.WaitLog("standing by")
	b.must(tx.Commit(context.Background()))
	testenv.Eventually(t, "a relay that streams", func() bool {
		return b.count(`select count(*) from outbox_relay_checkpoints where phase = 'streaming'`) == 1
	})
	ids := b.insert(3)
	b.requireStatus("published", ids)
	b.requireStream(ids)
	requireLeaves(b, second)
	requireLeaves(b, third)
}
