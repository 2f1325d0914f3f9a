package checkpoint_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/checkpoint"
	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/testenv"
	"outbox-relay/outbox"
	"outbox-relay/outbox/event"
)

// bundle is a migrated database with a connection of the application.
type bundle struct {
	*testing.T
	url string
	sql *pgx.Conn
}

func setup(t *testing.T) *bundle {
	t.Helper()
	return setupOn(t, testenv.Postgres(t))
}

func setupOn(t *testing.T, cluster *pgserver.Cluster) *bundle {
	t.Helper()
	b := &bundle{T: t, url: testenv.SeasonedDatabase(t, cluster)}
	b.sql = b.connect("application")
	return b
}

func (b *bundle) must(err error) {
	if err != nil {
		b.Helper()
		b.Fatal(err)
	}
}

func (b *bundle) connect(name string) *pgx.Conn {
	b.Helper()
	config, err := pgx.ParseConfig(b.url)
	b.must(err)
	config.RuntimeParams["application_name"] = name
	conn, err := pgx.ConnectConfig(b.Context(), config)
	b.must(err)
	b.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func (b *bundle) exec(sql string, args ...any) {
	b.Helper()
	_, err := b.sql.Exec(b.Context(), sql, args...)
	b.must(err)
}

// text returns a query's only value.
func (b *bundle) text(sql string, args ...any) string {
	b.Helper()
	var text string
	b.must(b.sql.QueryRow(b.Context(), sql, args...).Scan(&text))
	return text
}

// relay is a store with its own connection.
func (b *bundle) relay(name string) (*checkpoint.Store, *pgx.Conn) {
	b.Helper()
	conn := b.connect(name)
	return checkpoint.NewStore(conn, "public", "slot"), conn
}

var first = checkpoint.Checkpoint{Phase: checkpoint.Streaming, SystemID: "7", Timeline: 3, Stream: "EVENTS", Sequence: 40,
	StreamCreated: time.Date(2026, 1, 2, 3, 4, 5, 678901000, time.UTC)}

// begun is a store that has created, claimed and begun.
func (b *bundle) begun(name string) (*checkpoint.Store, *pgx.Conn) {
	b.Helper()
	s, conn := b.relay(name)
	b.must(s.Create(b.Context(), first))
	cp, err := s.Claim(b.Context())
	b.must(err)
	cp.Position, cp.Confirmed, cp.Bound = event.Position{Commit: 100}, 100, 65536
	b.must(s.Begin(b.Context(), cp))
	return s, conn
}

// whole shows all that a relay may change: rows, checkpoint, leftovers.
func (b *bundle) whole() string {
	b.Helper()
	return b.text(`select concat_ws(E'\n',
		(select string_agg(concat_ws(' ', id, status, published_at, failed_at, failed_reasons, failed_attempts), E'\n' order by id) from events),
		(select string_agg((c)::text, E'\n') from (select slot, phase, commit_lsn, ordinal, confirmed_lsn, stream_sequence, message_id from outbox_relay_checkpoints order by slot) c),
		(select string_agg((l)::text, E'\n' order by id) from outbox_relay_leftovers l))`)
}

// waits tells whether the connection's backend waits for a lock.
func (b *bundle) waits(conn *pgx.Conn) bool {
	return b.text(`select (count(*) = 1)::text from pg_stat_activity where pid = $1 and wait_event_type = 'Lock'`,
		conn.PgConn().PID()) == "true"
}

func TestStoreKeepsACheckpoint(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ctx := t.Context()
	s, _ := b.relay("relay")
	if _, err := s.Read(ctx); !errors.Is(err, checkpoint.ErrNone) {
		t.Errorf("read: %v, want ErrNone", err)
	}
	if _, err := s.Claim(ctx); !errors.Is(err, checkpoint.ErrNone) {
		t.Errorf("claim: %v, want ErrNone", err)
	}
	want := first
	want.Phase = checkpoint.Creating
	require := func(step string) {
		t.Helper()
		got, err := s.Read(ctx)
		b.must(err)
		got.StreamCreated = got.StreamCreated.UTC()
		if got != want {
			t.Fatalf("after %s\n%+v, want\n%+v", step, got, want)
		}
	}
	b.must(s.Create(ctx, first))
	require("create")
	changed := first
	changed.Stream = "OTHER"
	b.must(s.Create(ctx, changed))
	require("creating again")

	got, err := s.Claim(ctx)
	b.must(err)
	if got.StreamCreated = got.StreamCreated.UTC(); got != want {
		t.Fatalf("claimed %+v, want %+v", got, want)
	}
	want.Phase, want.Timeline, want.Confirmed = checkpoint.Streaming, 4, 0x1_00000010
	want.Position = event.Position{Commit: 0xFFFFFFFF_00000001, Ordinal: 9}
	want.Bound, want.Publication = 65536, "a fingerprint"
	b.must(s.Begin(ctx, want))
	require("begin")

	want.Position.Ordinal, want.Sequence, want.MessageID = 12, 44, "e4"
	b.must(s.Advance(ctx, checkpoint.Advance{Position: want.Position, Sequence: 44, MessageID: "e4", Confirm: 0x1_00000009}, checkpoint.Effects{}))
	require("an advance that confirms less") // C never goes back
	want.Sequence, want.Confirmed = 46, 0x1_00000020
	b.must(s.Advance(ctx, checkpoint.Advance{Position: want.Position, Sequence: 46, Confirm: 0x1_00000020}, checkpoint.Effects{}))
	require("an advance without an id")
	err = s.Advance(ctx, checkpoint.Advance{Position: event.Position{Commit: want.Position.Commit, Ordinal: 11}, Sequence: 47}, checkpoint.Effects{})
	if !errors.Is(err, checkpoint.ErrSuperseded) {
		t.Errorf("an advance backwards: %v, want ErrSuperseded", err)
	}
	require("an advance backwards")

	want.Foreign = true
	b.must(s.NoteForeign(ctx))
	require("a foreign message")
	want.Bound = 0
	b.must(s.Settle(ctx))
	require("settle")
	want.Foreign, want.Bound = false, 5
	b.must(s.Begin(ctx, want))
	want.Foreign = true
	require("a begin that knows of no foreign message") // once seen, for ever

	b.exec(`update outbox_relay_checkpoints set format = 3`)
	if _, err := s.Read(ctx); err == nil || !strings.Contains(err.Error(), "format is 3") {
		t.Errorf("a newer format: %v", err)
	}
}

// outcomes of events with these ids: the first is stored, the rest are parked.
func outcomes(t testing.TB, mode outbox.Mode, ids ...string) (checkpoint.Effects, *outbox.Recorded) {
	t.Helper()
	items := []checkpoint.Item{{ID: []byte(ids[0]), Outcome: checkpoint.Stored, Sequence: 41}}
	for _, id := range ids[1:] {
		items = append(items, checkpoint.Item{ID: []byte(id), Outcome: checkpoint.Parked,
			Detail: &outbox.Rejected{Event: event.Event{ID: []byte(id)}, Reason: "a reason"}})
	}
	var recorded outbox.Recorded
	table := outbox.Table{Schema: "public", Name: "events", Slot: "slot", Mode: mode}
	effects, err := table.Outcomes(items, &recorded)
	if err != nil {
		t.Fatal(err)
	}
	return effects, &recorded
}

// rows inserts three events and adds an id that has no row.
func (b *bundle) rows() []string {
	b.Helper()
	rows, err := b.sql.Query(b.Context(), `insert into events (aggregate_type, event_type, payload)
		select 'order', 'created', '{}' from generate_series(1, 3) returning id`)
	b.must(err)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	b.must(err)
	return append(ids, "absent")
}

var step = checkpoint.Advance{Position: event.Position{Commit: 200, Ordinal: 2}, Sequence: 41, MessageID: "m", Confirm: 210}

// A relay that was superseded records nothing: not the checkpoint, not a row's
// outcome, not a leftover, whether the row is free, locked or gone.
func TestZombieRecordsNothing(t *testing.T) {
	t.Parallel()
	for _, mode := range []outbox.Mode{outbox.Mark, outbox.Delete} {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			ids := b.rows()
			zombie, _ := b.begun("zombie")
			successor, _ := b.relay("successor")
			_, err := successor.Claim(t.Context())
			b.must(err)

			application := b.connect("locks a row")
			_, err = application.Exec(t.Context(), "begin")
			b.must(err)
			_, err = application.Exec(t.Context(), "select from events where id = $1 for update", ids[2])
			b.must(err)

			before := b.whole()
			effects, _ := outcomes(t, mode, ids...)
			for name, err := range map[string]error{
				"advance":         zombie.Advance(t.Context(), step, effects),
				"begin":           zombie.Begin(t.Context(), first),
				"settle":          zombie.Settle(t.Context()),
				"note of foreign": zombie.NoteForeign(t.Context()),
				"guarded":         zombie.Guarded(t.Context(), effects),
			} {
				if !errors.Is(err, checkpoint.ErrSuperseded) {
					t.Errorf("%s: %v, want ErrSuperseded", name, err)
				}
			}
			if after := b.whole(); after != before {
				t.Errorf("the zombie changed\n%s\nto\n%s", before, after)
			}

			effects, recorded := outcomes(t, mode, ids...)
			b.must(successor.Advance(t.Context(), step, effects))
			if recorded.Published != 1 || recorded.Failed != 1 || recorded.FailedLocked != 1 || recorded.Kept != 1 {
				t.Errorf("the successor recorded %+v", *recorded)
			}
		})
	}
}

