// Package sink puts events into a JetStream stream, each exactly once and in
// order: it sets the stream up, builds the messages, and publishes them in a
// chain in which the server refuses whatever is not the next one.
package sink

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/fault"
	"outbox-relay/internal/repeat"
	"outbox-relay/internal/wait"
)

// minServer is the oldest NATS server that the fault suite was run on, and the
// relay works with. A variable, so that the linker can lower it (-X), to try the
// suite on older ones.
var minServer = "2.10.27"

// Config says how to reach NATS and what the stream looks like.
type Config struct {
	Servers     []string // URLs
	Auth        Auth
	TLS         TLS
	Domain      string
	InboxPrefix string
	Stream      StreamConfig
	Message     MessageConfig
	MaxInflight int // messages sent and unacknowledged
	MaxBytes    int // their bytes
}

// Client is the connection to NATS. It reconnects for ever; what was in flight
// when it broke is settled by the chain. Safe for concurrent use.
type Client struct {
	config Config
	log    *slog.Logger
	auth   []nats.Option
	wire   *wire
	end    context.CancelFunc // of the life of the wire
	nc     *nats.Conn
	js     jetstream.JetStream
	api    string // prefix of the JetStream API

	chain      atomic.Pointer[Chain] // the one that runs
	reconnects atomic.Uint64
	denied     atomic.Pointer[string] // the last permissions violation

	away       *repeat.Cause // no connection
	reported   *repeat.Cause // what the client library reports by the way
	permission *repeat.Cause // NATS denies one
	publishing *repeat.Cause // the chains are interrupted
}

// Connect connects, waiting and retrying until ctx ends. A server that refuses
// the credentials is an error at once, and one that is too old.
func Connect(ctx context.Context, config Config, log *slog.Logger) (*Client, error) {
	life, end := context.WithCancel(context.WithoutCancel(ctx)) // ends with ctx now, and with Close later
	defer context.AfterFunc(ctx, end)()
	c := &Client{config: config, log: log, wire: newWire(life, config.Servers, config.TLS), end: end,
		away: repeat.New(log), reported: repeat.New(log), permission: repeat.New(log), publishing: repeat.First(log)}
	var err error
	if c.auth, err = config.Auth.options(); err != nil {
		end()
		return nil, err
	}
	if err := c.dial(ctx); err != nil {
		end()
		return nil, err
	}
	if err := c.checkServer(); err != nil {
		c.Close()
		return nil, err
	}
	c.api = "$JS.API."
	if config.Domain != "" {
		c.api = "$JS." + config.Domain + ".API."
		c.js, err = jetstream.NewWithDomain(c.nc, config.Domain)
	} else {
		c.js, err = jetstream.New(c.nc)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("set up JetStream: %w", err)
	}
	return c, nil
}

func (c *Client) options() []nats.Option {
	return append([]nats.Option{
		nats.Name("outbox-relay"),
		nats.MaxReconnects(-1),
		nats.CustomReconnectDelay(c.reconnectDelay),
		nats.ReconnectBufSize(-1), // a publish while disconnected fails: the chain sends again
		nats.IgnoreAuthErrorAbort(),
		nats.ReconnectOnFlusherError(),
		nats.PingInterval(5 * time.Second),
		nats.MaxPingsOutstanding(2),
		nats.CustomInboxPrefix(c.config.InboxPrefix),
		nats.SetCustomDialer(c.wire),
		nats.SkipHostLookup(), // the dialer does, and checks certificates by name
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			c.wire.disconnected()
			if err == nil {
				return // it was closed
			}
			c.away.Again("connection to NATS lost", "error", err)
			if chain := c.chain.Load(); chain != nil {
				chain.fail(fmt.Errorf("connection to NATS lost: %w", err))
			}
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) {
			c.wire.connected()
			c.reconnects.Add(1)
			c.reported.Forget()
			c.away.Over("connected to NATS again", "server", nc.ConnectedUrlRedacted())
			if chain := c.chain.Load(); chain != nil {
				chain.reconnected()
			}
		}),
		nats.ClosedHandler(func(*nats.Conn) {
			if chain := c.chain.Load(); chain != nil {
				chain.fail(c.closed())
			}
		}),
		nats.ErrorHandler(c.asyncError),
	}, c.auth...)
}

// reconnectDelay is the pause after each round of the servers. An nkey is read
// again here: its public half is part of the options, unlike other secrets,
// which the client asks for at each attempt. The client calls it from the
// goroutine that reconnects, which is the one that reads the options.
func (c *Client) reconnectDelay(int) time.Duration {
	if public, err := c.config.Auth.publicKey(); err == nil && public != "" && c.nc != nil {
		c.nc.Opts.Nkey = public
	}
	return 250*time.Millisecond + rand.N(250*time.Millisecond)
}

// asyncError hears what has no other way to be told: a publish that lacks
// permission gets no answer, and its subject is named only here.
func (c *Client) asyncError(_ *nats.Conn, _ *nats.Subscription, err error) {
	if errors.Is(err, nats.ErrPermissionViolation) {
		text := err.Error()
		c.denied.Store(&text)
		c.permission.Fault("NATS denies a permission", "error", err,
			"remedy", "grant it to the relay's user, as deploy/nats/permissions.conf does")
		return
	}
	c.reported.Again("NATS reports an error", "error", err)
	c.reported.Lapse("NATS reports no more errors")
}

