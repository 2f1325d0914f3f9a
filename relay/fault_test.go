package relay_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/testenv"
)

// holdRecording keeps the relay from recording anything, by a lock on its
// checkpoint, until the function that it returns is called.
func (b *bundle) holdRecording() (release func()) {
	b.Helper()
	conn := b.connect()
	tx, err := conn.Begin(b.Context())
	b.must(err)
	_, err = tx.Exec(b.Context(), `select from outbox_relay_checkpoints for update`)
	b.must(err)
	return func() { b.must(tx.Rollback(context.Background())) }
}

// killUnrecorded kills the relay with what it has not recorded, and makes sure
// that no statement of it is carried out afterwards.
func (b *bundle) killUnrecorded(r *testenv.Relay, release func()) {
	b.Helper()
	r.Kill()
	b.exec(`select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'outbox-relay recorder' and datname = current_database()`)
	testenv.Eventually(b, "the recorder's backend gone", func() bool {
		return b.count(`select count(*) from pg_stat_activity where application_name = 'outbox-relay recorder' and datname = current_database()`) == 0
	})
	release()
}

// tooLarge is a payload over the server's max_payload.
const tooLarge = `insert into events (aggregate_type, event_type, payload)
	values ('order', 'created', to_jsonb(repeat('x', 2000000))) returning id`

func (b *bundle) insertTooLarge() string {
	b.Helper()
	var id string
	b.must(b.sql.QueryRow(b.Context(), tooLarge).Scan(&id))
	return id
}

func TestKilledBetweenParkedEventAndItsRecord(t *testing.T) {
	b := setup(t)
	r := b.streaming(noWindow)
	before := b.insert(1)
	b.requireStatus("published", before)
	release := b.holdRecording()
	stored := b.insert(2)
	bad := b.insertTooLarge()
	after := b.insert(3)
	r.WaitLog("parked an event")
	b.requireStream(append(before, stored...)) // nothing behind the parked event
	b.killUnrecorded(r, release)

	b.streaming(noWindow)
	b.requireStatus("published", append(stored, after...))
	b.requireStatus("failed", []string{bad})
	b.requireStream(append(append(before, stored...), after...))
	if n := b.count(`select failed_attempts from events where id = $1`, bad); n != 1 {
		t.Fatalf("failed_attempts is %d, want 1", n)
	}
}

func TestDeleteModeSurvivesImmediateStop(t *testing.T) {
	b := setupOn(t, testenv.OwnPostgres(t, map[string]string{"fsync": "on"}), testenv.NATSOptions{})
	b.streaming(noWindow, "AFTER_PUBLISH=delete")
	var ids []string
	for range 3 {
		more := b.insert(500)
		ids = append(ids, more...)
		b.requireNoRows(more)
		b.must(b.cluster.Stop(t.Context(), pgserver.Immediate))
		b.must(b.cluster.Restart(t.Context()))
		b.sql = b.connect()
	}
	last := b.insert(1)
	b.requireNoRows(last)
	b.requireStream(append(ids, last...))
}