// The zombie's statement is under way when a successor claims: it waits for the
// claim, or was frozen before it came to the checkpoint, and ends only after
// the claim's commit. Where the claim is rolled back, it counts.
func TestAdvanceAcrossAClaim(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		frozen bool
		ends   string
		want   error
	}{
		{"waits for a claim that commits", false, "commit", checkpoint.ErrSuperseded},
		{"waits for a claim that is rolled back", false, "rollback", nil},
		{"frozen, and the claim commits", true, "commit", checkpoint.ErrSuperseded},
		{"frozen, and the claim is rolled back", true, "rollback", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			ids := b.rows()
			zombie, conn := b.begun("zombie")
			b.exec(`create function wait_frozen() returns trigger language plpgsql as
				'begin perform pg_advisory_xact_lock_shared(42); return null; end'`)
			b.exec(`create trigger frozen before update on outbox_relay_checkpoints for each statement
				when (current_setting('application_name') = 'zombie') execute function wait_frozen()`)
			claim, err := b.connect("successor").Begin(t.Context())
			b.must(err)
			successor := checkpoint.NewStore(claim.Conn(), "public", "slot")
			if c.frozen {
				b.exec("select pg_advisory_lock(42)")
			} else {
				_, err := successor.Claim(t.Context())
				b.must(err)
			}

			before := b.whole()
			done := make(chan error, 1)
			effects, recorded := outcomes(t, outbox.Mark, ids...)
			go func() { done <- zombie.Advance(t.Context(), step, effects) }()
			testenv.Eventually(t, "the zombie's statement to wait", func() bool { return b.waits(conn) })
			if c.frozen {
				_, err := successor.Claim(t.Context())
				b.must(err)
			}
			_, err = claim.Conn().Exec(t.Context(), c.ends)
			b.must(err)
			if c.frozen {
				b.exec("select pg_advisory_unlock(42)")
			}

			if err := <-done; !errors.Is(err, c.want) {
				t.Fatalf("advance: %v, want %v", err, c.want)
			}
			after := b.whole()
			switch {
			case c.want != nil && after != before:
				t.Errorf("the zombie changed\n%s\nto\n%s", before, after)
			case c.want == nil && (recorded.Published != 1 || after == before):
				t.Errorf("recorded %+v:\n%s", *recorded, after)
			}
		})
	}
}

