package relay_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"outbox-relay/internal/testenv"
)

// reject inserts n events that no message can carry, and waits until they failed.
func (b *bundle) reject(n int) []string {
	b.Helper()
	var ids []string
	b.must(b.sql.QueryRow(b.Context(), `with rejected as (insert into events (aggregate_type, event_type, payload, headers)
		select 'order', 'rejected', '{}', '{"content-type": "no"}' from generate_series(1, $1) returning id)
		select array_agg(id order by id) from rejected`, n).Scan(&ids))
	return ids
}

// mend makes rejected events such that messages can carry them.
func (b *bundle) mend() { b.exec(`update events set headers = null where event_type = 'rejected'`) }

// A failed event that is asked for again is published where that was committed.
func TestRetry(t *testing.T) {
	b := setup(t)
	b.forgetFailures()
	r := b.streaming()
	ids := b.insert(2)
	failed := b.reject(3)
	b.requireStatus("failed", failed)
	b.mend()

	var want []string
	tx, err := b.sql.Begin(t.Context())
	b.must(err)
	want = append(append(ids, insert(b, tx, 2)...), failed[0], failed[2])
	_, err = tx.Exec(t.Context(), `select outbox_retry($1, 'event_unknown', $2)`, failed[0], failed[2])
	b.must(err)
	want = append(want, insert(b, tx, 2)...)
	b.must(tx.Commit(t.Context()))
	b.requireStream(want)
	b.requireStatus("published", want)
	b.requireStatus("failed", failed[1:2])
	if n := b.count(`select count(*) from events where retried_attempts = 1 and retried_at is not null and failed_attempts = 1
		and failed_at is not null and cardinality(failed_reasons) = 1 and published_at is not null and aggregate_type <> 'history'`); n != 2 {
		t.Fatalf("%d rows tell of their failure and their retry, want 2", n)
	}

	tx, err = b.sql.Begin(t.Context())
	b.must(err)
	_, err = tx.Exec(t.Context(), `select outbox_retry_all()`)
	b.must(err)
	b.must(tx.Rollback(t.Context()))
	b.exec(`update events set headers = '{"content-type": "no"}' where id = $1`, failed[1])
	b.exec(`select outbox_retry_all()`) // fails again
	testenv.Eventually(t, "the second failure", func() bool {
		return b.count(`select count(*) from events where failed_attempts = 2 and cardinality(failed_reasons) = 2 and status = 'failed'`) == 1
	})
	b.mend()
	b.exec(`select outbox_retry_all()`)
	want = append(want, failed[1])
	b.requireStatus("published", want)
	b.requireStream(want)
	requireLeaves(t, r)
}

// A limit that was raised lets an event through that was too large for it.
func TestRetryOnceTheLimitIsRaised(t *testing.T) {
	b := setup(t)
	r := b.streaming()
	config := b.stream().CachedInfo().Config
	config.MaxMsgSize = 2000
	_, err := b.js.UpdateStream(t.Context(), config)
	b.must(err)
	var id string
	b.must(b.sql.QueryRow(t.Context(), `insert into events (aggregate_type, event_type, payload)
		values ('order', 'large', jsonb_build_object('x', repeat('y', 3000))) returning id`).Scan(&id))
	b.requireStatus("failed", []string{id})
	b.exec(`select outbox_retry($1)`, id)
	testenv.Eventually(t, "the second failure", func() bool {
		return b.count(`select count(*) from events where failed_attempts = 2 and aggregate_type <> 'history'`) == 1
	})
	config.MaxMsgSize = -1
	_, err = b.js.UpdateStream(t.Context(), config)
	b.must(err)
	b.exec(`select outbox_retry($1)`, id)
	b.requireStatus("published", []string{id})
	b.requireStream([]string{id})
	requireLeaves(t, r)
}

// ask asks for rows by a request of our own making.
func (b *bundle) ask(content any) {
	b.Helper()
	text, err := json.Marshal(content)
	b.must(err)
	b.exec(`select outbox_relay_ask('events', $1)`, string(text))
}

// What is asked for names ids, and what it says of them is not believed.
func TestRequestsThatAreNone(t *testing.T) {
	b := setup(t)
	r := b.streaming()
	ids := b.insert(2)
	b.requireStatus("published", ids)
	failed := b.reject(1)
	b.requireStatus("failed", failed)
	type row struct {
		ID      string `json:"id"`
		Attempt int    `json:"attempt"`
	}
	many := slices.Repeat(ids, 600)
	for _, content := range []any{
		"", 7, []string{}, map[string]any{}, map[string]any{"retry": []row{}}, map[string]any{"replay": "", "ids": ids},
		map[string]any{"replay": "a b", "ids": ids}, map[string]any{"replay": "a\r\nx: y", "ids": ids}, map[string]any{"replay": "twice", "ids": []string{ids[0], ids[0]}},
		map[string]any{"replay": "many", "ids": many}, map[string]any{"retry": []row{{ids[0], 1}}, "replay": "x"},
		map[string]any{"retry": []row{{failed[0], 0}}}, map[string]any{"replay": "nul", "ids": []string{"a\x00"}},
		map[string]any{"replay": "long", "ids": []string{strings.Repeat("x", 2<<20)}},
	} {
		b.ask(content)
	}
	b.ask(map[string]any{"retry": []row{{ids[0], 1}, {failed[0], 1}, {"event_unknown", 1}}})
	b.ask(map[string]any{"replay": "unknown", "ids": []string{"event_unknown"}})
	b.exec(`select pg_logical_emit_message(false, 'outbox_relay:' || 'events'::regclass::oid, '{"replay": "x", "ids": ["a"]}')`)
	b.exec(`select pg_logical_emit_message(true, 'other', '{"replay": "x", "ids": ["a"]}')`)
	ids = append(ids, b.insert(2)...)
	b.requireStatus("published", ids)
	b.requireStream(ids)
	b.requireStatus("failed", failed)
	if n := strings.Count(r.Logs(), "ignored a request"); n != 14 {
		t.Errorf("%d requests were ignored, want 14", n)
	}
	requireLeaves(t, r)
	r = b.streaming()
	requireLeaves(t, r)
	b.requireStream(ids)
}

