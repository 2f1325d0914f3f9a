package outbox_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"outbox-relay/checkpoint"
	"outbox-relay/outbox"
	"outbox-relay/outbox/event"
)

// What is larger than Postgres takes as one value is left out of what is kept: no row keeps
// the outcomes of others from being recorded.
func TestLargePayloadIsNotKept(t *testing.T) {
	t.Parallel()
	for payload, text := range map[string]string{"text": strings.Repeat("x", 33<<20), "bytea": strings.Repeat("x", 33<<20)} {
		b := setup(t)
		b.table.Columns.Payload = payload
		s := b.claimed()
		e := event.Event{ID: []byte("gone"), EventType: []byte("created"), Payload: []byte(text)}
		effects, err := b.table.Held([]checkpoint.Item{{ID: e.ID, Outcome: checkpoint.Parked, Detail: &outbox.Rejected{Event: e, Reason: "too large"}}})
		b.must(err)
		b.must(s.Guarded(t.Context(), effects))
		kept := get[string](b, `select event::text from outbox_relay_leftovers where id = 'gone'`)
		want := fmt.Sprintf(`"left_out": {"payload": %d}`, len(text))
		if !strings.Contains(kept, want) || !strings.Contains(kept, `"event_type": "created"`) || len(kept) > 1000 {
			t.Errorf("%s: %d bytes are kept, %.300s", payload, len(kept), kept)
		}
	}
}

// claimed is the relay's checkpoint, ready to advance.
func (b *bundle) claimed() *checkpoint.Store {
	b.Helper()
	s := checkpoint.NewStore(b.relay, "public", "slot")
	b.must(s.Create(b.Context(), checkpoint.Checkpoint{SystemID: "1", Timeline: 1, Stream: "EVENTS"}))
	_, err := s.Claim(b.Context())
	b.must(err)
	return s
}

// sweep goes once through the leftovers, and returns how many still wait.
func (b *bundle) sweep(s *checkpoint.Store) (waiting int) {
	b.Helper()
	for after, last := "", false; !last; {
		var batch []outbox.Leftover
		var err error
		batch, last, err = b.table.NextLeftovers(b.Context(), b.relay, after, 1000)
		b.must(err)
		if len(batch) == 0 {
			break
		}
		var written outbox.LeftoversWritten
		b.must(s.Guarded(b.Context(), b.table.WriteLeftovers(batch, &written)))
		waiting += len(batch) - written.Done
		after = batch[len(batch)-1].ID
	}
	return waiting
}

func stored(id string) checkpoint.Item {
	return checkpoint.Item{ID: []byte(id), Outcome: checkpoint.Stored}
}

func parked(id, reason string) checkpoint.Item {
	e := event.Event{Position: event.Position{Commit: 0x1_00000002, Ordinal: 3}, ID: []byte(id), Version: []byte("0"),
		EventType: []byte(`of "type"`), Payload: []byte(`{"n": 12345678901234567890}`), Headers: []byte(`{"a": 1}`)}
	return checkpoint.Item{ID: []byte(id), Outcome: checkpoint.Parked, Detail: &outbox.Rejected{Event: e, Reason: reason}}
}

// record records the items' outcomes as one batch.
func (b *bundle) record(s *checkpoint.Store, items ...checkpoint.Item) outbox.Recorded {
	b.Helper()
	var recorded outbox.Recorded
	effects, err := b.table.Outcomes(items, &recorded)
	b.must(err)
	b.must(s.Advance(b.Context(), checkpoint.Advance{Position: event.Position{Commit: 9, Ordinal: 1}}, effects))
	return recorded
}

func requireCounts(t *testing.T, got outbox.Recorded, want outbox.Recorded, answered int) {
	t.Helper()
	if got.Published != want.Published || got.PublishedLocked != want.PublishedLocked || got.Failed != want.Failed ||
		got.FailedLocked != want.FailedLocked || got.Kept != want.Kept || got.Answered() != answered {
		t.Errorf("recorded %+v, %d answered; want %+v, %d", got, got.Answered(), want, answered)
	}
}