func TestLinkToNATSCutWithThousandsInFlight(t *testing.T) {
	b := setup(t)
	proxy := testenv.NewProxy(t, strings.TrimPrefix(b.nats.URL(), "nats://"))
	r := b.streaming(noWindow, "NATS_URL=nats://"+proxy.Addr())
	var ids []string
	for range 3 {
		ids = append(ids, b.insert(30_000)...)
		from := b.last()
		testenv.Eventually(t, "events on their way", func() bool { return b.last() > from+1000 })
		proxy.StallDirection(testenv.Downstream, true) // no ack comes through
		b.awaitRest()                                  // the window fills, and all of it is stored and not acknowledged
		proxy.Cut()
		proxy.StallDirection(testenv.Downstream, false)
	}
	b.requireStream(ids)
	b.requireStatus("published", ids)
	if code := r.Terminate(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
}

// awaitRest waits until the stream gets no more messages.
func (b *bundle) awaitRest() {
	b.Helper()
	last, same := b.last(), 0
	testenv.Eventually(b, "the stream at rest", func() bool {
		now := b.last()
		if same++; now != last {
			last, same = now, 0
		}
		return same > 20
	})
}

// What a relay that was killed had still under way lands while its successor
// matches the stream with the slot: behind what was matched, it is matched again.
func TestLateCopiesLandWhileMatching(t *testing.T) {
	b := setup(t)
	proxy := testenv.NewProxy(t, strings.TrimPrefix(b.nats.URL(), "nats://"))
	var ids, left []string // all, and those whose message was not deleted
	for range 4 {
		r := b.streaming(noWindow, "NATS_URL=nats://"+proxy.Addr())
		first := len(ids)
		ids = append(ids, b.insert(40_000)...)
		testenv.Eventually(t, "events on their way", func() bool { return b.last() > uint64(first)+1000 })
		proxy.Stall(true) // some are stored and nobody hears of it, others are under way
		b.awaitRest()
		r.Kill()
		// With a message gone, all that the slot has is read to match: a while.
		gone := int(b.last())
		b.must(b.stream().DeleteMsg(t.Context(), uint64(gone)))
		left = append(append(left, ids[first:gone-1]...), ids[gone:]...)
		r = b.start(noWindow)
		testenv.Eventually(t, "matching, or nothing to match", func() bool {
			return strings.Contains(r.Logs(), "matching the stream") || strings.Contains(r.Logs(), "msg=streaming")
		})
		proxy.Stall(false)
		b.requireStatus("published", ids[first:])
		requireLeaves(t, r)
	}
	b.requireStream(left)
}

// publish puts a message into the stream by hand.
func (b *bundle) publish(header nats.Header) uint64 {
	b.Helper()
	ack, err := b.js.PublishMsg(b.Context(), &nats.Msg{Subject: "events.order.created", Header: header, Data: []byte(`"foreign"`)})
	b.must(err)
	return ack.Sequence
}

func (b *bundle) stream() jetstream.Stream {
	b.Helper()
	stream, err := b.js.Stream(b.Context(), "EVENTS")
	b.must(err)
	return stream
}

func TestForeignMessageDeletedBeforeTheNextEvent(t *testing.T) {
	b := setup(t)
	r := b.streaming()
	ids := b.insert(10)
	b.requireStatus("published", ids)
	b.must(b.stream().DeleteMsg(t.Context(), b.publish(nil)))
	ids = append(ids, b.insert(10)...)
	b.requireStatus("published", ids)
	b.must(b.stream().DeleteMsg(t.Context(), b.publish(nil)))
	r.Terminate() // a clean stop: what is gone at the next start was not the relay's
	b.streaming()
	ids = append(ids, b.insert(10)...)
	b.requireStatus("published", ids)
	b.requireIDs(ids)
}

// requireIDs compares the ids of what the stream holds.
func (b *bundle) requireIDs(want []string) {
	b.Helper()
	var got []string
	for _, m := range b.messages() {
		got = append(got, m.id)
	}
	if diff := firstDifference(got, want); diff != "" {
		b.Fatal(diff)
	}
}

func TestForgedHeadersOfForeignMessages(t *testing.T) {
	b := setup(t)
	b.streaming()
	ids := b.insert(3)
	b.requireStatus("published", ids)
	b.publish(nats.Header{"Outbox-Position": {"1/FFFFFFFF/FFFFFFFF/1"}, "Nats-Msg-Id": {"forged"}})
	b.publish(nats.Header{"Outbox-Position": {"9/0/1/1"}})
	more := b.insert(3)
	b.requireStatus("published", more)
	b.requireIDs(append(append(ids, "forged", ""), more...))
}

func TestForeignMessagesUnderLoad(t *testing.T) {
	b := setup(t)
	b.streaming(noWindow)
	o := b.oracle()
	w := b.write(8)
	for range 20 {
		w.await(300)
		b.publish(nil)
	}
	w.stop()
	ids := o.committed()
	b.requireStatus("published", ids)
	count := map[string]int{}
	for _, m := range b.messages() {
		count[m.id]++
	}
	for _, id := range ids { // a foreign message can break the order, never more
		if count[id] != 1 {
			t.Fatalf("event %s is in the stream %d times", id, count[id])
		}
	}
}

func TestStreamPurgedThenKilled(t *testing.T) {
	b := setup(t)
	r := b.streaming(noWindow)
	first := b.insert(10)
	b.requireStatus("published", first)
	release := b.holdRecording()
	b.insert(500)
	testenv.Eventually(t, "500 stored", func() bool { return b.last() == 510 })
	b.must(b.stream().Purge(t.Context()))
	b.killUnrecorded(r, release)

	b.streaming(noWindow)
	last := b.insert(5)
	b.requireStatus("published", last)
	b.requireIDs(last)
}

// workQueue makes the stream one whose messages go when they are consumed.
func (b *bundle) workQueue() {
	b.Helper()
	_, err := b.js.CreateStream(b.Context(), jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.*.*"},
		Retention: jetstream.WorkQueuePolicy, Duplicates: 100 * time.Millisecond})
	b.must(err)
}

