package chaos

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/testenv"
)

// The faults after which the relay publishes rows from the table.

// healing tells whether the rows, and the stream, tell what a lost slot has not
// brought.
func healing(p plan) bool    { return tells(p) && notConsumed(p) }
func tells(p plan) bool      { return p.after != "keep" }
func notDeleted(p plan) bool { return p.after != "delete" }

var tableFaults = []fault{
	{name: "slot dropped with the relay killed", on: relay | postgres | slot, fits: healing, prepare: (*season).settleBefore, strike: dropSlot},
	{name: "slot invalidated", slow: true, on: relay | postgres | slot, fits: healing, prepare: (*season).settleBefore, strike: invalidateSlot},
	{name: "publication made again", on: relay | postgres, fits: tells, strike: makePublicationAgain},
	{name: "failed rows retried", on: relay | postgres, prepare: (*season).reject, strike: retryRows},
	{name: "rows replayed", on: relay | postgres, fits: notDeleted, strike: replayRows},
}

// settleBefore waits until nothing is needed any more that a lost slot takes with
// it: replays that were asked for, and messages that have left the stream.
func (s *season) settleBefore() {
	s.Helper()
	for _, id := range s.replays {
		s.awaitArrival(id, true)
	}
	s.replays = nil
	s.awaitWitness()
	first := s.stream().State.FirstSeq
	s.await("the checkpoint to pass what has left the stream", func() bool {
		var passed bool
		s.query(func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, `select stream_sequence + 1 >= $1 from outbox_relay_checkpoints where slot = $2`, int64(first), s.slot).Scan(&passed)
		})
		return passed
	})
}

// dropSlot drops the slot while no relay runs, and lets events come past it.
func dropSlot(s *season) injury {
	s.Helper()
	back := s.leaveSlot()
	s.dropLeft()
	return injury{s.between(0, 2000), func() {
		s.Helper()
		s.healHarassed(back)()
		if s.again > 1 && s.retention == kept && s.random.IntN(3) == 0 { // while it may still heal
			back = s.leaveSlot()
			s.dropLeft()
			s.healHarassed(back)()
		}
	}}
}