// lock holds rows locked until the returned function.
func (b *bundle) lock(how string, ids ...string) (release func()) {
	b.Helper()
	tx, err := b.connect().Begin(b.Context())
	b.must(err)
	_, err = tx.Exec(b.Context(), "select from events where id = any ($1) for "+how, ids)
	b.must(err)
	return func() { b.Helper(); b.must(tx.Commit(b.Context())) }
}

// status shows one row; nothing where it is gone.
func (b *bundle) status(id string) string {
	b.Helper()
	rows, err := b.sql.Query(b.Context(), `select concat_ws(' ', status, case when published_at is not null then 'published_at' end,
		case when failed_at is not null then 'failed_at' end, failed_attempts, failed_reasons) from events where id = $1`, id)
	b.must(err)
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	b.must(err)
	return strings.Join(all, "; ")
}

func (b *bundle) requireStatus(id, want string) {
	b.Helper()
	if got := b.status(id); got != want {
		b.Errorf("row %q is %q, want %q", id, got, want)
	}
}

// leftovers lists what waits: outcome, reason, whether the event is kept whole.
func (b *bundle) leftovers() string {
	b.Helper()
	return get[string](b, `select coalesce(string_agg(concat_ws(' ', outcome, reason, case when not waiting then 'whole' end), ', ' order by outcome, reason), '')
		from outbox_relay_leftovers where slot = 'slot'`)
}

// One statement tells rows apart: free, locked, gone, no longer pending; in a
// batch of its own kind and all mixed.
func TestOutcomesInMarkMode(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.claimed()
	ids := b.insert(8)
	b.exec(`update events set status = 'failed', failed_reasons = '{before}', failed_attempts = 1 where id = $1`, ids[2])
	b.exec(`update events set status = 'published' where id = $1`, ids[6])
	b.exec(`update events set failed_reasons = '{before}', failed_attempts = 4 where id = $1`, ids[4])
	release := b.lock("update", ids[1], ids[5])

	got := b.record(s, stored(ids[0]), stored(ids[1]), stored(ids[2]), stored("absent"),
		parked(ids[3], "too big"), parked(ids[4], "bad \"header\", {}"), parked(ids[5], "locked"), parked(ids[6], "answered"), parked("gone", "kept"))
	requireCounts(t, got, outbox.Recorded{Published: 1, PublishedLocked: 1, Failed: 2, FailedLocked: 1, Kept: 1}, 2)
	b.requireStatus(ids[0], "published published_at 0")
	b.requireStatus(ids[1], "pending 0")
	b.requireStatus(ids[2], "failed 1 {before}")
	b.requireStatus(ids[3], `failed failed_at 1 {"too big"}`)
	b.requireStatus(ids[4], `failed failed_at 5 {before,"bad \"header\", {}"}`)
	b.requireStatus(ids[5], "pending 0")
	b.requireStatus(ids[6], "published 0")
	b.requireStatus(ids[7], "pending 0") // not in the batch
	if got := b.leftovers(); got != "failed kept whole, failed locked, published" {
		t.Errorf("leftovers %s", got)
	}

	// As long as they are locked they wait; then their outcome is written.
	if waiting := b.sweep(s); waiting != 2 {
		t.Errorf("%d wait, want 2", waiting)
	}
	release()
	if waiting := b.sweep(s); waiting != 0 {
		t.Errorf("%d wait, want none", waiting)
	}
	b.requireStatus(ids[1], "published published_at 0")
	b.requireStatus(ids[5], "failed failed_at 1 {locked}")
	if got := b.leftovers(); got != "failed kept whole" {
		t.Errorf("leftovers %s", got)
	}
}