// consume takes n messages from a work queue and returns their ids.
func (b *bundle) consume(n int) []string {
	b.Helper()
	consumer, err := b.js.CreateOrUpdateConsumer(b.Context(), "EVENTS", jetstream.ConsumerConfig{Durable: "worker", AckPolicy: jetstream.AckExplicitPolicy})
	b.must(err)
	var ids []string
	for len(ids) < n {
		batch, err := consumer.Fetch(n-len(ids), jetstream.FetchMaxWait(time.Second))
		b.must(err)
		for m := range batch.Messages() {
			b.must(m.DoubleAck(b.Context()))
			ids = append(ids, m.Headers().Get("Nats-Msg-Id"))
		}
	}
	return ids
}

func TestWorkQueueConsumedThenKilled(t *testing.T) {
	b := setup(t)
	b.workQueue()
	r := b.streaming()
	want := b.insert(10)
	b.requireStatus("published", want)
	release := b.holdRecording()
	want = append(want, b.insert(300)...)
	testenv.Eventually(t, "300 stored", func() bool { return b.last() == 310 })
	got := b.consume(200)
	b.killUnrecorded(r, release)
	b.streaming()
	want = append(want, b.insert(20)...)
	got = append(got, b.consume(len(want)-len(got))...)
	if diff := firstDifference(got, want); diff != "" {
		t.Fatal(diff)
	}
	b.requireStatus("published", want)
	if n := b.last(); n != 330 {
		t.Fatalf("the stream's last sequence is %d, want 330", n)
	}
}

func TestForeignMessageConsumedBeforeTheCrash(t *testing.T) {
	b := setup(t)
	b.workQueue()
	r := b.streaming()
	first := b.insert(10)
	b.requireStatus("published", first)
	b.publish(nil) // seen when the next event is refused
	second := b.insert(10)
	b.requireStatus("published", second)
	b.consume(21)
	release := b.holdRecording()
	b.insert(5)
	testenv.Eventually(t, "5 stored", func() bool { return b.last() == 26 })
	b.publish(nil)
	b.consume(6)
	b.killUnrecorded(r, release)

	// 6 messages are gone, and others than ours are known to come in: which of
	// the events are among them nobody can tell.
	r = b.start()
	if code := r.Wait(time.Minute); code != 1 {
		t.Fatalf("exit code %d", code)
	}
	for _, want := range []string{"messages 22 to 27 of stream EVENTS are gone", "UPDATE public.outbox_relay_checkpoints"} {
		if !strings.Contains(r.Logs(), want) {
			t.Fatalf("the error does not say %q", want)
		}
	}
	if n := b.last(); n != 27 {
		t.Fatalf("something was published: last sequence %d", n)
	}
}

func TestPurgeToAHighSequence(t *testing.T) {
	b := setup(t)
	r := b.streaming()
	ids := b.insert(10)
	b.requireStatus("published", ids)
	b.must(b.stream().Purge(t.Context(), jetstream.WithPurgeSequence(1_000_000)))
	last := b.last()
	more := b.insert(3)
	b.requireStatus("published", more)
	if n := b.last(); n != last+3 {
		t.Fatalf("last sequence %d, want %d", n, last+3)
	}
	r.Terminate()
}

