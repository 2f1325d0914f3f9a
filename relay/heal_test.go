package relay_test

import (
	"math/rand/v2"
	"testing"
	"time"

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
		if code := testenv.StartRelay(t, b.env, "park", rejected[0], "not", "ours").Wait(time.Minute); code != 0 {
			t.Fatalf("exit code %d", code)
		}
		r = b.streaming("ON_REJECT=halt")
		b.requireStatus("published", ids)
		b.requireStream(ids)
		if !gone {
			b.requireStatus("failed", rejected)
			if n := b.count(`select count(*) from events where failed_attempts = 1 and cardinality(failed_reasons) = 1`); n != 1 {
				t.Fatal("the failure counts other than once")
			}
		}
		requireLeaves(t, r)
	}
}