// A parked event whose row the application is about to delete is kept when that
// commits.
func TestParkedWhileTheRowIsBeingDeleted(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.claimed()
	ids := b.insert(2)
	deleting := b.connect()
	_, err := deleting.Exec(t.Context(), `begin`)
	b.must(err)
	_, err = deleting.Exec(t.Context(), `delete from events`)
	b.must(err)
	got := b.record(s, parked(ids[0], "too big"), stored(ids[1]))
	requireCounts(t, got, outbox.Recorded{FailedLocked: 1, PublishedLocked: 1}, 0)
	_, err = deleting.Exec(t.Context(), `commit`)
	b.must(err)
	if waiting := b.sweep(s); waiting != 0 {
		t.Errorf("%d wait, want none", waiting)
	}
	if got := b.leftovers(); got != "failed too big whole" {
		t.Errorf("leftovers %s", got)
	}
	if id := get[string](b, `select event ->> 'id' from outbox_relay_leftovers`); id != ids[0] {
		t.Errorf("event %s is kept, want %s", id, ids[0])
	}
}

// A rejected event whose row is gone can be had from the leftovers, payload to
// the letter of jsonb.
func TestRejectedEventWithoutARowIsKeptWhole(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.record(b.claimed(), parked("gone", "a reason"))
	var event map[string]json.RawMessage
	b.must(json.Unmarshal([]byte(get[string](b, `select event::text from outbox_relay_leftovers where id = 'gone'`)), &event))
	want := map[string]string{"id": `"gone"`, "version": `"0"`, "event_type": `"of \"type\""`, "payload": `{"n": 12345678901234567890}`,
		"headers": `{"a": 1}`, "commit_lsn": `"1/2"`, "ordinal": "3"}
	for name, value := range want {
		if string(event[name]) != value {
			t.Errorf("%s is %s, want %s", name, event[name], value)
		}
	}
	if len(event) != len(want) {
		t.Errorf("%d members, want %d: %s", len(event), len(want), event)
	}
}

// An event that was parked by hand without its row is completed when the relay
// passes it, also where its id was used twice.
func TestParkedByHandIsKeptWhole(t *testing.T) {
	t.Parallel()
	b := setup(t)
	_, _, err := b.table.Park(t.Context(), b.relay, "gone", "not ours", true)
	b.must(err)
	requireCounts(t, b.record(b.claimed(), parked("gone", "a reason"), parked("gone", "a reason")), outbox.Recorded{Kept: 1}, 0)
	if got := get[string](b, `select concat_ws(' ', outcome, reason, waiting, event ->> 'id') from outbox_relay_leftovers`); got != "failed not ours f gone" {
		t.Errorf("the leftover is %s", got)
	}
}

func TestOutcomesInDeleteMode(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.table.Mode = outbox.Delete
	s := b.claimed()
	ids := b.insert(4)
	b.exec(`update events set status = 'failed' where id = $1`, ids[2])
	release := b.lock("share", ids[1]) // a reader's lock that bars a delete
	got := b.record(s, stored(ids[0]), stored(ids[1]), stored(ids[2]), stored("absent"), parked(ids[3], "bad"))
	requireCounts(t, got, outbox.Recorded{Published: 1, PublishedLocked: 1, Failed: 1}, 2)
	b.requireStatus(ids[0], "")
	b.requireStatus(ids[1], "pending 0")
	b.requireStatus(ids[2], "failed 0")
	b.requireStatus(ids[3], "failed failed_at 1 {bad}")
	release()
	waiting := b.sweep(s)
	b.requireStatus(ids[1], "")
	if got := b.leftovers(); got != "" || waiting != 0 {
		t.Errorf("leftovers %s, %d wait", got, waiting)
	}
}

// In keep mode the row stays as it is, but a failure shows.
func TestOutcomesInKeepMode(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.table.Mode = outbox.Keep
	ids := b.insert(2)
	got := b.record(b.claimed(), stored(ids[0]), stored("absent"), parked(ids[1], "bad"))
	requireCounts(t, got, outbox.Recorded{Failed: 1}, 0)
	b.requireStatus(ids[0], "pending 0")
	b.requireStatus(ids[1], "failed failed_at 1 {bad}")
}