func TestSlotMadeAgainByHand(t *testing.T) {
	b := setup(t)
	r := b.streaming()
	b.requireStatus("published", b.insert(10))
	r.Terminate()
	missed := b.insert(1)
	b.dropSlot()
	b.exec(`select pg_create_logical_replication_slot($1, 'pgoutput')`, b.slot())
	b.requireFatal(b.start("AFTER_PUBLISH=keep"), "was dropped and made again, or advanced by hand")
	b.requireStatus("pending", missed)
	b.insert(2)
	r = b.start()
	r.WaitLog("was dropped and made again, or advanced by hand")
	b.requireStatus("published", b.ids())
	b.requireStream(b.ids())
	requireLeaves(t, r)
}

// requireFatal waits until the relay ends by itself, with an error that says so.
func (b *bundle) requireFatal(r *testenv.Relay, want string) {
	b.Helper()
	if code := r.Wait(time.Minute); code != 1 {
		b.Fatalf("exit code %d, want 1", code)
	}
	if !strings.Contains(r.Logs(), want) {
		b.Fatalf("the error does not say %q", want)
	}
}

// What a publication has passed over comes from the table. With keep the rows
// don't tell what that is: the relay ends, until the change is accepted.
func TestTableDroppedFromPublicationAndAddedAgain(t *testing.T) {
	for _, running := range []bool{true, false} {
		for _, mode := range []string{"mark", "delete", "keep"} {
			t.Run(fmt.Sprintf("running=%t %s", running, mode), func(t *testing.T) {
				b := setup(t)
				after := "AFTER_PUBLISH=" + mode
				r := b.streaming(after)
				ids := b.insert(10)
				b.requireStream(ids)
				if !running {
					r.Terminate()
				}
				b.exec(`begin; alter publication outbox_relay drop table events`)
				missed := b.insert(2)
				b.exec(`alter publication outbox_relay add table events ` + listed + `; commit`)
				late := b.insert(3)
				if !running {
					r = b.start(after)
				}
				if mode != "keep" {
					r.WaitLog("was changed or made again")
					ids = append(ids, b.insert(3)...)
					b.requireOnce(append(append(ids, missed...), late...))
					b.requireDone(mode, append(ids, missed...))
					requireLeaves(t, r)
					return
				}
				b.requireFatal(r, "was changed or made again")
				b.requireFatal(b.start(after), "was changed or made again") // until it is accepted
				b.exec(`update outbox_relay_checkpoints set publication_state = null`)
				r = b.streaming(after)
				b.requireOnce(append(append(ids, late...), b.insert(1)...))
				requireLeaves(t, r)
			})
		}
	}
}

// requireOnce waits until the stream has each of these ids, once, in any order,
// and nothing else.
func (b *bundle) requireOnce(ids []string) {
	b.Helper()
	testenv.Eventually(b, fmt.Sprintf("%d messages in the stream", len(ids)), func() bool { return b.last() >= uint64(len(ids)) })
	var got []string
	for _, m := range b.messages() {
		got = append(got, m.id)
	}
	slices.Sort(got)
	if diff := firstDifference(got, slices.Sorted(slices.Values(ids))); diff != "" {
		b.Fatal(diff)
	}
}

func TestRowLockedByTheApplication(t *testing.T) {
	for _, mode := range []string{"mark", "delete"} {
		t.Run(mode, func(t *testing.T) {
			b := setup(t)
			r := b.streaming("AFTER_PUBLISH=" + mode)
			release := b.holdRecording()
			ids := b.insert(3)
			app := b.connect()
			tx, err := app.Begin(t.Context())
			b.must(err)
			_, err = tx.Exec(t.Context(), `select from events where id = $1 for update`, ids[1])
			b.must(err)
			release()
			r.WaitLog("rows are locked by the application")
			done := func(ids ...string) {
				if mode == "mark" {
					b.requireStatus("published", ids)
				} else {
					b.requireNoRows(ids)
				}
			}
			done(ids[0], ids[2])
			more := b.insert(1000)
			done(more...) // it holds nothing back
			b.requireStatus("pending", ids[1:2])
			r.Kill()
			b.streaming("AFTER_PUBLISH=" + mode)
			b.must(tx.Commit(t.Context()))
			done(ids[1])
			b.requireStream(append(ids, more...))
			testenv.Eventually(t, "no leftovers", func() bool { return b.count(`select count(*) from outbox_relay_leftovers`) == 0 })
		})
	}
}

