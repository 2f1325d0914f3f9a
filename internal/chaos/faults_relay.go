package chaos

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/pgserver"
)

var relayFaults = []fault{
	{name: "relay kill -9", on: relay, strike: func(s *season) injury {
		st := s.worker()
		st.relay.Kill()
		return injury{s.between(0, 1000), st.start}
	}},
	{name: "relay SIGTERM", on: relay, strike: func(s *season) injury {
		st := s.worker()
		st.terminate()
		return injury{s.between(0, 1000), st.start}
	}},
	{name: "relay frozen", on: relay, slow: true, strike: freezeRelay},
}

// freezeRelay freezes the relay that works for longer than wal_sender_timeout:
// Postgres gives the slot to another one, where there is one, before the frozen
// one wakes.
func freezeRelay(s *season) injury {
	st := s.worker()
	st.relay.Freeze()
	for until := time.Now().Add(20 * time.Second); len(s.seats) > 1 && time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		for _, other := range s.seats {
			if other != st && other.streaming() {
				return injury{s.between(0, 2000), st.relay.Thaw}
			}
		}
	}
	return injury{12 * time.Second, st.relay.Thaw}
}

var postgresFaults = []fault{
	{name: "Postgres stopped immediately", on: postgres, strike: func(s *season) injury { return s.stopPostgres(pgserver.Immediate) }},
	{name: "Postgres stopped fast", on: postgres, strike: func(s *season) injury { return s.stopPostgres(pgserver.Fast) }},
	{name: "Postgres kill -9", on: postgres, strike: func(s *season) injury {
		s.must(s.cluster.Kill())
		return injury{s.between(0, 2000), s.startPostgres}
	}},
	{name: "walsender terminated", on: postgres, strike: func(s *season) injury { return s.terminateBackend("outbox-relay") }},
	{name: "recorder terminated", on: postgres, strike: func(s *season) injury { return s.terminateBackend("outbox-relay recorder") }},
}

// stopLimit is how long a stop of Postgres may take, whatever its clients do.
const stopLimit = 30 * time.Second

func (s *season) stopPostgres(mode pgserver.Mode) injury {
	s.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), stopLimit)
	defer cancel()
	s.must(s.cluster.Stop(ctx, mode))
	return injury{s.between(0, 2000), s.startPostgres}
}

func (s *season) startPostgres() {
	s.Helper()
	s.must(s.cluster.Restart(context.Background()))
}

// terminateBackend ends the relays' sessions of that name.
func (s *season) terminateBackend(application string) injury {
	s.Helper()
	s.query(func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `select pg_terminate_backend(pid) from pg_stat_activity
			where application_name = $1 and datname = current_database()`, application)
		return err
	})
	return injury{}
}
