package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/internal/dsn"
	"outbox-relay/internal/fault"
	"outbox-relay/replication"
)

// postgres returns where Postgres is: asked anew for each connection, since a
// password can be rotated.
func (r *Relay) postgres() (*pgx.ConnConfig, error) {
	url, err := r.config.Postgres()
	if err != nil {
		return nil, &configError{err}
	}
	config, err := dsn.Parse(url)
	if err != nil {
		return nil, &configError{fmt.Errorf("OUTBOX_POSTGRES_URL %w", err)}
	}
	return config, nil
}

// sqlConfig is that of a connection for SQL, pinned to what the relay expects,
// whatever the defaults of role and database are. It has further settings, which are
// set once it is connected, so that no pooler has to know them.
//
// Statements are planned for the batch that they get. From the sixth on Postgres may
// take a plan for any, which believes a batch to be ten rows
// (src/backend/utils/cache/plancache.c, choose_custom_plan).
func (r *Relay) sqlConfig(application string, settings map[string]string) (*pgx.ConnConfig, error) {
	config, err := r.postgres()
	if err != nil {
		return nil, err
	}
	for name, value := range map[string]string{
		"application_name":              application,
		"lock_timeout":                  "0",
		"statement_timeout":             "0",
		"default_transaction_isolation": "read committed",
		"synchronous_commit":            "on",
		"plan_cache_mode":               "force_custom_plan",
		"standard_conforming_strings":   "on",
		"client_min_messages":           "notice", // a commit that is only local is a warning
		"TimeZone":                      "UTC",
		"DateStyle":                     "ISO, MDY",
		"tcp_keepalives_idle":           "5", "tcp_keepalives_interval": "2", "tcp_keepalives_count": "3",
		"idle_session_timeout": "0", "idle_in_transaction_session_timeout": "0",
	} {
		config.RuntimeParams[name] = value
	}
	config.DialFunc, config.ConnectTimeout = replication.Dial, cmp.Or(config.ConnectTimeout, replication.ConnectTimeout)
	config.AfterConnect = func(ctx context.Context, conn *pgconn.PgConn) error {
		if err := replication.NoTransactionTimeout(ctx, conn); err != nil || len(settings) == 0 {
			return err
		}
		return set(ctx, conn, settings)
	}
	return config, nil
}

// set changes settings of the session, whose names and values need no quoting.
func set(ctx context.Context, conn *pgconn.PgConn, settings map[string]string) error {
	var calls []string
	for name, value := range settings {
		calls = append(calls, fmt.Sprintf("pg_catalog.set_config('%s', '%s', false)", name, value))
	}
	_, err := conn.Exec(ctx, "select "+strings.Join(calls, ", ")).ReadAll()
	return err
}

// ExplainConnect adds what to do where it isn't plain. Every command says the same of
// one cause.
func ExplainConnect(err error) error {
	f := &fault.Error{What: "connect to Postgres: " + err.Error(), Cause: err}
	var pgErr *pgconn.PgError
	errors.As(err, &pgErr)
	switch {
	case wrongPassword(err):
		f.Remedy = "check user and password in OUTBOX_POSTGRES_URL, and pg_hba.conf"
	case wrongCertificate(err):
		f.Remedy = "check sslmode, sslrootcert and the host in OUTBOX_POSTGRES_URL"
	case certificateRefused(err):
		f.Remedy = "check sslcert and sslkey in OUTBOX_POSTGRES_URL, and ssl_ca_file at the server"
	case insecure(err):
		f.Remedy = "set ssl at the server, or check sslmode, channel_binding and sslcertmode in OUTBOX_POSTGRES_URL"
	case pgErr == nil:
		f.Remedy = "start it, or correct OUTBOX_POSTGRES_URL"
	case pgErr.Code == "08P01":
		f.Remedy = "is OUTBOX_POSTGRES_URL that of a connection pooler? The relay needs the server itself"
	case pgErr.Code == "3D000":
		f.Remedy = "create the database, or correct OUTBOX_POSTGRES_URL"
	case pgErr.Code == "42501":
		f.Remedy, f.SQL = letIn(err, pgErr)
	case pgErr.Code == "53300":
		f.Remedy = "raise max_wal_senders or max_connections and restart Postgres, or end what uses them"
	}
	return f
}

// letIn says which right the role lacks for a connection: to the database, or to replicate.
// Amazon RDS gives the latter by membership in a role of its own, so that nobody but the
// server can tell whether a role has it.
func letIn(err error, refused *pgconn.PgError) (remedy, sql string) {
	var connect *pgconn.ConnectError
	if !errors.As(err, &connect) {
		return "", ""
	}
	role := pgx.Identifier{connect.Config.User}.Sanitize()
	if refused.Routine == "CheckMyDatabase" {
		sql = "GRANT CONNECT ON DATABASE " + pgx.Identifier{connect.Config.Database}.Sanitize() + " TO " + role
		return "let the role in: " + sql, sql
	}
	sql = "ALTER ROLE " + role + " REPLICATION"
	return "give the role the right to replicate: " + sql + " (Amazon RDS: GRANT rds_replication TO " + role + ")", sql
}