func TestIdleRelayLetsAnIdleDatabaseRest(t *testing.T) {
	b := setupOn(t, testenv.OwnPostgres(t, nil), testenv.NATSOptions{})
	b.streaming()
	b.requireStatus("published", b.insert(1))
	writes := func() int {
		return b.count(`select n_tup_upd from pg_stat_user_tables where relname = 'outbox_relay_checkpoints'`)
	}
	lsn := func() (text string) {
		b.must(b.sql.QueryRow(t.Context(), `select pg_current_wal_insert_lsn()::text`).Scan(&text))
		return text
	}
	// The background writer logs running transactions every 15 s as long as
	// anything moves: at rest means that three of its rounds change nothing.
	at, since := lsn(), time.Now()
	testenv.Eventually(t, "WAL at rest", func() bool {
		if now := lsn(); now != at {
			at, since = now, time.Now()
		}
		return time.Since(since) > 17*time.Second
	})
	if n := writes(); n > 12 {
		t.Fatalf("%d checkpoints were written for one event", n)
	}
}

func TestIdleOutboxBesideABusyTable(t *testing.T) {
	b := setup(t)
	b.streaming()
	b.exec(`create table busy (n int)`)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	busy := b.connect()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			_, _ = busy.Exec(context.Background(), `insert into busy select generate_series(1, 1000)`)
		}
	}()
	var before string
	b.must(b.sql.QueryRow(t.Context(), `select pg_current_wal_lsn()::text`).Scan(&before))
	began := time.Now()
	testenv.Eventually(t, "the slot past "+before, func() bool {
		return b.count(`select count(*) from pg_replication_slots where slot_name = $1 and confirmed_flush_lsn > $2::pg_lsn`, b.slot(), before) == 1
	})
	t.Logf("confirmed after %s", time.Since(began))
	stop()
	<-done
}

func TestFastShutdownOfPostgres(t *testing.T) {
	for _, state := range []string{"idle", "under load", "NATS down"} {
		t.Run(state, func(t *testing.T) {
			b := setupOn(t, testenv.OwnPostgres(t, nil), testenv.NATSOptions{})
			b.streaming()
			ids := b.insert(10)
			b.requireStatus("published", ids)
			switch state {
			case "under load":
				writer := b.connect()
				done := make(chan struct{})
				go func() {
					defer close(done)
					for {
						if _, err := writer.Exec(context.Background(), `insert into events (aggregate_type, event_type, payload) select 'order', 'created', '{}' from generate_series(1, 100)`); err != nil {
							return // the shutdown
						}
					}
				}()
				defer func() { <-done }()
				testenv.Eventually(t, "1,000 events", func() bool { return b.last() > 1000 })
			case "NATS down":
				b.nats.Stop()
				b.insert(20_000)
			}
			began := time.Now()
			b.must(b.cluster.Stop(t.Context(), pgserver.Fast))
			t.Logf("stopped after %s", time.Since(began))
			b.must(b.cluster.Restart(t.Context()))
			if state == "NATS down" {
				b.nats.Restart()
			}
			b.sql = b.connect()
			rows, err := b.sql.Query(t.Context(), `select id from events where aggregate_type <> 'history' order by id`)
			b.must(err)
			all, err := pgx.CollectRows(rows, pgx.RowTo[string])
			b.must(err)
			b.requireStatus("published", all)
			if n := b.last(); n != uint64(len(all)) {
				t.Fatalf("%d messages for %d rows", n, len(all))
			}
		})
	}
}

