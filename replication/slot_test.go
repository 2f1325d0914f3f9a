package replication_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/internal/testenv"
	"outbox-relay/replication"
)

// A new slot waits for every open transaction. Who gives up waiting leaves no
// slot behind.
func TestCreateSlotWaits(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.OwnPostgres(t, nil))
	tx, err := b.sql.Begin(t.Context())
	b.must(err)
	_, err = tx.Exec(t.Context(), `insert into t values (1)`)
	b.must(err)
	watch := setupOn(t, b.cluster)
	slots := func() int {
		return get[int](watch, `select count(*)::int from pg_replication_slots where slot_name = $1`, b.slot)
	}

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	created := make(chan error, 1)
	conn := b.connect()
	go func() {
		_, err := conn.CreateSlot(ctx, b.slot, false)
		created <- err
	}()
	testenv.Eventually(t, "the slot to wait for the transaction", func() bool { return slots() == 1 })
	cancel()
	if err := <-created; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the cancellation", err)
	}
	testenv.Eventually(t, "the unfinished slot to go", func() bool { return slots() == 0 })

	go func() {
		_, err := watch.connect().CreateSlot(t.Context(), b.slot, false)
		created <- err
	}()
	testenv.Eventually(t, "the slot to wait for the transaction", func() bool { return slots() == 1 })
	b.must(tx.Commit(t.Context()))
	b.must(<-created)
}

func TestCreateSlotFails(t *testing.T) {
	t.Parallel()
	cluster := testenv.OwnPostgres(t, map[string]string{"max_replication_slots": "2"}) // one is another tool's
	b := setupOn(t, cluster)
	_, err := b.connect().CreateSlot(t.Context(), b.slot, false)
	b.must(err)
	_, err = b.connect().CreateSlot(t.Context(), b.slot, false)
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || pgErr.Code != "42710" {
		t.Errorf("again: %v, want SQLSTATE 42710", err)
	}
	_, err = b.connect().CreateSlot(t.Context(), "another", false)
	if err == nil || !strings.Contains(err.Error(), "max_replication_slots") {
		t.Errorf("one too many: %v", err)
	}
}

// FAILOVER is known from 17 on.
func TestCreateSlotForFailover(t *testing.T) {
	t.Parallel()
	b := setup(t)
	_, err := b.connect().CreateSlot(t.Context(), b.slot, true)
	if b.cluster.Version() < 17 {
		if err == nil {
			t.Error("made without an error, by a server that knows no failover")
		}
		return
	}
	b.must(err)
	if !get[bool](b, `select failover from pg_replication_slots where slot_name = $1`, b.slot) {
		t.Error("the slot is not for failover")
	}
}

func TestReadAndCheckSlot(t *testing.T) {
	t.Parallel()
	b := setup(t)
	if _, err := replication.ReadSlot(t.Context(), b.sql, b.slot); !errors.Is(err, replication.ErrNoSlot) {
		t.Fatalf("got %v, want ErrNoSlot", err)
	}
	created, err := b.connect().CreateSlot(t.Context(), b.slot, false)
	b.must(err)
	slot := b.read()
	if slot.Confirmed != created.Point || slot.Type != "logical" || slot.Database != b.config.Database || slot.Temporary || slot.TwoPhase || slot.Active {
		t.Errorf("made at %s: %+v", created.Point, slot)
	}
	b.must(slot.Check(b.config.Database))

	other := b.slot + "_2"
	for create, want := range map[string]string{
		`select pg_create_logical_replication_slot($1, 'test_decoding')`:         "needs pgoutput",
		`select pg_create_physical_replication_slot($1)`:                         "physical slot",
		`select pg_create_logical_replication_slot($1, 'pgoutput', true)`:        "temporary",
		`select pg_create_logical_replication_slot($1, 'pgoutput', false, true)`: "two_phase",
	} {
		b.exec(create, other)
		slot, err := replication.ReadSlot(t.Context(), b.sql, other)
		b.must(err)
		if err := slot.Check(b.config.Database); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), other) {
			t.Errorf("%s: %v, want %q", create, err, want)
		}
		b.exec(`select pg_drop_replication_slot($1)`, other)
	}
	if err := slot.Check("elsewhere"); err == nil || !strings.Contains(err.Error(), "belongs to database") {
		t.Errorf("another database: %v", err)
	}
}

func TestIdentify(t *testing.T) {
	t.Parallel()
	b := setup(t)
	got, err := b.connect().Identify(t.Context())
	b.must(err)
	id := get[string](b, `select system_identifier::text from pg_control_system()`)
	if got.ID != id || got.Timeline != 1 || got.Database != b.config.Database {
		t.Errorf("got %+v, want %s", got, id)
	}
}