// dropLeft drops the slot that nobody has.
func (s *season) dropLeft() {
	s.Helper()
	s.query(func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = $1`, s.slot)
		return err
	})
	s.sampler.next()
}

// leaveSlot kills all relays and waits until nobody has the slot.
func (s *season) leaveSlot() (back func()) {
	s.Helper()
	back = s.killRelays()
	testenv.Eventually(s.T, "nobody at the slot", func() bool {
		active := 0
		s.query(func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, `select count(pg_terminate_backend(active_pid)) from pg_replication_slots where slot_name = $1 and active`, s.slot).Scan(&active)
		})
		return active == 0
	})
	s.sampleOnce()
	return back
}

// healHarassed starts the relays, and strikes again while they heal.
func (s *season) healHarassed(back func()) (mend func()) {
	return func() {
		s.Helper()
		back()
		s.harass(s.random.IntN(s.again+1), relay|postgres)
	}
}

// walKept is what slots may hold back, in segments of 16 MiB: more than the
// oracle needs, which is read again and again.
const walKept = 4

// invalidateSlot has Postgres take the slot's WAL away while no relay runs. What
// the oracle needs of it has been read before.
func invalidateSlot(s *season) injury {
	s.Helper()
	back := s.leaveSlot()
	testenv.Eventually(s.T, "the oracle to be far before the slot", func() bool {
		var ahead bool
		s.once(func(ctx context.Context, conn *pgx.Conn) error {
			for _, sql := range []string{`select pg_logical_emit_message(false, 'chaos', 'a record')`, `select pg_switch_wal()`, `checkpoint`} {
				if _, err := conn.Exec(ctx, sql); err != nil {
					return err
				}
			}
			if err := s.oracle.read(ctx, conn); err != nil {
				return err
			}
			return conn.QueryRow(ctx, `select
				(select pg_current_wal_lsn() - restart_lsn < 2 * $3::numeric from pg_replication_slots where slot_name = $1) and
				(select pg_current_wal_lsn() - restart_lsn > ($4 + 2) * $3::numeric from pg_replication_slots where slot_name = $2)`,
				s.oracle.slot, s.slot, 16<<20, walKept).Scan(&ahead)
		})
		return ahead
	})
	s.once(func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, fmt.Sprintf(`alter system set max_slot_wal_keep_size = '%dMB'`, walKept*16))
		return err
	})
	testenv.Eventually(s.T, "the slot invalidated", func() bool {
		var lost bool
		s.once(func(ctx context.Context, conn *pgx.Conn) error {
			for _, sql := range []string{`select pg_reload_conf()`, `checkpoint`} {
				if _, err := conn.Exec(ctx, sql); err != nil {
					return err
				}
			}
			return conn.QueryRow(ctx, `select wal_status = 'lost' from pg_replication_slots where slot_name = $1`, s.slot).Scan(&lost)
		})
		return lost
	})
	s.once(func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `alter system reset max_slot_wal_keep_size`)
		if err == nil {
			_, err = conn.Exec(ctx, `select pg_reload_conf()`)
		}
		return err
	})
	s.sampler.next()
	return injury{s.between(0, 1000), s.healHarassed(back)}
}

// once uses the season's connection, once that works, for what must not be done
// twice.
func (s *season) once(use func(context.Context, *pgx.Conn) error) {
	s.Helper()
	s.query(func(ctx context.Context, conn *pgx.Conn) error { return conn.Ping(ctx) })
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute) // the oracle decodes what may be much
	defer cancel()
	s.must(s.attempt(ctx, use))
}

// inTransaction does something in a transaction in which events are inserted
// before and behind.
func (s *season) inTransaction(do func(context.Context, pgx.Tx) error) {
	s.Helper()
	s.once(func(ctx context.Context, conn *pgx.Conn) error {
		return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if _, err := insertEvents(ctx, tx, 3, `{"around": "before"}`); err != nil {
				return err
			}
			if err := do(ctx, tx); err != nil {
				return err
			}
			_, err := insertEvents(ctx, tx, 3, `{"around": "behind"}`)
			return err
		})
	})
}

// makePublicationAgain takes the table out of the publication and puts it back,
// with inserts between that come past the slot.
func makePublicationAgain(s *season) injury {
	s.Helper()
	passOver(s)
	return injury{0, func() { s.harass(s.random.IntN(s.again+1), relay|postgres) }}
}

func passOver(s *season) injury {
	s.Helper()
	var one gap
	s.inTransaction(func(ctx context.Context, tx pgx.Tx) (err error) {
		var columns string
		err = tx.QueryRow(ctx, `select string_agg(quote_ident(name), ', ') from pg_publication_tables, unnest(attnames) as name
			where pubname = 'outbox_relay'`).Scan(&columns)
		if err != nil {
			return err
		}
		if one.from, err = insertLSN(ctx, tx); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `alter publication outbox_relay drop table events`); err != nil {
			return err
		}
		if _, err := insertEvents(ctx, tx, 1+s.random.IntN(500), `{"unpublished": true}`); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `alter publication outbox_relay add table events (`+columns+`)`); err != nil {
			return err
		}
		one.to, err = insertLSN(ctx, tx)
		return err
	})
	s.gaps = append(s.gaps, one)
	return injury{}
}

func insertLSN(ctx context.Context, tx pgx.Tx) (pglogrepl.LSN, error) {
	var text string
	if err := tx.QueryRow(ctx, `select pg_current_wal_insert_lsn()::text`).Scan(&text); err != nil {
		return 0, err
	}
	return pglogrepl.ParseLSN(text)
}

// illegalHeaders are what no message can carry.
const illegalHeaders = `{"content-type": "no"}`

// reject inserts events that fail, and waits until they have.
func (s *season) reject() {
	s.Helper()
	var ids []string
	n := 1 + s.random.IntN(40)
	if s.random.IntN(4) == 0 {
		n = 1500
	}
	s.inTransaction(func(ctx context.Context, tx pgx.Tx) (err error) {
		rows, err := tx.Query(ctx, `insert into events (aggregate_type, event_type, payload, headers)
			select 'order', 'rejected', jsonb_build_object('n', i), $2 from generate_series(1, $1) i returning id`, n, illegalHeaders)
		if err == nil {
			ids, err = pgx.CollectRows(rows, pgx.RowTo[string])
		}
		return err
	})
	s.await("rows that have failed", func() bool {
		return s.count(`select count(*) from events where id = any ($1) and status = 'failed'`, ids) == n
	})
}

func (s *season) count(sql string, args ...any) (n int) {
	s.Helper()
	s.query(func(ctx context.Context, conn *pgx.Conn) error { return conn.QueryRow(ctx, sql, args...).Scan(&n) })
	return n
}

// retryRows mends failed rows and asks for them again, for some while no relay
// runs, and for some that are not mended, which fail once more. The last are left
// to the season's end.
func retryRows(s *season) injury {
	s.Helper()
	back := func() {}
	if s.random.IntN(2) == 0 {
		back = s.killRelays()
	}
	retrySome(s)
	s.retry(0.9)
	return injury{0, s.healHarassed(back)}
}

func retrySome(s *season) injury {
	s.Helper()
	s.query(func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `update events set headers = null where status = 'failed' and random() < 0.9 and `+notHistory)
		return err
	})
	s.retry(0.5)
	return injury{}
}

// retry asks for failed rows again, each with that probability.
func (s *season) retry(share float64) {
	s.Helper()
	s.inTransaction(func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `select outbox_retry(variadic array(select id from events where status = 'failed' and random() < $1 and `+notHistory+`))`, share)
		return err
	})
}

// retryAll goes on until no row has failed.
func (s *season) retryAll() {
	s.Helper()
	for s.count(`select count(*) from events where status = 'failed' and `+notHistory) > 0 {
		s.query(func(ctx context.Context, conn *pgx.Conn) error {
			_, err := conn.Exec(ctx, `update events set headers = null where status = 'failed' and `+notHistory)
			return err
		})
		s.retry(1)
		s.awaitArrival(s.insertMarker(), false)
	}
}

// replayRows asks for rows once more, under a run of its own.
func replayRows(s *season) injury {
	s.Helper()
	back := func() {}
	if s.random.IntN(2) == 0 {
		back = s.killRelays()
	}
	s.runs++
	run := fmt.Sprintf("run%d", s.runs)
	s.inTransaction(func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `select id from events where headers is null and `+notHistory+` order by random() limit $1`, 1+s.random.IntN(3000))
		if err != nil {
			return err
		}
		ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		for part := range slices.Chunk(ids, 1000) {
			_, err := tx.Exec(ctx, `select outbox_relay_ask('events', json_build_object('replay', $1::text, 'ids', $2::text[])::text)`, run, part)
			if err != nil {
				return err
			}
			s.replays = append(s.replays, part[len(part)-1]+":"+run)
		}
		return nil
	})
	return injury{0, s.healHarassed(back)}
}

// harass strikes so many times while the relay publishes from the table: with
// what strikes quickly, and only there.
func (s *season) harass(times int, on part) {
	s.Helper()
	for range times {
		if s.random.IntN(4) == 0 && s.terminateReader() {
			s.further[readerTerminated]++
			continue
		}
		s.awaitMoment()
		f := s.quickFault(on)
		one := f.strike(s)
		time.Sleep(one.hold)
		if one.mend != nil {
			one.mend()
		}
		s.further[f.name]++
	}
}

const readerTerminated = "backfill's reader terminated"

// terminateReader ends the session in which the relay reads the table, if there
// is one in time.
func (s *season) terminateReader() bool {
	s.Helper()
	ended := 0
	for until := time.Now().Add(patience); ended == 0 && time.Now().Before(until); time.Sleep(time.Millisecond) {
		ended = s.count(`select count(pg_terminate_backend(pid)) from pg_stat_activity
			where application_name = 'outbox-relay backfill' and datname = current_database()`)
	}
	return ended > 0
}

// withinTable are the faults of the table that strike while others of them are got
// over.
var withinTable = []fault{
	{name: "publication made again", on: postgres, fits: tells, strike: passOver},
	{name: "failed rows retried", on: postgres, strike: retrySome},
	analyze, vacuum,
}

func (s *season) quickFault(on part) fault {
	var fit []fault
	for _, f := range slices.Concat(relayFaults, postgresFaults, brokerFaults, linkFaults(), withinTable) {
		if f.on&^on == 0 && !f.slow && (f.fits == nil || f.fits(s.plan)) {
			fit = append(fit, f)
		}
	}
	return fit[s.random.IntN(len(fit))]
}

// steps are what a relay says of its steps on the way to what it publishes from
// the table.
var steps = []string{"healing the outbox", "looked which pending rows stand in the stream", "creating the slot", "created the slot",
	"looking which pending rows", "matching the stream", "publishing the rows", "publishing from the table", "publishing the rest"}

// patience is how long a moment is waited for that may never come.
const patience = 5 * time.Second

// awaitMoment waits for a moment of the relay's work: a step of it, some messages,
// or any.
func (s *season) awaitMoment() {
	s.Helper()
	reached := func() bool { return false }
	limit := patience
	switch s.random.IntN(3) {
	case 0:
		step := steps[s.random.IntN(len(steps))]
		before := s.told(step)
		reached = func() bool { return s.told(step) > before }
	case 1:
		_, before := s.witness.progress()
		more := s.random.IntN(6000)
		reached = func() bool {
			_, now := s.witness.progress()
			return now > before+more
		}
	default:
		limit = s.between(0, 3000)
	}
	for until := time.Now().Add(limit); !reached() && time.Now().Before(until); time.Sleep(time.Millisecond) {
		s.requireAlive()
	}
	time.Sleep(s.between(0, 30))
}

// told is how often the relays that run have said something.
func (s *season) told(text string) (times int) {
	for _, st := range s.seats {
		times += strings.Count(st.relay.Logs(), text)
	}
	return times
}
