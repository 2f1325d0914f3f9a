package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/checkpoint"
	"outbox-relay/decoder"
	"outbox-relay/internal/fault"
	"outbox-relay/replication"
	"outbox-relay/replication/pace"
	"outbox-relay/sink"
)

func postgresError(code string) error { return &pgconn.PgError{Code: code} }

// What can pass is waited for; what was read and not understood, or cannot be
// mended by waiting, ends the relay. Errors come wrapped.
func TestWhatPasses(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		want bool
	}{
		{"superseded", checkpoint.ErrSuperseded, true},
		{"commit only local", checkpoint.ErrNotReplicated, true},
		{"slot in use", fmt.Errorf("%w: %w", replication.ErrSlotInUse, postgresError("55006")), true},
		{"slot made by another", fmt.Errorf("%w: %w", replication.ErrSlotInUse, postgresError("42710")), true},
		{"no slot any more", replication.ErrNoSlot, true}, // it is made anew
		{"server shuts down", replication.ErrEnded, true},
		{"connection found broken", pace.ErrLost, true},
		{"broker forgot", sink.ErrForgotten, true},
		{"connection refused", &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, true},
		{"connection reset", &net.OpError{Op: "read", Err: syscall.ECONNRESET}, true},
		{"name not resolved", &net.DNSError{Err: "no such host"}, true},
		{"cut", io.ErrUnexpectedEOF, true},
		{"deadline", context.DeadlineExceeded, true},
		{"no responders", nats.ErrNoResponders, true},
		{"JetStream 503", &jetstream.APIError{Code: 503, ErrorCode: 10008}, true},
		{"admin shutdown", postgresError("57P01"), true},
		{"starting up", postgresError("57P03"), true},
		{"read only", postgresError("25006"), true},
		{"deadlock", postgresError("40P01"), true},
		{"serialization", postgresError("40001"), true},
		{"too many connections", postgresError("53300"), true},
		{"disk full", postgresError("53100"), true},
		{"I/O", postgresError("58030"), true},
		{"lock timeout", postgresError("55P03"), true},
		{"idle in transaction", postgresError("25P03"), true},
		{"transaction timeout", postgresError("25P04"), true},

		{"malformed", decoder.ErrMalformed, false},
		{"malformed, since it ended", fmt.Errorf("%w: %s", decoder.ErrMalformed, io.EOF), false},
		{"publication", replication.ErrPublication, false},
		{"publication's state", &fault.Error{}, false},
		{"halted", &HaltError{}, false},
		{"stream", sink.ErrStream, false},
		{"stream, whatever its code", fmt.Errorf("%w: %w", sink.ErrStream, &jetstream.APIError{Code: 500, ErrorCode: 10074}), false},
		{"ambiguous", &sink.AmbiguousError{}, false},
		{"no checkpoint", checkpoint.ErrNone, false},
		{"JetStream 404", &jetstream.APIError{Code: 404, ErrorCode: 10059}, false},
		{"missing table", postgresError("42P01"), false},
		{"missing column", postgresError("42703"), false},
		{"no privilege", postgresError("42501"), false},
		{"wrong password", postgresError("28P01"), false},
		{"no such database", postgresError("3D000"), false},
		{"bad prerequisite", postgresError("55000"), false},
		{"constraint", postgresError("23514"), false},
		{"bug", postgresError("XX000"), false},
		{"anything else", errors.New("something"), false},
	} {
		for depth, err := range []error{c.err, fmt.Errorf("read from slot: %w", c.err), errors.Join(c.err, errors.New("closed"))} {
			if got := passes(err); got != c.want {
				t.Errorf("%s, wrapped in way %d: passes %v", c.name, depth, got)
			}
		}
	}
}

// A wrong password is fatal at start; once the relay has streamed it is a
// password that is being rotated.
func TestWrongPassword(t *testing.T) {
	for _, code := range []string{"28P01", "28000"} {
		err := fmt.Errorf("connect: %w", postgresError(code))
		if r := (&Relay{}); !r.fatal(err) {
			t.Errorf("%s at start: not fatal", code)
		}
		if r := (&Relay{streamed: true}); r.fatal(err) {
			t.Errorf("%s later: fatal", code)
		}
	}
	if r := (&Relay{streamed: true}); !r.fatal(decoder.ErrMalformed) || r.fatal(io.EOF) || r.fatal(context.Canceled) {
		t.Error("having streamed changes what else is fatal")
	}
}

// A successor asks for the slot at an even pace; everything else is asked for
// ever more rarely, and never all at once.
func TestRetryDelay(t *testing.T) {
	for _, attempt := range []int{0, 1, 50} {
		if got := retryDelay(fmt.Errorf("start: %w", replication.ErrSlotInUse), attempt); got > time.Second {
			t.Errorf("attempt %d for a slot in use waits %s", attempt, got)
		}
		whole := sink.Backoff(attempt)
		for range 100 {
			if got := retryDelay(io.EOF, attempt); got < whole/2 || got > whole {
				t.Fatalf("attempt %d waits %s, want between %s and %s", attempt, got, whole/2, whole)
			}
		}
	}
	if sink.Backoff(0) > time.Second || sink.Backoff(1000) != 5*time.Second {
		t.Errorf("backs off from %s to %s", sink.Backoff(0), sink.Backoff(1000))
	}
}
