package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/checkpoint"
	"outbox-relay/replication"
	"outbox-relay/replication/pace"
	"outbox-relay/sink"
)

// HaltError says that the relay stopped before an event that can never be
// stored, as OUTBOX_ON_REJECT=halt wants it.
type HaltError struct {
	ID     string
	Reason string
}

func (e *HaltError) Error() string {
	return "halted before event " + e.ID + ", which can never be stored: " + e.Reason +
		": raise the limit that it exceeds, or record it as failed and go on: `outbox-relay park " + e.ID + "`, or OUTBOX_ON_REJECT=park for all such events"
}

// passes reports whether waiting may mend the error: the relay then starts a
// new session. Everything else is fatal; above all what was read and not
// understood, which must never be skipped.
func passes(err error) bool {
	for _, passing := range []error{
		checkpoint.ErrSuperseded, checkpoint.ErrNotReplicated, replication.ErrSlotInUse, replication.ErrNoSlot, replication.ErrEnded, pace.ErrLost, errSlotFree,
		sink.ErrForgotten, sink.ErrStrangers, sink.ErrClosed, errRecovery, errTwoServers, errMissed, errSlotLost,
		io.EOF, io.ErrUnexpectedEOF, net.ErrClosed, os.ErrDeadlineExceeded, context.DeadlineExceeded,
		nats.ErrNoResponders, nats.ErrTimeout, nats.ErrDisconnected, nats.ErrConnectionClosed, nats.ErrConnectionReconnecting,
		nats.ErrReconnectBufExceeded, nats.ErrNoServers, nats.ErrStaleConnection, jetstream.ErrNoStreamResponse,
	} {
		if errors.Is(err, passing) {
			return true
		}
	}
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return passesInPostgres(pgErr.Code)
	}
	var network net.Error
	var api *jetstream.APIError
	var connect *pgconn.ConnectError
	switch {
	case errors.Is(err, sink.ErrStream): // whatever code the server gave it
		return false
	case errors.As(err, &network), errors.As(err, &connect):
		return true
	case errors.As(err, &api):
		return api.Code >= 500 // 503: not available for now
	}
	return pgconn.SafeToRetry(err)
}

// surroundings reports whether the error is about what surrounds the relay, and not about
// what it publishes: who may connect and do what, where the secrets are, whether
// replication and JetStream are switched on. Nothing of it is lost or sent twice while
// the relay waits until that is put right again. Fatal at the first start.
func surroundings(err error) bool {
	var refused *pgconn.ConnectError
	var pgErr *pgconn.PgError
	var config *configError
	return distrust(err) || errors.As(err, &config) || errors.Is(err, errWALLevel) || sink.Barred(err) ||
		errors.As(err, &refused) && errors.As(err, &pgErr) && !passesInPostgres(pgErr.Code) // no REPLICATION, no such database, one that is closed
}

// lacksRight reports whether the role lacks a right.
func lacksRight(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == "42501"
}

// configError says that a setting that is read again for each connection can't be used
// now: the file of a secret is being replaced.
type configError struct{ error }

func (e *configError) Unwrap() error { return e.error }

// passesInPostgres judges an SQLSTATE.
// Source: https://www.postgresql.org/docs/current/errcodes-appendix.html
func passesInPostgres(code string) bool {
	switch code {
	case "25P03", // idle in transaction session timeout
		"25P04", // transaction timeout
		"55006", // object in use: the slot is another relay's
		"55P03", // lock not available
		"57014", // query canceled
		"57P01", // admin shutdown: also pg_terminate_backend
		"57P02", // crash shutdown
		"57P03", // cannot connect now
		"57P05", // idle session timeout
		"25006": // read-only: a primary on its way to become one, or not any more
		return true
	}
	for _, class := range []string{
		"08", // connection exception
		"40", // transaction rollback
		"53", // insufficient resources
		"58", // system error: disk, I/O
	} {
		if strings.HasPrefix(code, class) {
			return true
		}
	}
	return false
}

// withGrants adds the remedy where Postgres says that the role lacks a right. What a
// function of the application's may not do is another's business: it is named.
func withGrants(err error) error {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Where != "" {
		return fmt.Errorf("%w, in %s", err, raisedIn(pgErr))
	}
	var connect *pgconn.ConnectError
	if lacksRight(err) && !errors.As(err, &connect) { // ExplainConnect has said it
		return fmt.Errorf("%w: grant the role what deploy/postgres/roles.sql does", err)
	}
	return err
}