// A claim that comes while the checkpoint moves waits, and reads where it went:
// no event is between the two.
func TestClaimSeesWhatWasRecorded(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.rows()
	old, oldConn := b.begun("old")
	b.exec(`create function wait_frozen() returns trigger language plpgsql as
		'begin perform pg_advisory_xact_lock_shared(43); return null; end';
		create trigger frozen after update on outbox_relay_checkpoints for each row
			when (new.epoch = old.epoch) execute function wait_frozen();
		select pg_advisory_lock(43)`)
	advanced := make(chan error, 1)
	effects, _ := outcomes(t, outbox.Mark, ids...)
	go func() { advanced <- old.Advance(t.Context(), step, effects) }()
	testenv.Eventually(t, "the advance to be frozen", func() bool { return b.waits(oldConn) })

	successor, conn := b.relay("successor")
	type claim struct {
		checkpoint.Checkpoint
		error
	}
	claimed := make(chan claim, 1)
	go func() {
		cp, err := successor.Claim(t.Context())
		claimed <- claim{cp, err}
	}()
	testenv.Eventually(t, "the claim to wait", func() bool { return b.waits(conn) })
	b.exec("select pg_advisory_unlock(43)")
	b.must(<-advanced)
	got := <-claimed
	b.must(got.error)
	if got.Position != step.Position || got.Sequence != step.Sequence || got.MessageID != step.MessageID {
		t.Errorf("claimed %+v, want what was recorded before: %+v", got.Checkpoint, step)
	}
	effects, _ = outcomes(t, outbox.Mark, ids...)
	if err := old.Advance(t.Context(), step, effects); !errors.Is(err, checkpoint.ErrSuperseded) {
		t.Errorf("the old one goes on: %v", err)
	}
}

