package relay_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/testenv"
)

// fromTable tells a message that was published from the table, not from WAL.
func (m message) fromTable() bool {
	return strings.HasSuffix(m.position(), "/0/0/"+m.ordinal())
}

func (m message) position() string { return m.Header.Get("Outbox-Position") }

func (m message) ordinal() string { return m.position()[strings.LastIndex(m.position(), "/")+1:] }

// requireBackfilled waits for all the ids in the stream, once each: those from
// the table first, by id; then the others, as they were committed.
func (b *bundle) requireBackfilled(committed []string) {
	b.Helper()
	testenv.Eventually(b, fmt.Sprintf("%d messages in the stream", len(committed)), func() bool { return b.last() >= uint64(len(committed)) })
	order := make(map[string]int, len(committed))
	for i, id := range committed {
		order[id] = i
	}
	seen := map[string]bool{}
	backfilling, last, lastID := true, -1, ""
	for i, m := range b.messages() {
		at, known := order[m.id]
		switch {
		case !known:
			b.Fatalf("message %d has id %s, which was never committed", i+1, m.id)
		case seen[m.id]:
			b.Fatalf("message %d has id %s for the second time", i+1, m.id)
		case m.fromTable() && !backfilling:
			b.Fatalf("message %d, %s, comes from the table behind what came through the slot", i+1, m.id)
		case m.fromTable() && m.id < lastID:
			b.Fatalf("message %d, %s, comes from the table behind %s", i+1, m.id, lastID)
		case !m.fromTable() && at < last:
			b.Fatalf("message %d, %s, was committed before the one before it", i+1, m.id)
		}
		seen[m.id] = true
		if m.fromTable() {
			lastID = m.id
		} else {
			backfilling, last = false, at
		}
	}
	if len(seen) != len(committed) {
		b.Fatalf("the stream has %d events of %d", len(seen), len(committed))
	}
}

// requireDone waits until the rows say what became of their events.
func (b *bundle) requireDone(mode string, ids []string) {
	b.Helper()
	switch mode {
	case "mark":
		b.requireStatus("published", ids)
	case "delete":
		b.requireNoRows(ids)
	case "keep":
		b.requireStatus("pending", ids)
	}
}

// The rows that were there before the slot come first, while others are inserted,
// and however often the relay is killed.
func TestBackfillKilledAtRandomMoments(t *testing.T) {
	for _, mode := range []string{"mark", "delete", "keep"} {
		t.Run(mode, func(t *testing.T) {
			b := setup(t)
			after := "AFTER_PUBLISH=" + mode
			o := b.oracle()
			for range 4 {
				b.insert(10_000)
			}
			w := b.write(4)
			w.await(1000)
			for range 12 {
				r := b.start(noWindow, after)
				from := b.last()
				testenv.Eventually(t, "events in the stream", func() bool { return b.last() > from+uint64(rand.IntN(6000)) || w.rows.Load() > 30_000 })
				r.Kill()
			}
			w.await(1000)
			r := b.start(noWindow, after)
			r.WaitLog("msg=streaming")
			w.stop()
			ids := o.committed()
			b.requireBackfilled(ids)
			b.requireDone(mode, ids)
			requireLeaves(b, r)
		})
	}
}

// barred holds everybody up at the next write to a table, until it is released.
func (b *bundle) barred(table string) (release func()) {
	b.Helper()
	tx, err := b.connect().Begin(b.Context())
	b.must(err)
	_, err = tx.Exec(b.Context(), "lock table "+pgx.Identifier{table}.Sanitize()+" in share mode")
	b.must(err)
	return func() { b.must(tx.Rollback(context.Background())) }
}

// awaitBarred waits until somebody waits for a lock on the table.
func (b *bundle) awaitBarred(table string) {
	b.Helper()
	testenv.Eventually(b, "the relay to wait for "+table, func() bool {
		return b.count(`select count(*) from pg_locks where relation = $1::regclass and not granted`, table) > 0
	})
}

