package ops

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/internal/dsn"
	"outbox-relay/internal/progress"
	"outbox-relay/outbox"
	"outbox-relay/relay"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// Admin is what the commands of an operator work with. Each command is a method
// that opens a connection of its own, ends when ctx does, and returns an error
// where the program is to exit with 1.
type Admin struct {
	Postgres func() (string, error) // the URL
	Table    outbox.Table
	Sink     sink.Config
	HTTP     string // where the relay of this machine serves; empty: it does not
	In       io.Reader
	Out      io.Writer // results
	Err      io.Writer // progress, and questions
}

// ErrUsage says that a command was asked for in a way that makes no sense: the
// program exits with 2.
var ErrUsage = errors.New("usage")

// errRecovery says that the server is a standby.
var errRecovery = errors.New("the server is in recovery: this needs the primary (several hosts? add target_session_attrs=read-write to OUTBOX_POSTGRES_URL)")

// connect opens a connection to the primary, with further settings.
func (a Admin) connect(ctx context.Context, settings map[string]string) (*pgx.Conn, error) {
	url, err := a.Postgres()
	if err != nil {
		return nil, err
	}
	config, err := dsn.Parse(url)
	if err != nil {
		return nil, fmt.Errorf("OUTBOX_POSTGRES_URL %w", err)
	}
	for name, value := range map[string]string{
		"application_name": "outbox-relay command", "TimeZone": "UTC", "DateStyle": "ISO, MDY",
		"lock_timeout": "10s", "synchronous_commit": "on", "default_transaction_isolation": "read committed",
	} {
		config.RuntimeParams[name] = value
	}
	for name, value := range settings {
		config.RuntimeParams[name] = value
	}
	config.DialFunc, config.ConnectTimeout = replication.Dial, cmp.Or(config.ConnectTimeout, replication.ConnectTimeout)
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, relay.ExplainConnect(err)
	}
	if err := a.check(ctx, conn); err != nil {
		hangUp(conn)
		return nil, explain(err)
	}
	return conn, nil
}

// check makes sure that the server is one that the commands can ask.
func (a Admin) check(ctx context.Context, conn *pgx.Conn) error {
	var recovery, table bool
	err := conn.QueryRow(ctx, `select pg_catalog.pg_is_in_recovery(), pg_catalog.to_regclass($1) is not null`, a.Table.String()).Scan(&recovery, &table)
	switch {
	case err != nil:
		return fmt.Errorf("look for table %s: %w", a.Table, err)
	case recovery:
		return errRecovery
	case !table:
		return a.Table.Absent(ctx, conn)
	}
	return cmp.Or(a.Table.CheckOwnTables(ctx, conn), a.Table.CheckRowSecurity(ctx, conn))
}

func hangUp(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = conn.Close(ctx)
}

// use lends a connection to do, and explains its error.
func (a Admin) use(ctx context.Context, settings map[string]string, do func(conn *pgx.Conn) error) error {
	conn, err := a.connect(ctx, settings)
	if err != nil {
		return err
	}
	defer hangUp(conn)
	return a.explainGrants(ctx, conn, do(conn))
}

// explainGrants is explain of an error of a command, which names the rights that the role
// lacks.
func (a Admin) explainGrants(ctx context.Context, conn *pgx.Conn, err error) error {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == "42501" {
		missing, _, asked := a.Table.MissingGrants(ctx, conn, outbox.Uses{Retries: true})
		if asked == nil && len(missing) > 0 {
			return fmt.Errorf("%w: the owner of the table gives what the role lacks: %s", err, strings.Join(missing, "; "))
		}
	}
	return explain(err)
}

// explain adds what to do where Postgres refuses.
func explain(err error) error {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return err
	}
	switch pgErr.Code {
	case "42501": // insufficient_privilege
		return fmt.Errorf("%w: deploy/postgres/roles.sql has the grants of each command; or use the role that owns the table", err)
	case "55P03": // lock_not_available
		return fmt.Errorf("%w: the application holds it locked; try again when its transaction has ended", err)
	case "42883": // undefined_function
		return fmt.Errorf("%w: run `outbox-relay migrate` of this release", err)
	}
	return err
}

var errNobody = errors.New("nobody can be asked here: say --yes, or look first with --dry-run")

// confirm asks a question on a terminal; elsewhere the answer has to be given
// beforehand, by --yes.
func (a Admin) confirm(ctx context.Context, question string) error {
	if !progress.IsTerminal(a.In) {
		return errNobody
	}
	fmt.Fprintf(a.Err, "%s [y/N] ", question)
	answered := make(chan string, 1)
	go func() { // ends with the program, where ctx ends first
		line, _ := bufio.NewReader(a.In).ReadString('\n') // without an end: nobody is there
		answered <- line
	}()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case answer := <-answered:
		switch strings.ToLower(strings.TrimSpace(answer)) {
		case "y", "yes":
			return nil
		}
		if answer == "" {
			return errNobody
		}
		return errors.New("nothing was done")
	}
}