// A commit that gave up waiting for its synchronous standby is no checkpoint:
// it may be gone after a failover.
func TestCommitThatIsOnlyLocal(t *testing.T) {
	t.Parallel()
	cluster := testenv.OwnPostgres(t, nil)
	b := setupOn(t, cluster)
	config, err := pgx.ParseConfig(b.url)
	b.must(err)
	var store *checkpoint.Store
	config.OnNotice = func(_ *pgconn.PgConn, notice *pgconn.Notice) {
		if notice.Routine == "SyncRepWaitForLSN" {
			store.NotReplicated()
		}
	}
	conn, err := pgx.ConnectConfig(t.Context(), config)
	b.must(err)
	t.Cleanup(func() { conn.Close(context.Background()) })
	store = checkpoint.NewStore(conn, "public", "slot")
	b.must(store.Create(t.Context(), first))
	writes := map[string]func() error{
		"claim":        func() error { _, err := store.Claim(t.Context()); return err },
		"begin":        func() error { return store.Begin(t.Context(), first) },
		"settle":       func() error { return store.Settle(t.Context()) },
		"note foreign": func() error { return store.NoteForeign(t.Context()) },
		"advance":      func() error { return store.Advance(t.Context(), step, checkpoint.Effects{}) },
	}
	b.must(writes["claim"]())
	b.exec(`alter system set synchronous_standby_names = 'nobody'`)
	b.exec(`select pg_reload_conf()`)
	probe := b.connect("probe")
	testenv.Eventually(t, "commits to wait for the standby", func() bool {
		waited, err := b.giveUpStandby(probe, func() error {
			_, err := probe.Exec(t.Context(), `select pg_logical_emit_message(true, 'probe', '')`)
			return err
		})
		b.must(err)
		return waited
	})
	for name, write := range writes {
		waited, err := b.giveUpStandby(conn, write)
		if !waited || !errors.Is(err, checkpoint.ErrNotReplicated) {
			t.Errorf("%s: waited %t, got %v, want ErrNotReplicated", name, waited, err)
		}
	}
	b.exec(`alter system reset synchronous_standby_names`)
	b.exec(`select pg_reload_conf()`)
	testenv.Eventually(t, "no standby to be waited for", func() bool { return b.text(`show synchronous_standby_names`) == "" })
	b.must(writes["advance"]()) // the warning was of the one before
}

// giveUpStandby has conn write and cancels the commit's wait for its standby, and
// says whether there was one. None waits before the checkpointer has read the setting,
// whatever SHOW says elsewhere.
// Source: SyncRepWaitForLSN and SyncRepUpdateSyncStandbysDefined in
// src/backend/replication/syncrep.c.
func (b *bundle) giveUpStandby(conn *pgx.Conn, write func() error) (waited bool, err error) {
	done := make(chan error, 1)
	go func() { done <- write() }()
	pid := conn.PgConn().PID()
	testenv.Eventually(b.T, "the commit to end, or to wait for the standby", func() bool {
		select {
		case err = <-done:
			return true
		default:
		}
		waited = b.text(`select count(*)::text from pg_stat_activity where pid = $1 and wait_event = 'SyncRep'`, pid) == "1"
		return waited
	})
	if waited {
		b.exec(fmt.Sprintf(`select pg_cancel_backend(%d)`, pid))
		err = <-done
	}
	return waited, err
}

// A batch is announced under the epoch alone, also where that goes while the
// statement waits for it.
func TestZombieAnnouncesNothing(t *testing.T) {
	b := setup(t)
	old, _ := b.relay("slot")
	b.must(old.Create(t.Context(), first))
	_, err := old.Claim(t.Context())
	b.must(err)
	young, conn := b.relay("slot")
	_, err = conn.Exec(t.Context(), "begin")
	b.must(err)
	_, err = young.Claim(t.Context()) // its commit is under way
	b.must(err)
	done := make(chan error, 1)
	go func() {
		done <- old.Announce(t.Context(), checkpoint.TableBatch{Source: checkpoint.Backfill, IDs: []string{"a", "b"}})
	}()
	testenv.Eventually(t, "the old one to wait", func() bool {
		return b.text(`select count(*)::text from pg_locks where not granted and database = (select oid from pg_database where datname = current_database()) or locktype = 'transactionid' and not granted`) != "0"
	})
	_, err = conn.Exec(t.Context(), "commit")
	b.must(err)
	if err := <-done; !errors.Is(err, checkpoint.ErrSuperseded) {
		t.Errorf("the old one: %v", err)
	}
	if batch, err := young.Batch(t.Context()); err != nil || len(batch.IDs) != 0 {
		t.Errorf("the young one finds %+v, %v", batch, err)
	}
}

// The bound of a checkpoint that goes back by more messages than its column can count is
// the largest that it can: less is never taken for granted, and the relay starts.
func TestGoBackByVeryMany(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, _ := b.begun("relay")
	cp, err := s.Read(t.Context())
	b.must(err)
	cp.Sequence = 5_000_000_000
	b.must(s.GoBack(t.Context(), &cp, checkpoint.Earlier{Position: event.Position{Commit: 50}, Confirmed: 50, Sequence: 30}))
	back, err := s.Read(t.Context())
	b.must(err)
	if back.Bound != math.MaxInt32 || back.Sequence != 30 || cp.Bound != back.Bound {
		t.Errorf("the checkpoint is %+v, and was told to be %+v", back, cp)
	}
}
