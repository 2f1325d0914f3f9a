package relay_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"outbox-relay/internal/testenv"
)

// forgetful is a broker whose power is cut: what it had acknowledged and not
// synced is gone.
type forgetful struct {
	*bundle
	saved string
}

// save keeps the store as it is now, as if it were synced.
func (f *forgetful) save() {
	f.Helper()
	f.nats.Stop()
	f.saved = filepath.Join(f.TempDir(), "store")
	f.must(os.CopyFS(f.saved, os.DirFS(f.nats.StoreDir())))
	f.nats.Restart()
}

// cutPower brings the saved store back.
func (f *forgetful) cutPower() {
	f.Helper()
	f.nats.Stop()
	f.must(os.RemoveAll(f.nats.StoreDir()))
	f.must(os.CopyFS(f.nats.StoreDir(), os.DirFS(f.saved)))
	f.nats.Restart()
}

// With the slot held back, the lost tail is sent again: by a relay that runs,
// and by one that starts.
func TestBrokerForgetsWhatTheSlotStillHas(t *testing.T) {
	for _, mode := range []string{"mark", "delete", "keep"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			f := &forgetful{bundle: setup(t)}
			f.serveMetrics()
			changes := []string{noWindow, "CONFIRM_DELAY=1h", "AFTER_PUBLISH=" + mode}
			r := f.streaming(changes...)
			ids := f.insert(20)
			f.requireRecorded(ids)
			f.save()
			ids = append(ids, f.insert(500)...)
			f.requireRecorded(ids)
			f.cutPower()
			ids = append(ids, f.insert(7)...)
			f.requireStream(ids)
			r.WaitLog("the broker forgot messages")
			if n := f.metric("outbox_relay_broker_forgot_total"); n != 1 {
				t.Errorf("the broker forgot %v times, by the metrics", n)
			}

			f.requireRecorded(ids)
			f.save()
			ids = append(ids, f.insert(300)...)
			f.requireRecorded(ids)
			requireLeaves(f.bundle, r)
			f.cutPower()
			r = f.start(changes...)
			f.requireStream(ids)
			f.requireRecorded(ids)
			requireLeaves(f.bundle, r)
		})
	}
}

// Having gone back, the relay confirms again only what is stored again: what was
// confirmed once says nothing now.
func TestGoneBackAndInterrupted(t *testing.T) {
	t.Parallel()
	f := &forgetful{bundle: setup(t)}
	proxy := testenv.NewProxy(t, strings.TrimPrefix(f.nats.URL(), "nats://"))
	changes := []string{noWindow, "CONFIRM_DELAY=3s", "NATS_URL=nats://" + proxy.Addr(), "MAX_INFLIGHT=4"}
	r := f.streaming(changes...)
	ids := f.insert(20)
	f.requireRecorded(ids)
	f.save()
	ids = append(ids, f.insert(500)...)
	f.requireRecorded(ids)
	proxy.Delay(25 * time.Millisecond)
	f.cutPower()
	ids = append(ids, f.insert(1)...)
	testenv.Eventually(t, "some events sent again", func() bool {
		return f.count(`select count(*) from outbox_relay_checkpoints where stream_sequence between 22 and 400`) == 1
	})
	f.nats.Stop()
	down := f.now()
	testenv.Eventually(t, "the delay to be over", func() bool {
		return f.count(`select count(*) from pg_stat_replication, pg_replication_slots where pid = active_pid and slot_name = $1
			and reply_time > $2::timestamptz + interval '5 s'`, f.slot(), down) == 1
	})
	r.Kill()
	f.nats.Restart()
	proxy.Delay(0)
	f.start(changes...)
	f.requireStream(ids)
}

// requireRecorded waits until the checkpoint stands on the last of the events.
func (b *bundle) requireRecorded(ids []string) {
	b.Helper()
	testenv.Eventually(b, "the checkpoint at the last event", func() bool {
		return b.count(`select count(*) from outbox_relay_checkpoints where message_id = $1`, ids[len(ids)-1]) == 1
	})
}

// Without, the range is named, and nothing is guessed.
func TestBrokerForgetsForGood(t *testing.T) {
	t.Parallel()
	f := &forgetful{bundle: setup(t)}
	r := f.streaming(noWindow)
	ids := f.insert(20)
	f.requireRecorded(ids)
	f.save()
	f.requireRecorded(f.insert(30))
	f.cutPower()
	f.insert(1) // what makes a relay that runs look
	requireEnd(t, r, 1, "the broker forgot messages 21 to 50", "UPDATE", "OUTBOX_CONFIRM_DELAY")
	requireEnd(t, f.start(noWindow), 1, "the broker forgot messages 21 to 50")
	f.requireStream(ids)
}

// Without its checkpoint the relay can't know what it has published: it stops,
// running or started, and confirms nothing more.
func TestCheckpointDeletedByHand(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming(noWindow)
	b.requireStatus("published", b.insert(5))
	before := b.text(`select pg_current_wal_insert_lsn()::text`)
	b.exec(`delete from outbox_relay_checkpoints`)
	late := b.insert(3)
	requireEnd(t, r, 1, "slot "+b.slot()+" exists and has no checkpoint", "pg_drop_replication_slot('"+b.slot()+"')")
	requireEnd(t, b.start(noWindow), 1, "has no checkpoint")
	b.requireStatus("pending", late)
	if b.confirmedPast(before) {
		t.Fatal("the slot was confirmed without a checkpoint")
	}
	b.dropSlot()
	b.streaming(noWindow)
	b.requireStatus("published", append(late, b.insert(2)...)) // once more, where the stream has them
}