func TestTakeOver(t *testing.T) {
	b := setup(t)
	first := b.streaming(noWindow)
	second := b.start(noWindow)
	second.WaitLog("standing by")
	o := b.oracle()
	w := b.write(4)
	w.await(500)
	first.Terminate()
	second.WaitLog("msg=streaming")
	w.await(500)
	third := b.start(noWindow)
	third.WaitLog("standing by")
	second.Freeze() // longer than wal_sender_timeout
	third.WaitLog("msg=streaming")
	w.await(500)
	second.Thaw()
	// It may have the slot again, if it wrote what the other was about to write:
	// the other then looks at the stream anew.
	second.WaitLog("waiting to start again")
	w.await(500)
	third.Kill()
	w.await(500)
	w.stop()
	ids := o.committed()
	b.requireStream(ids)
	b.requireStatus("published", ids)
}

// While Postgres can't record, as with a full disk, whose SQLSTATE a trigger
// raises here, events are published all the same, and the slot waits.
func TestOutcomesAreRefused(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`create function refuse() returns trigger language plpgsql as $$ begin raise exception 'not now' using errcode = 'disk_full'; end $$`)
	r := b.streaming()
	first := b.insert(5)
	b.requireStatus("published", first)
	b.exec(`create trigger refuse before update on events for each row execute function refuse()`)
	before := b.text(`select pg_current_wal_insert_lsn()::text`)
	ids := b.insert(5)
	b.requireStream(append(first, ids...))
	r.WaitLog("Postgres refuses to record outcomes")
	b.requireStatus("pending", ids)
	if b.confirmedPast(before) {
		t.Fatal("the slot was confirmed past what is not recorded")
	}
	b.exec(`drop trigger refuse on events`)
	b.requireStatus("published", ids)
	requireLeaves(t, r)
}

// A record that gave up waiting for its synchronous standby is none, also where the
// database hides the warning that tells so.
func TestRecordThatIsOnlyLocal(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.OwnPostgres(t, nil), testenv.NATSOptions{})
	b.exec(`alter database ` + pgx.Identifier{b.database()}.Sanitize() + ` set client_min_messages = error`)
	r := b.streaming()
	ids := b.insert(1)
	b.requireStatus("published", ids)
	b.exec(`set synchronous_commit = local`)
	b.exec(`alter system set synchronous_standby_names = 'nobody'`)
	b.exec(`select pg_reload_conf()`)
	testenv.Eventually(t, "a record to wait for the standby", func() bool {
		ids = append(ids, b.insert(1)...)
		return b.count(`select count(pg_cancel_backend(pid)) from pg_stat_activity where application_name = 'outbox-relay recorder' and wait_event = 'SyncRep'`) == 1
	})
	r.WaitLog("commit not acknowledged by the synchronous standby")
	b.exec(`alter system reset synchronous_standby_names`)
	b.exec(`select pg_reload_conf()`)
	b.requireStatus("published", ids)
	b.requireStream(ids)
	requireLeaves(t, r)
}

// Triggers of the application raise warnings of the SQLSTATE that tells of a
// commit which was not replicated.
func TestWarningsOfTriggers(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`create function warn() returns trigger language plpgsql as $$ begin raise warning 'careful'; return new; end $$`)
	b.exec(`create trigger warn before update on events for each row execute function warn()`)
	r := b.streaming()
	b.requireStatus("published", b.insert(5))
	b.requireStatus("published", b.insert(5))
	if strings.Contains(r.Logs(), "waiting to start again") {
		t.Fatalf("a session was lost:\n%s", r.Logs())
	}
}

// A server whose max_payload was lowered ends the connection of who sends more, and the
// client library does not come back from that.
func TestMaxPayloadIsLowered(t *testing.T) {
	b := setup(t)
	b.streaming(noWindow)
	ids := b.insert(10)
	b.requireStatus("published", ids)
	b.nats.Reload(func(o *server.Options) { o.MaxPayload = 100_000 })
	bad := b.text(`insert into events (aggregate_type, event_type, payload)
		values ('order', 'created', to_jsonb(repeat('x', 200000))) returning id`)
	ids = append(ids, b.insert(10)...)
	b.requireStatus("published", ids)
	b.requireStatus("failed", []string{bad})
	b.requireStream(ids)
}
