package relay_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"outbox-relay/internal/testenv"
)

// A slot that is lost again and again under load, with the relay killed before
// that and while it heals: each event once.
func TestSlotLostUnderLoad(t *testing.T) {
	for _, mode := range []string{"mark", "delete"} {
		t.Run(mode, func(t *testing.T) {
			b := setup(t)
			after := "AFTER_PUBLISH=" + mode
			r := b.streaming(noWindow, after)
			o := b.oracle()
			w := b.write(2)
			for range 4 {
				w.await(rand.IntN(3000))
				r.Kill()
				b.dropSlot()
				for range 3 {
					w.await(rand.IntN(500))
					r = b.start(noWindow, after)
					if rand.IntN(2) == 0 {
						from := b.last()
						testenv.Eventually(t, "more events in the stream", func() bool { return b.last() > from })
					}
					r.Kill()
				}
				r = b.streaming(noWindow, after)
			}
			w.stop()
			ids := o.committed()
			b.requireDone(mode, ids)
			b.requireOnce(ids)
			requireLeaves(t, r)
		})
	}
}

// Where messages behind the checkpoint are gone, and with them the slot, nobody
// can tell what was stored: the relay stops, and goes on as it is told.
func TestSlotLostAndMessagesConsumed(t *testing.T) {
	b := setup(t)
	b.workQueue()
	r := b.streaming()
	first := b.insert(10)
	b.requireStatus("published", first)
	release := b.holdRecording()
	second := b.insert(5)
	testenv.Eventually(t, "5 stored", func() bool { return b.last() == 15 })
	b.consume(13)
	b.killUnrecorded(r, release)
	b.dropSlot()
	requireEnd(t, b.start(), 1, "message 11 of stream EVENTS", "is gone", "stream_sequence = 15")
	b.exec(`update events set status = 'published' where id = any ($1)`, second)
	b.exec(`update outbox_relay_checkpoints set stream_sequence = 15, message_id = null, unrecorded_bound = 0`)
	r = b.streaming()
	last := b.insert(3)
	b.requireStatus("published", last)
	if n := b.last(); n != 18 {
		t.Fatalf("the stream's last sequence is %d, want 18", n)
	}
	requireLeaves(t, r)
}

// An event before which the relay halts is passed once it is parked by hand, also
// where its row is gone.
func TestParkedByHand(t *testing.T) {
	for _, gone := range []bool{false, true} {
		b := setup(t)
		r := b.streaming("ON_REJECT=halt")
		ids := b.insert(2)
		rejected := b.reject(1)
		ids = append(ids, b.insert(2)...)
		requireEnd(t, r, 1, "halted before event "+rejected[0], "outbox-relay park "+rejected[0])
		if gone {
			b.exec(`delete from events where id = $1`, rejected[0])
		}
		requireEnd(t, b.start("ON_REJECT=halt"), 1, "halted before event "+rejected[0])
		if code := testenv.StartRelay(t, b.env, "park", rejected[0], "not", "ours", "--gone").Wait(time.Minute); code != 0 {
			t.Fatalf("exit code %d", code)
		}
		r = b.streaming("ON_REJECT=halt")
		b.requireStatus("published", ids)
		b.requireStream(ids)
		if gone {
			testenv.Eventually(t, "the event kept whole", func() bool {
				return b.count(`select count(*) from outbox_relay_leftovers where id = $1 and event ->> 'id' = id`, rejected[0]) == 1
			})
		} else {
			b.requireStatus("failed", rejected)
			if n := b.count(`select count(*) from events where failed_attempts = 1 and cardinality(failed_reasons) = 1 and status = 'failed' and aggregate_type <> 'history'`); n != 1 {
				t.Fatal("the failure counts other than once")
			}
		}
		requireLeaves(t, r)
	}
}

// A batch does not outlive its checkpoint, whose row somebody has deleted.
func TestBatchOfAnEarlierLife(t *testing.T) {
	b := setup(t)
	b.insert(20_000)
	r := b.start(noWindow)
	testenv.Eventually(t, "a batch under way", func() bool { return b.last() > 0 })
	r.Kill()
	if b.count(`select count(*) from outbox_relay_batches where done < cardinality(ids)`) != 1 {
		t.Fatal("no batch was under way")
	}
	b.awaitRest() // what was under way has landed, and the duplicate window is over
	b.dropSlot()
	b.exec(`delete from outbox_relay_checkpoints`)
	pending := b.count(`select count(*) from events where status = 'pending'`)
	from := b.last()
	r = b.streaming(noWindow)
	b.requireStatus("published", b.ids())
	if n := b.last() - from; n != uint64(pending) {
		t.Fatalf("%d messages for %d pending rows", n, pending)
	}
	requireLeaves(t, r)
}