func (c *Client) dial(ctx context.Context) error {
	for attempt := 0; ; attempt++ {
		nc, err := nats.Connect(strings.Join(c.config.Servers, ","), c.options()...)
		if err == nil {
			c.nc = nc
			c.wire.connected()
			c.away.Over("no longer waiting for NATS")
			c.log.Info("connected to NATS", "server", nc.ConnectedUrlRedacted(), "version", nc.ConnectedServerVersion())
			return nil
		}
		if remedy := remedy(err); remedy != "" {
			return &fault.Error{What: "connect to NATS: " + err.Error(), Cause: err, Remedy: remedy}
		}
		if permanent(err) {
			return fmt.Errorf("connect to NATS: %w", err)
		}
		unreached := &fault.Error{What: "connect to NATS: " + err.Error(), Remedy: "start it, or correct OUTBOX_NATS_URL"}
		c.away.Again("waiting for NATS", "error", err, "remedy", unreached.Remedy)
		if unreached.Cause = wait.For(ctx, Backoff(attempt)); unreached.Cause != nil {
			return unreached
		}
	}
}

// permanent tells configuration faults, which no waiting mends, from servers
// that can't be reached.
func permanent(err error) bool {
	for _, fault := range []error{nats.ErrNoServers, nats.ErrTimeout, nats.ErrStaleConnection, nats.ErrConnectionClosed,
		nats.ErrMaxConnectionsExceeded} {
		if errors.Is(err, fault) {
			return false
		}
	}
	return errors.Is(err, errTrust) || errors.Is(err, errSecret) || errors.Is(err, nats.ErrInvalidArg)
}

// remedy says what to do about a server that does not trust us, or that we do
// not; empty: it is something else.
func remedy(err error) string {
	var unverified *tls.CertificateVerificationError
	var plain tls.RecordHeaderError
	var network *net.OpError
	switch {
	case errors.Is(err, nats.ErrAuthorization), errors.Is(err, nats.ErrAuthExpired), errors.Is(err, nats.ErrAuthRevoked),
		errors.Is(err, nats.ErrAccountAuthExpired), errors.Is(err, nats.ErrNkeysNotSupported):
		return "check OUTBOX_NATS_CREDS, _NKEY, _USER and _PASSWORD, or _TOKEN"
	case errors.As(err, &unverified):
		return "check OUTBOX_NATS_CA, and the host in OUTBOX_NATS_URL"
	case errors.As(err, &plain):
		return "unset OUTBOX_NATS_TLS_FIRST, or set handshake_first at the server"
	case errors.Is(err, nats.ErrSecureConnWanted):
		return "set up TLS at the server, or unset OUTBOX_NATS_CA, _CERT and _KEY and write nats:// in OUTBOX_NATS_URL"
	case errors.As(err, &network) && network.Op == "remote error": // a TLS alert; crypto/tls does not export its type
		return "check OUTBOX_NATS_CERT and OUTBOX_NATS_KEY"
	}
	return ""
}

// Barred reports whether it is not the stream that keeps the relay from publishing, but
// the way to it: NATS does not trust the relay, or the other way round, a secret can't
// be read, or JetStream is switched off. All of these can be put right elsewhere.
func Barred(err error) bool {
	return err != nil && (errors.Is(err, errNoJetStream) || remedy(err) != "" || permanent(err))
}

func (c *Client) checkServer() error {
	version := c.nc.ConnectedServerVersion()
	has, err := parseVersion(version)
	if err != nil {
		return fmt.Errorf("read the NATS server's version: %w", err)
	}
	least, err := parseVersion(minServer)
	if err != nil {
		return err
	}
	if slices.Compare(has[:], least[:]) < 0 {
		return &fault.Error{What: "the NATS server is version " + version, Remedy: "the relay needs " + minServer + " or newer"}
	}
	if !c.nc.HeadersSupported() {
		return &fault.Error{What: "the NATS server does not support headers, which carry the ids", Remedy: "set no_header_support to false"}
	}
	return nil
}

// parseVersion reads "2.10.27", which may go on: "2.16.0-dev".
func parseVersion(text string) (version [3]int, err error) {
	if _, err = fmt.Sscanf(text, "%d.%d.%d", &version[0], &version[1], &version[2]); err != nil {
		err = fmt.Errorf("parse version %q: %w", text, err)
	}
	return version, err
}

// ErrClosed says that the client library has given the connection up, as it does after
// an error of the server that it does not know. A new Client is needed.
var ErrClosed = errors.New("the connection to NATS is closed")

// Closed reports whether the connection has ended for good.
func (c *Client) Closed() bool { return c.nc.IsClosed() }

// closed says why it has.
func (c *Client) closed() error {
	return fmt.Errorf("%w: %w", ErrClosed, cmp.Or(c.nc.LastError(), nats.ErrConnectionClosed))
}

// Connected reports whether the connection stands.
func (c *Client) Connected() bool { return c.nc.IsConnected() }

// Reconnects returns how often the connection was lost and regained.
func (c *Client) Reconnects() uint64 { return c.reconnects.Load() }

// Close closes the connection.
func (c *Client) Close() {
	c.nc.Close()
	c.end()
	for _, cause := range []*repeat.Cause{c.away, c.reported, c.permission, c.publishing} {
		cause.Forget()
	}
}

// Backoff is the pause before attempt n (from 0) of what can pass: 100 ms,
// doubling up to 5 s.
func Backoff(n int) time.Duration {
	return min(5*time.Second, 100*time.Millisecond<<min(n, 10))
}
