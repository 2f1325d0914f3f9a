package sink_test

import (
	"context"
	"crypto/tls"
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

// requireRefusal connects in vain, and wants the error to say these words.
func requireRefusal(t *testing.T, url string, trust sink.TLS, words ...string) {
	t.Helper()
	_, err := connect(t, url, trust)
	for _, word := range words {
		if err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("got %v, want an error that names %s", err, word)
		}
	}
}

// secured is a server with that certificate, by the name that it bears.
func secured(t *testing.T, certificate tls.Certificate, clients *testenv.Authority) string {
	return strings.Replace(testenv.NATS(t, testenv.NATSOptions{Edit: func(o *server.Options) {
		o.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate}}
		o.TLS, o.TLSTimeout = true, 5
		if clients != nil {
			o.TLSVerify = true
			o.TLSConfig.ClientAuth, o.TLSConfig.ClientCAs = tls.RequireAndVerifyClientCert, clients.Pool()
		}
	}}).URL(), "127.0.0.1", "localhost", 1)
}

// A connection that was to be secure never falls back to a plain one.
func TestTLSRefusesAPlainServer(t *testing.T) {
	plain := testenv.NATS(t, testenv.NATSOptions{}).URL()
	requireRefusal(t, strings.Replace(plain, "nats://", "tls://", 1), sink.TLS{}, nats.ErrSecureConnWanted.Error(), "OUTBOX_NATS_URL")
	requireRefusal(t, plain, sink.TLS{CA: testenv.NewAuthority(t).Path("ca.pem")}, nats.ErrSecureConnWanted.Error(), "OUTBOX_NATS_CA")
}

func TestTLSFaultsNameTheVariable(t *testing.T) {
	a, stranger := testenv.NewAuthority(t), testenv.NewAuthority(t)
	ca := sink.TLS{CA: a.Path("ca.pem")}
	url := secured(t, a.Issue("server"), nil)
	requireRefusal(t, url, sink.TLS{CA: a.Path("none.pem")}, "OUTBOX_NATS_CA", "no such file")
	requireRefusal(t, url, sink.TLS{CA: a.Path("server.key")}, "OUTBOX_NATS_CA", "no certificate in PEM")
	requireRefusal(t, url, sink.TLS{CA: ca.CA, Cert: a.Path("none.pem"), Key: a.Path("none.key")}, "OUTBOX_NATS_CERT", "OUTBOX_NATS_KEY")
	requireRefusal(t, url, sink.TLS{CA: stranger.Path("ca.pem")}, "unknown authority", "OUTBOX_NATS_CA")
	requireRefusal(t, url, sink.TLS{First: true, CA: ca.CA}, "OUTBOX_NATS_TLS_FIRST")
	requireRefusal(t, secured(t, a.Issue("expired", testenv.Expired), nil), ca, "expired", "OUTBOX_NATS_CA")
	requireRefusal(t, secured(t, a.Issue("elsewhere", testenv.ForAnotherHost), nil), ca, "elsewhere.example", "the host in OUTBOX_NATS_URL")
}

// What the server does not trust of us it refuses, and that is told.
func TestClientCertificateIsRefused(t *testing.T) {
	a, stranger := testenv.NewAuthority(t), testenv.NewAuthority(t)
	url := secured(t, a.Issue("server"), a)
	stranger.Issue("client")
	a.Issue("expired", testenv.Expired)
	requireRefusal(t, url, sink.TLS{CA: a.Path("ca.pem")}, "certificate required", "OUTBOX_NATS_CERT", "OUTBOX_NATS_KEY")
	for _, pair := range []struct {
		from *testenv.Authority
		name string
	}{{stranger, "client"}, {a, "expired"}} {
		requireRefusal(t, url, sink.TLS{CA: a.Path("ca.pem"), Cert: pair.from.Path(pair.name + ".pem"), Key: pair.from.Path(pair.name + ".key")},
			"tls:", "OUTBOX_NATS_CERT", "OUTBOX_NATS_KEY")
	}
}