// What was published from the table comes out of no slot again, so the relay does
// not go back over it when the broker forgets: it stops.
func TestBrokerForgetsARetry(t *testing.T) {
	f := &forgetful{bundle: setup(t)}
	f.forgetFailures()
	r := f.streaming(noWindow, "CONFIRM_DELAY=1h")
	ids := f.insert(20)
	failed := f.reject(5)
	f.requireRecorded(append(ids, f.insert(1)...))
	f.save()
	f.requireStatus("failed", failed)
	f.mend()
	f.exec(`select outbox_retry_all()`)
	f.requireStatus("published", failed)
	f.cutPower()
	f.insert(1)
	requireEnd(t, r, 1, "the broker forgot messages 22 to 26", "outbox-relay replay")
}

// A slot that is ahead of the checkpoint can't tell which events the messages were
// that are gone.
func TestSlotAheadAndMessagesConsumed(t *testing.T) {
	b := setup(t)
	b.workQueue()
	r := b.streaming()
	b.requireStatus("published", b.insert(10))
	release := b.holdRecording()
	b.insert(5)
	testenv.Eventually(t, "5 stored", func() bool { return b.last() == 15 })
	b.consume(15)
	b.killUnrecorded(r, release)
	testenv.Eventually(t, "the slot to be free", func() bool {
		return b.count(`select count(*) from pg_replication_slots where slot_name = $1 and active`, b.slot()) == 0
	})
	b.exec(`select pg_replication_slot_advance($1, pg_current_wal_lsn())`, b.slot())
	third := b.insert(8)
	requireEnd(t, b.start(), 1, "messages 11 to 15 of stream EVENTS are gone")
	b.requireStatus("pending", third)
	requireEnd(t, b.start(), 1, "messages 11 to 15 of stream EVENTS are gone")
}

// What lands late, after the slot was made anew, is not sent again.
func TestLateCopyWhileHealing(t *testing.T) {
	for _, mode := range []string{"mark", "delete"} {
		b := setup(t)
		after := "AFTER_PUBLISH=" + mode
		r := b.streaming(noWindow, after)
		ids := b.insert(10)
		b.requireDone(mode, ids)
		r.Kill()
		b.dropSlot()
		missed := b.insert(3)
		open, err := b.connect().Begin(t.Context())
		b.must(err)
		_, err = open.Exec(t.Context(), `select pg_current_xact_id()`)
		b.must(err)
		r = b.start(noWindow, after)
		r.WaitLog("creating the slot")
		b.publish(nats.Header{"Nats-Msg-Id": {missed[1]}})
		b.must(open.Rollback(t.Context()))
		r.WaitLog("msg=streaming")
		b.requireDone(mode, missed)
		b.requireStream(append(ids, missed[1], missed[0], missed[2]))
		requireLeaves(t, r)
	}
}

// Two relays find a lost slot at once: one makes it anew.
func TestTwoRelaysHeal(t *testing.T) {
	b := setupOn(t, testenv.OwnPostgres(t, map[string]string{"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}), testenv.NATSOptions{})
	r := b.streaming()
	ids := b.insert(3)
	b.requireStatus("published", ids)
	requireLeaves(t, r)
	ids = append(ids, b.insert(2)...)
	b.loseWAL()
	release := b.barred("outbox_relay_checkpoints")
	relays := []*testenv.Relay{b.start(), b.start()}
	testenv.Eventually(t, "both to wait", func() bool {
		return b.count(`select count(*) from pg_locks where relation = 'outbox_relay_checkpoints'::regclass and not granted`) == 2
	})
	release()
	ids = append(ids, b.insert(3)...)
	b.requireStatus("published", ids)
	b.requireOnce(ids)
	for _, r := range relays {
		requireLeaves(t, r)
	}
}

// A backfill that is not finished is not forgotten by a change of the configuration.
func TestBackfillIsTurnedOff(t *testing.T) {
	b := setup(t)
	ids := b.insert(10)
	recording := b.barred("events")
	r := b.start()
	b.awaitBarred("events")
	b.killUnrecorded(r, recording)
	requireEnd(t, b.start("BACKFILL=false"), 1, "a backfill is not finished", "SET phase = 'streaming'")
	r = b.streaming()
	b.requireStatus("published", ids)
	requireLeaves(t, r)
}

// Events that overtook others, as the stream tells at the start, are not sent
// again, wherever the relay is killed while it sends the others.
func TestOvertakenAndKilled(t *testing.T) {
	b := setup(t)
	r := b.streaming(noWindow)
	ids := b.insert(2)
	b.requireStatus("published", ids)
	requireLeaves(t, r)
	b.exec(`update outbox_relay_checkpoints set unrecorded_bound = 65536`)
	late := b.insert(3000)
	for _, id := range late[2000:2500] {
		b.publish(nats.Header{"Nats-Msg-Id": {id}})
	}
	all := uint64(len(ids) + len(late))
	for from := b.last(); from < all; from = b.last() { // read once: what was killed can still land
		r = b.start(noWindow)
		testenv.Eventually(t, "more messages", func() bool { return b.last() > from })
		r.Kill()
	}
	r = b.streaming(noWindow)
	b.requireStatus("published", late)
	b.requireOnce(append(ids, late...))
	requireLeaves(t, r)
}