// An application that holds a foreign key's lock on the row does not bar an
// outcome that changes no key.
func TestKeyShareBarsNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.insert(1)
	release := b.lock("key share", ids...)
	defer release()
	requireCounts(t, b.record(b.claimed(), stored(ids[0])), outbox.Recorded{Published: 1}, 0)
}

// It bars a deletion, which passes it over as any other lock, and waits for none.
func TestKeyShareBarsADeletion(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.table.Mode = outbox.Delete
	s := b.claimed()
	_, err := b.relay.Exec(t.Context(), `set lock_timeout = '1s'`) // who waits fails
	b.must(err)
	ids := b.insert(3)
	release := b.lock("key share", ids[1])
	requireCounts(t, b.record(s, stored(ids[0]), stored(ids[1]), stored(ids[2])), outbox.Recorded{Published: 2, PublishedLocked: 1}, 0)
	if waiting := b.sweep(s); waiting != 1 {
		t.Errorf("%d wait, want 1", waiting)
	}
	release()
	waiting := b.sweep(s)
	b.requireStatus(ids[1], "")
	if got := b.leftovers(); got != "" || waiting != 0 {
		t.Errorf("leftovers %s, %d wait", got, waiting)
	}
}

// What the application did to a locked row before it let go of it is its answer.
func TestLeftoverMeetsAnAnswer(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.claimed()
	ids := b.insert(3)
	release := b.lock("update", ids...)
	b.record(s, stored(ids[0]), stored(ids[1]), parked(ids[2], "bad"))
	release()
	b.exec(`delete from events where id = $1`, ids[0])
	b.exec(`update events set status = 'failed', failed_reasons = '{mine}' where id = any ($1)`, ids[1:])
	waiting := b.sweep(s)
	if got := b.leftovers(); got != "" || waiting != 0 {
		t.Errorf("leftovers %s, %d wait", got, waiting)
	}
	b.requireStatus(ids[1], "failed 0 {mine}")
	b.requireStatus(ids[2], "failed 0 {mine}")
}

// Two relays of one database have their own leftovers.
func TestLeftoversOfAnotherSlot(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.claimed()
	id := b.insert(1)[0]
	b.exec(`insert into outbox_relay_leftovers (slot, id, outcome) values ('another', $1, 'published')`, id)
	waiting := b.sweep(s)
	if n := get[int](b, `select count(*)::int from outbox_relay_leftovers`); n != 1 || waiting != 0 {
		t.Errorf("%d leftovers of another, %d of ours wait", n, waiting)
	}
	b.requireStatus(id, "pending 0")
}

// A sweep takes a limited number at a time, and none is left behind rows that stay
// locked.
func TestManyLeftovers(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.claimed()
	ids := b.insert(2500)
	slices.Sort(ids)
	release := b.lock("update", ids[:1100]...)
	defer release()
	b.exec(`insert into outbox_relay_leftovers (slot, id, outcome) select 'slot', unnest($1::text[]), 'published'`, ids)
	if waiting := b.sweep(s); waiting != 1100 {
		t.Errorf("%d wait, want the 1100 that are locked", waiting)
	}
}

// A batch does not wait for the application, whatever the order of locks.
func TestBatchOfThousands(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.claimed()
	ids := b.insert(4096)
	release := b.lock("update", ids[:96]...)
	defer release()
	var items []checkpoint.Item
	for i, id := range ids {
		if i%100 == 99 {
			items = append(items, parked(id, fmt.Sprint("reason ", i)))
		} else {
			items = append(items, stored(id))
		}
	}
	requireCounts(t, b.record(s, items...), outbox.Recorded{Published: 3960, PublishedLocked: 96, Failed: 40}, 0)
	if n := get[int](b, `select count(*)::int from events where failed_reasons = array['reason ' || 199] and id = $1`, ids[199]); n != 1 {
		t.Error("a reason went to another row")
	}
}
