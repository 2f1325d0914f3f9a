// Package dsn reads OUTBOX_POSTGRES_URL. It is the only place that parses it, so that
// every command takes and refuses the same, in the same words. No error shows a part of
// the password.
package dsn

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// ErrAttributes says that a server is not what target_session_attrs asks for,
// which it can become.
var ErrAttributes = errors.New("not what target_session_attrs in OUTBOX_POSTGRES_URL asks for")

// Parse reads a URL or a keyword/value string. RuntimeParams of what it returns has
// settings of Postgres only, each under the name that Postgres gives it, and text is in
// UTF-8, whatever the encoding of the database.
//
// An error says what is wrong as far as that shows nothing of the password: pgx blanks
// it out of its errors, but at best effort (a password with an unescaped space, slash or
// quote partly stays).
func Parse(s string) (*pgx.ConnConfig, error) {
	if strayCredentials(s) {
		return nil, errors.New("has an @ outside the user information, so a part of the password may stand as host, database or parameter: write special characters as %XX (@ as %40, / as %2F)")
	}
	// pgx takes these out of RuntimeParams; pgconn, which it builds on, leaves them in.
	base, err := pgconn.ParseConfig(s)
	if err != nil {
		return nil, unusable(s, err)
	}
	settings, err := check(s, base.RuntimeParams)
	if err != nil {
		return nil, err
	}
	config, err := pgx.ParseConfig(s)
	if err != nil {
		return nil, unusable(s, err)
	}
	settings["client_encoding"] = "UTF8" // else text is in the database's encoding
	config.RuntimeParams = settings
	nameAttributes(config)
	return config, nil
}

func unusable(s string, err error) error {
	problem := "is not a usable connection string"
	_, detail, found := strings.Cut(err.Error(), "`: ")
	if found && !strings.ContainsAny(detail, "`\"") && !echoes(detail, s) {
		problem += ": " + detail
	}
	return errors.New(problem + "; write postgres://user:password@host:5432/database, special characters as %XX, or host=… dbname=…, a value with spaces in single quotes")
}

// ignored are parameters of libpq that ask for nothing that the relay does not do by
// itself, or that it has no use for. Those that ask for more security than it would then
// have (gssencmode=require, sslcrl, requirepeer and others) are not among them.
// Source: https://www.postgresql.org/docs/18/libpq-connect.html#LIBPQ-PARAMKEYWORDS
var ignored = []string{
	"fallback_application_name", "gssdelegation", "gssencmode", "gsslib", "keepalives", "keepalives_count", "keepalives_idle",
	"keepalives_interval", "load_balance_hosts", "replication", "sslcompression", "tcp_user_timeout",
}

// others are parameters of ORMs, drivers and poolers, and those of libpq that can't be
// obeyed: what to do instead of them. Their names are public, so that they are shown even
// where they might be a part of the password.
var others = map[string]string{
	"connection_limit": "", "default_query_exec_mode": "", "description_cache_capacity": "", "pgbouncer": "", "pool_max_conns": "",
	"pool_min_conns": "", "pool_size": "", "pool_timeout": "", "prepared_statements": "", "socket_timeout": "",
	"statement_cache_capacity": "", "statement_cache_size": "",
	"currentSchema": "name the schema in OUTBOX_TABLE", "schema": "name the schema in OUTBOX_TABLE",
	"gssencmode": "GSS encryption is not supported, use sslmode", "hostaddr": "write the address as the host",
	"sslaccept": "use sslmode", "requirepeer": "", "sslcrl": "", "sslcrldir": "", "ssl_min_protocol_version": "", "ssl_max_protocol_version": "",
}

//go:embed settings.txt
var settingsText string

// settings are those of Postgres 15 to 18 that a session can begin with, by their names
// in lower case: Postgres does not mind their case.
var settings = func() map[string]string {
	names := map[string]string{"options": "options"}
	for name := range strings.FieldsSeq(settingsText) {
		names[strings.ToLower(name)] = name
	}
	return names
}()

// custom are the names of settings that an extension or the application defines.
var custom = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)+$`)

// check returns the settings of Postgres among the parameters of s.
func check(s string, parameters map[string]string) (map[string]string, error) {
	kept := map[string]string{}
	for name, value := range parameters {
		setting, known := settings[strings.ToLower(name)]
		switch {
		case known:
			kept[setting] = value
		case custom.MatchString(name):
			kept[name] = value
		case slices.Contains(ignored, name) && !(name == "gssencmode" && value == "require"):
		default:
			return nil, unknown(s, name)
		}
	}
	return kept, nil
}

func unknown(s, name string) error {
	instead, public := others[name]
	switch {
	case instead != "":
		return fmt.Errorf("has parameter %s, which the relay can't obey: take it out (%s)", name, instead)
	case public:
		return fmt.Errorf("has parameter %s, which the relay can't obey: take it out", name)
	case echoes(name, s):
		return errors.New("has a parameter that is no setting of Postgres and may be a part of the password, so that it is not shown: take it out, or write special characters of the password as %XX in a URL, and put it in single quotes elsewhere")
	}
	return fmt.Errorf("has parameter %s, which is no setting of Postgres 15 to 18: take it out; a setting of a newer one goes into options (-c %s=…)", name, name)
}

// nameAttributes gives the error about target_session_attrs its type.
func nameAttributes(config *pgx.ConnConfig) {
	validate := config.ValidateConnect
	if validate == nil {
		return
	}
	config.ValidateConnect = func(ctx context.Context, conn *pgconn.PgConn) error {
		err := validate(ctx, conn)
		if _, preferred := err.(*pgconn.NotPreferredError); err == nil || preferred {
			return err // the driver asks for this very type
		}
		return fmt.Errorf("%w: %w", ErrAttributes, err)
	}
}
