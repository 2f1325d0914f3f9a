package relay

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/fault"
	"outbox-relay/internal/pgversion"
)

// Server is what a relay asks of Postgres itself.
type Server struct {
	Version  int    // 150018 is 15.18
	Name     string // of the version
	WALLevel string
	Recovery bool // it is a standby
}

// errRecovery says that the server is a standby.
var errRecovery = errors.New("the server is in recovery")

// errWALLevel says that the server does not decode.
var errWALLevel = errors.New("wal_level is not logical")

const oldestPostgres = 15

func readServer(ctx context.Context, sql *pgx.Conn) (s Server, err error) {
	err = sql.QueryRow(ctx, `select current_setting('server_version_num')::int, current_setting('server_version'),
		current_setting('wal_level'), pg_catalog.pg_is_in_recovery()`).Scan(&s.Version, &s.Name, &s.WALLevel, &s.Recovery)
	if err != nil {
		return s, fmt.Errorf("ask Postgres for its version: %w", err)
	}
	return s, nil
}

// CheckVersion refuses a server that is too old.
func (s Server) CheckVersion() error {
	if s.Version >= oldestPostgres*10000 {
		return nil
	}
	return &fault.Error{What: fmt.Sprintf("the server is Postgres %d", s.Version/10000),
		Remedy: fmt.Sprintf("the relay needs %d or newer", oldestPostgres)}
}

// CheckRecovery refuses a standby.
func (s Server) CheckRecovery() error {
	if !s.Recovery {
		return nil
	}
	return &fault.Error{What: errRecovery.Error(), Cause: errRecovery,
		Remedy: "a relay reads from the primary (several hosts? add target_session_attrs=read-write to OUTBOX_POSTGRES_URL)"}
}

// CheckWALLevel refuses a server that does not decode.
func (s Server) CheckWALLevel() error {
	if pgversion.Decodes(s.Version, s.WALLevel) {
		return nil
	}
	const sql = "ALTER SYSTEM SET wal_level = 'logical'"
	return &fault.Error{What: fmt.Sprintf("wal_level is %q: the relay reads from logical decoding", s.WALLevel),
		Remedy: sql + ", then restart Postgres", SQL: sql, Cause: errWALLevel}
}