// A crash at each step of a backfill: once before it, and then, with the step
// before done, each later one. Meanwhile the application changes rows, and inserts
// some that only WAL has.
func TestBackfillKilledAtEachStep(t *testing.T) {
	for _, mode := range []string{"mark", "delete", "keep"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			b := setupOn(t, testenv.OwnPostgres(t, nil), testenv.NATSOptions{})
			o := b.oracle()
			start := func() *testenv.Relay {
				return b.start(noWindow, "AFTER_PUBLISH="+mode)
			}
			b.insert(40_000)
			between := func() {
				b.insert(10)
				b.exec(`update events set retried_attempts = 0 where id in (select id from events where status = 'pending' order by random() limit 20)`)
			}

			// The checkpoint is written, the slot is not made.
			open, err := b.connect().Begin(t.Context())
			b.must(err)
			_, err = open.Exec(t.Context(), `select pg_current_xact_id()`)
			b.must(err)
			r := start()
			r.WaitLog("creating the slot")
			testenv.Eventually(t, "a slot that is being made", func() bool {
				return b.count(`select count(*) from pg_replication_slots where slot_name = $1`, b.slot()) == 1
			})
			r.Kill()
			testenv.Eventually(t, "the walsender to leave", func() bool {
				b.exec(`select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = $1 and active`, b.slot())
				return b.count(`select count(*) from pg_replication_slots where slot_name = $1`, b.slot()) == 0
			})
			between()

			// From now on the slot has what is inserted and deleted again.
			within := between
			between = func() {
				within()
				b.exec(`begin; insert into events (aggregate_type, event_type, payload) values ('order', 'fleeting', '{}');
					delete from events where event_type = 'fleeting'; commit`)
			}

			// The slot is made, and its snapshot is not known to anybody.
			r = start()
			testenv.Eventually(t, "a slot that is being made", func() bool {
				return b.count(`select count(*) from pg_replication_slots where slot_name = $1`, b.slot()) == 1
			})
			release := b.barred("outbox_relay_checkpoints")
			b.must(open.Rollback(t.Context()))
			b.awaitBarred("outbox_relay_checkpoints")
			between()
			b.killUnrecorded(r, release)
			between()

			// The backfill has begun, and nothing of it is announced.
			release = b.barred("outbox_relay_batches")
			r = start()
			b.awaitBarred("outbox_relay_batches")
			between()
			b.killUnrecorded(r, release)

			// A batch is announced, and not sent.
			r = start()
			testenv.Eventually(t, "a batch", func() bool { return b.count(`select count(*) from outbox_relay_batches`) == 1 })
			release = b.barred("outbox_relay_checkpoints")
			between()
			b.killUnrecorded(r, release)
			between()

			// It is sent, and not recorded; then so again, from its middle.
			for range 3 {
				release = b.barred("outbox_relay_checkpoints")
				from := b.last()
				r = start()
				b.awaitBarred("outbox_relay_checkpoints")
				release()
				testenv.Eventually(t, "more messages", func() bool { return b.last() > from })
				release = b.barred("outbox_relay_checkpoints")
				between()
				b.killUnrecorded(r, release)
			}

			r = start()
			r.WaitLog("msg=streaming")
			b.insert(5)
			ids := o.committed()
			b.requireBackfilled(ids)
			b.requireDone(mode, slices.DeleteFunc(slices.Clone(ids), func(id string) bool {
				return b.count(`select count(*) from events where id = $1`, id) == 0
			}))
			requireLeaves(b, r)
		})
	}
}

// No timeout of the database ends what waits for the slot: the transaction that will
// read the backlog, and the recorder's connection, which does nothing meanwhile.
func TestBackfillOutlastsTimeouts(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.OwnPostgresSince(t, 17, nil), testenv.NATSOptions{}) // which has all of them
	ids := b.insert(10)
	open, err := b.connect().Begin(t.Context())
	b.must(err)
	_, err = open.Exec(t.Context(), `select pg_current_xact_id()`)
	b.must(err)
	for _, setting := range []string{"transaction_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout", "statement_timeout"} {
		b.exec(`alter database ` + pgx.Identifier{b.database()}.Sanitize() + ` set ` + setting + ` = '500ms'`)
	}
	r := b.start()
	testenv.Eventually(t, "the backlog's transaction to be older than the timeouts", func() bool {
		return b.count(`select count(*) from pg_stat_activity where application_name = 'outbox-relay backfill'
			and xact_start < clock_timestamp() - interval '2 s'`) == 1 || strings.Contains(r.Logs(), "waiting to start again")
	})
	b.must(open.Rollback(t.Context()))
	b.requireStatus("published", ids)
	if strings.Contains(r.Logs(), "waiting to start again") {
		t.Error("a session was lost")
	}
	requireLeaves(t, r)
}

// OUTBOX_BACKFILL=false leaves what was there before alone.
func TestBackfillIsOff(t *testing.T) {
	t.Parallel()
	b := setup(t)
	early := b.insert(3)
	r := b.streaming("BACKFILL=false")
	r.WaitLog("OUTBOX_BACKFILL=true")
	ids := b.insert(3)
	b.requireStatus("published", ids)
	b.requireStream(ids)
	b.requireStatus("pending", early)
	requireLeaves(b, r)
}
