package sink_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"outbox-relay/internal/testenv"
	"outbox-relay/sink"
)

// authority issues certificates for a test; its files are what OUTBOX_NATS_CA,
// _CERT and _KEY name.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t, dir: t.TempDir()}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	a.key = a.newKey()
	der, err := x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key)
	a.must(err)
	a.cert, err = x509.ParseCertificate(der)
	a.must(err)
	a.write("ca.pem", "CERTIFICATE", der)
	return a
}

func (a *authority) must(err error) {
	a.t.Helper()
	if err != nil {
		a.t.Fatal(err)
	}
}

func (a *authority) newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	a.must(err)
	return key
}

func (a *authority) path(name string) string { return filepath.Join(a.dir, name) }

func (a *authority) write(name, kind string, der []byte) {
	a.must(os.WriteFile(a.path(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}

// issue writes name.pem and name.key: a certificate for localhost and
// 127.0.0.1, good for both sides.
func (a *authority) issue(name string) tls.Certificate {
	key := a.newKey()
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	a.must(err)
	private, err := x509.MarshalECPrivateKey(key)
	a.must(err)
	a.write(name+".pem", "CERTIFICATE", der)
	a.write(name+".key", "EC PRIVATE KEY", private)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// pool holds the authority's certificate.
func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

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
	a := newAuthority(t)
	certificate := a.issue("server")
	a.issue("client")
	for _, test := range []struct {
		name  string
		edit  func(*server.Options)
		trust sink.TLS
	}{
		{"required", func(*server.Options) {}, sink.TLS{CA: a.path("ca.pem")}},
		{"handshake first", func(o *server.Options) { o.TLSHandshakeFirst = true }, sink.TLS{CA: a.path("ca.pem"), First: true}},
		{"with a client certificate", func(o *server.Options) {
			o.TLSVerify = true
			o.TLSConfig.ClientAuth, o.TLSConfig.ClientCAs = tls.RequireAndVerifyClientCert, a.pool()
		}, sink.TLS{CA: a.path("ca.pem"), Cert: a.path("client.pem"), Key: a.path("client.key")}},
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
	a := newAuthority(t)
	certificate := a.issue("server")
	secure := testenv.NATS(t, testenv.NATSOptions{Edit: func(o *server.Options) {
		o.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate}}
		o.TLS, o.TLSTimeout = true, 5
	}})
	for variable, trust := range map[string]sink.TLS{
		"OUTBOX_NATS_CA":   {CA: a.path("none.pem")},
		"OUTBOX_NATS_CERT": {CA: a.path("ca.pem"), Cert: a.path("none.pem"), Key: a.path("none.key")},
	} {
		_, err := connect(t, secure.URL(), trust)
		if err == nil || !strings.Contains(err.Error(), variable) {
			t.Errorf("got %v, want an error that names %s", err, variable)
		}
	}
	// An authority that we do not trust.
	if _, err := connect(t, secure.URL(), sink.TLS{CA: newAuthority(t).path("ca.pem")}); !errors.As(err, new(*tls.CertificateVerificationError)) {
		t.Errorf("got %v, want a certificate that is not verified", err)
	}
}
