package sink_test

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"outbox-relay/internal/testenv"
	"outbox-relay/sink"
)

func connect(t *testing.T, url string, trust sink.TLS) (*sink.Client, error) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	client, err := sink.Connect(ctx, sink.Config{Servers: []string{url}, TLS: trust, InboxPrefix: "_INBOX_outbox",
		Stream: sink.StreamConfig{Name: "EVENTS", Create: true, Subjects: "events.*"}}, slog.New(slog.DiscardHandler))
	if err == nil {
		t.Cleanup(client.Close)
	}
	return client, err
}

func TestTLS(t *testing.T) {
	a := testenv.NewAuthority(t)
	certificate := a.Issue("server")
	a.Issue("client")
	for _, test := range []struct {
		name  string
		edit  func(*server.Options)
		trust sink.TLS
	}{
		{"required", func(*server.Options) {}, sink.TLS{CA: a.Path("ca.pem")}},
		{"handshake first", func(o *server.Options) { o.TLSHandshakeFirst = true }, sink.TLS{CA: a.Path("ca.pem"), First: true}},
		{"with a client certificate", func(o *server.Options) {
			o.TLSVerify = true
			o.TLSConfig.ClientAuth, o.TLSConfig.ClientCAs = tls.RequireAndVerifyClientCert, a.Pool()
		}, sink.TLS{CA: a.Path("ca.pem"), Cert: a.Path("client.pem"), Key: a.Path("client.key")}},
	} {
		t.Run(test.name, func(t *testing.T) {
			nats := testenv.NATS(t, testenv.NATSOptions{Edit: func(o *server.Options) {
				o.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate}}
				o.TLS, o.TLSTimeout = true, 5
				test.edit(o)
			}})
			url := strings.Replace(nats.URL(), "127.0.0.1", "localhost", 1)
			client, err := connect(t, url, test.trust)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := client.OpenStream(t.Context(), sink.StreamConfig{Name: "EVENTS", Create: true, Subjects: "events.*"}); err != nil {
				t.Fatal(err)
			}
			nats.Restart() // the handshake at a reconnect
			testenv.Eventually(t, "the client connected again", func() bool { return client.Reconnects() > 0 && client.Connected() })
		})
	}
}

// A connection that was to be secure never falls back to a plain one.
func TestTLSRefusesAPlainServer(t *testing.T) {
	plain := testenv.NATS(t, testenv.NATSOptions{})
	if _, err := connect(t, strings.Replace(plain.URL(), "nats://", "tls://", 1), sink.TLS{}); !errors.Is(err, nats.ErrSecureConnWanted) {
		t.Fatalf("got %v, want %v", err, nats.ErrSecureConnWanted)
	}
}

func TestTLSFaultsNameTheVariable(t *testing.T) {
	a := testenv.NewAuthority(t)
	certificate := a.Issue("server")
	secure := testenv.NATS(t, testenv.NATSOptions{Edit: func(o *server.Options) {
		o.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate}}
		o.TLS, o.TLSTimeout = true, 5
	}})
	for variable, trust := range map[string]sink.TLS{
		"OUTBOX_NATS_CA":   {CA: a.Path("none.pem")},
		"OUTBOX_NATS_CERT": {CA: a.Path("ca.pem"), Cert: a.Path("none.pem"), Key: a.Path("none.key")},
	} {
		_, err := connect(t, secure.URL(), trust)
		if err == nil || !strings.Contains(err.Error(), variable) {
			t.Errorf("got %v, want an error that names %s", err, variable)
		}
	}
	// An authority that we do not trust.
	if _, err := connect(t, secure.URL(), sink.TLS{CA: testenv.NewAuthority(t).Path("ca.pem")}); !errors.As(err, new(*tls.CertificateVerificationError)) {
		t.Errorf("got %v, want a certificate that is not verified", err)
	}
}
