package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/internal/dsn"
)

// distrust reports whether Postgres refuses the role or our certificate, or we
// refuse what it shows of itself: fatal at start, waited out later, since all of
// these can be rotated.
func distrust(err error) bool {
	return wrongPassword(err) || wrongCertificate(err) || certificateRefused(err) || insecure(err)
}

func wrongPassword(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && strings.HasPrefix(pgErr.Code, "28")
}

func wrongCertificate(err error) bool {
	var unverified *tls.CertificateVerificationError
	return errors.As(err, &unverified)
}

// certificateRefused reports whether the server ended the handshake: by a TLS
// alert, whose type crypto/tls does not export.
func certificateRefused(err error) bool {
	var network *net.OpError
	return errors.As(err, &network) && network.Op == "remote error"
}

// insecure reports whether a server has answered and it was the driver that
// would not go on with it, where no plain connection is allowed: the server
// offers no TLS, or not what channel_binding or sslcertmode ask for.
func insecure(err error) bool {
	var connect *pgconn.ConnectError
	if !errors.As(err, &connect) || mayBePlain(connect.Config) {
		return false
	}
	attempts := []error{connect.Unwrap()}
	if several, ok := connect.Unwrap().(interface{ Unwrap() []error }); ok {
		attempts = several.Unwrap()
	}
	return slices.ContainsFunc(attempts, refusedByDriver)
}

func mayBePlain(config *pgconn.Config) bool {
	return config.ChannelBinding != "require" && (config.TLSConfig == nil ||
		slices.ContainsFunc(config.Fallbacks, func(f *pgconn.FallbackConfig) bool { return f.TLSConfig == nil }))
}

// refusedByDriver reports whether an attempt failed for what the driver has no
// type for: neither network nor server did.
func refusedByDriver(err error) bool {
	var network net.Error
	var pgErr *pgconn.PgError
	return !errors.As(err, &network) && !errors.As(err, &pgErr) && !errors.Is(err, dsn.ErrAttributes) && !errors.Is(err, context.Canceled) &&
		!errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, net.ErrClosed)
}