// A replay publishes rows once more, under ids of its own, beside what is inserted.
func TestReplay(t *testing.T) {
	for _, mode := range []string{"mark", "keep"} {
		t.Run(mode, func(t *testing.T) {
			b := setup(t)
			after := "AFTER_PUBLISH=" + mode
			r := b.streaming(after, noWindow)
			ids := b.insert(300)
			b.requireStream(ids)
			b.requireDone(mode, ids)
			b.exec(`delete from events where id = $1`, ids[7])
			w := b.write(2)
			for part := range slices.Chunk(ids, 100) {
				b.ask(map[string]any{"replay": "again", "ids": part})
				w.await(300)
			}
			r.WaitLog("run=again")
			r.Kill()
			r = b.streaming(after, noWindow)
			w.stop()
			again := slices.Delete(slices.Clone(ids), 7, 8)
			for i := range again {
				again[i] += ":again"
			}
			testenv.Eventually(t, "the replay", func() bool {
				return b.last() == uint64(len(ids)+len(again)+w.committed(b, mode, ids))
			})
			var got []string
			for _, m := range b.messages() {
				if m.Header.Get("Outbox-Replay") == "again" {
					got = append(got, m.id)
				}
			}
			if diff := firstDifference(got, again); diff != "" {
				t.Fatal(diff)
			}
			requireLeaves(t, r)
		})
	}
}

// committed counts the rows that the writers have left.
func (w *writers) committed(b *bundle, _ string, ids []string) int {
	return b.count(`select count(*) from events where id <> all ($1) and aggregate_type <> 'history'`, ids)
}

// Killed again and again while failed rows are published from the table, with
// writers beside: each once, and the others in commit order.
func TestRetryKilledAtRandomMoments(t *testing.T) {
	b := setup(t)
	b.forgetFailures()
	r := b.streaming(noWindow)
	o := b.oracle()
	failed := b.reject(1500)
	b.requireStatus("failed", failed)
	b.mend()
	w := b.write(4)
	b.exec(`select outbox_retry_all()`)
	for range 15 {
		w.await(20 + rand.IntN(400))
		r.Kill()
		r = b.start(noWindow)
	}
	w.stop()
	ids := o.committed()
	b.requireStatus("published", ids)
	b.requireOnce(ids)
	var got []string
	again := map[string]bool{}
	for _, id := range failed {
		again[id] = true
	}
	for _, m := range b.messages() {
		if !again[m.id] {
			got = append(got, m.id)
		}
	}
	if diff := firstDifference(got, slices.DeleteFunc(ids, func(id string) bool { return again[id] })); diff != "" {
		t.Fatal(diff)
	}
	requireLeaves(t, r)
}

// A crash before a batch is announced, before any of it is sent, and before what
// was sent is recorded; also where consumers have taken that at once, so that only
// what was announced tells which events were stored.
func TestRetryKilledAtEachStep(t *testing.T) {
	for _, consumed := range []bool{false, true} {
		t.Run(fmt.Sprintf("consumed=%t", consumed), func(t *testing.T) {
			b := setup(t)
			b.workQueue()
			r := b.streaming()
			failed := b.reject(60)
			b.requireStatus("failed", failed)
			b.mend()
			var want, got []string
			for i, part := range slices.Collect(slices.Chunk(failed, 20)) {
				announcing := b.barred("outbox_relay_batches")
				b.exec(`select outbox_retry(variadic $1)`, part)
				want = append(append(want, part...), b.insert(3)...)
				b.awaitBarred("outbox_relay_batches")
				if i == 0 {
					b.killUnrecorded(r, announcing)
				} else {
					recording := b.barred("events")
					announcing()
					b.awaitBarred("events")
					if consumed {
						got = append(got, b.consume(7*i)...)
					}
					b.killUnrecorded(r, recording)
					b.exec(`update events set version = version where id = $1`, part[19])
				}
				r = b.start()
				b.requireStatus("published", want)
				got = append(got, b.consume(len(want)-len(got))...)
			}
			if diff := firstDifference(got, want); diff != "" {
				t.Fatal(diff)
			}
			if n := b.last(); n != uint64(len(want)) {
				t.Fatalf("the stream's last sequence is %d, want %d", n, len(want))
			}
			requireLeaves(t, r)
		})
	}
}

// Killed again and again in the middle of a replay: each of its messages once.
func TestReplayKilledAtRandomMoments(t *testing.T) {
	b := setup(t)
	r := b.streaming(noWindow)
	ids := b.insert(20_000)
	b.requireStatus("published", ids)
	var want []string
	for part := range slices.Chunk(ids, 1000) {
		b.ask(map[string]any{"replay": "again", "ids": part})
		for _, id := range part {
			want = append(want, id+":again")
		}
	}
	for b.last() < uint64(len(ids)+len(want)) {
		from := b.last()
		testenv.Eventually(t, "more messages", func() bool { return b.last() > from+uint64(rand.IntN(2000)) || b.last() == uint64(len(ids)+len(want)) })
		r.Kill()
		r = b.start(noWindow)
	}
	b.requireStream(append(ids, want...))
	b.requireStatus("published", append(ids, b.insert(1)...))
	requireLeaves(t, r)
}
