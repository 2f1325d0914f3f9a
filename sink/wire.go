package sink

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	dialWait  = 5 * time.Second  // to connect, and for the TLS handshake
	writeWait = 10 * time.Second // for a server that takes no more bytes
	writeSize = 64 << 10         // publishes are written at the latest when they have so many bytes
	keepOut   = 1 << 20          // the largest buffer that is kept for the next ones
)

// wire dials the connections of the NATS client. They carry the protocol
// messages of two writers: those of the client, which does all but one thing,
// and the publishes of the chain. The client would make the headers of these
// from a map, which costs as much as everything else that the relay does to an
// event. Both write whole protocol messages only, and so can take turns.
//
// To write between them it must be the innermost part of the connection, above
// TLS; so the handshake is here, too.
type wire struct {
	life   context.Context // of the connection: none is made once it has ended
	trust  TLS
	secure bool            // without TLS no connection
	hosts  map[string]bool // of the configured servers
	name   string          // whose certificate a server shows that is known by its address only

	dialed atomic.Pointer[wireConn]
	live   atomic.Pointer[wireConn] // on which the client has introduced itself; nil: none
}

// TLS says whom to trust and who we are. The files are read for each connection.
type TLS struct {
	CA, Cert, Key string // paths
	First         bool   // the handshake comes before the server's INFO
}

func newWire(life context.Context, servers []string, trust TLS) *wire {
	w := &wire{life: life, trust: trust, hosts: map[string]bool{}, secure: trust != TLS{}}
	for _, server := range servers {
		scheme, rest, _ := strings.Cut(server, "://")
		w.secure = w.secure || scheme == "tls"
		host := rest[strings.LastIndexByte(rest, '@')+1:]
		if name, _, err := net.SplitHostPort(host); err == nil {
			host = name
		}
		w.hosts[host] = true
		if w.name == "" && net.ParseIP(host) == nil {
			w.name = host
		}
	}
	return w
}

// SkipTLSHandshake tells the client that Dial has done it.
func (w *wire) SkipTLSHandshake() bool { return true }

// Dial implements nats.CustomDialer.
func (w *wire) Dial(network, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: dialWait}).DialContext(w.life, network, address)
	if err != nil {
		return nil, err
	}
	c := &wireConn{Conn: conn}
	stop := context.AfterFunc(w.life, func() { _ = conn.Close() })
	defer stop()
	if err := w.open(c, address); err != nil {
		_ = conn.Close() // the handshake's error says more
		return nil, err
	}
	w.dialed.Store(c)
	return c, nil
}

// open reads the server's INFO, which comes first and is kept for the client,
// and secures the connection where one of the two sides wants it.
func (w *wire) open(c *wireConn, address string) error {
	if err := c.SetDeadline(time.Now().Add(dialWait)); err != nil {
		return err
	}
	if w.trust.First {
		if err := w.handshake(c, address); err != nil {
			return err
		}
		c.info = c.Conn
		return c.SetDeadline(time.Time{})
	}
	reader := bufio.NewReader(c.Conn)
	line, err := reader.ReadString('\n')
	if err != nil {
		return fmt.Errorf("read the server's INFO: %w", err)
	}
	var info struct {
		Required  bool `json:"tls_required"`
		Available bool `json:"tls_available"`
	}
	if text, ok := strings.CutPrefix(line, "INFO "); ok {
		err = json.Unmarshal([]byte(text), &info)
	}
	switch {
	case err != nil:
		return fmt.Errorf("read the server's INFO: %w", err)
	case info.Required || w.secure && info.Available:
		if err := w.handshake(c, address); err != nil {
			return err
		}
		c.info = io.MultiReader(strings.NewReader(line), c.Conn)
		return c.SetDeadline(time.Time{})
	case w.secure:
		return nats.ErrSecureConnWanted
	}
	c.info = io.MultiReader(strings.NewReader(line), reader)
	return c.SetDeadline(time.Time{})
}

// handshake puts TLS between the connection and its socket.
func (w *wire) handshake(c *wireConn, address string) error {
	config, err := w.trust.config(w.serverName(address))
	if err != nil {
		return err
	}
	secured := tls.Client(c.Conn, config)
	if err := secured.Handshake(); err != nil {
		return fmt.Errorf("%w: %w", nats.ErrTLS, err)
	}
	c.Conn = secured
	return nil
}

// serverName is the name that the server's certificate must bear. A server that
// others have made known by its address bears the name that we asked for.
func (w *wire) serverName(address string) string {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = address
	}
	if !w.hosts[host] && net.ParseIP(host) != nil && w.name != "" {
		return w.name
	}
	return host
}

// errTrust says that a file of TLS can't be used.
var errTrust = errors.New("TLS to NATS can't be set up")

func (t TLS) config(serverName string) (*tls.Config, error) {
	config := &tls.Config{ServerName: serverName, MinVersion: tls.VersionTLS12}
	if t.CA != "" {
		pem, err := os.ReadFile(t.CA)
		if err != nil {
			return nil, fmt.Errorf("%w: OUTBOX_NATS_CA: %w", errTrust, err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%w: OUTBOX_NATS_CA: %s holds no certificate in PEM", errTrust, t.CA)
		}
	}
	if t.Cert != "" {
		pair, err := tls.LoadX509KeyPair(t.Cert, t.Key)
		if err != nil {
			return nil, fmt.Errorf("%w: OUTBOX_NATS_CERT, OUTBOX_NATS_KEY: %w", errTrust, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// connected says that the client has introduced itself on the connection that
// was dialed last: publishes may follow.
func (w *wire) connected() { w.live.Store(w.dialed.Load()) }

func (w *wire) disconnected() { w.live.Store(nil) }

// publish adds a message to what the next flush writes.
func (w *wire) publish(b *builder, reply []byte, sequence uint64) error {
	c := w.live.Load()
	if c == nil {
		return nats.ErrDisconnected
	}
	return c.publish(b, reply, sequence)
}

// flush writes the publishes that wait.
func (w *wire) flush() error {
	c := w.live.Load()
	if c == nil {
		return nil // what waited is gone with its connection
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.flush()
}

// discard drops the publishes that wait.
func (w *wire) discard() {
	if c := w.live.Load(); c != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.out = c.out[:0]
	}
}

// wireConn is one connection. The client reads and writes, the chain publishes.
type wireConn struct {
	net.Conn           // the socket, or TLS over it
	info     io.Reader // INFO, which is read already, and what follows

	mu  sync.Mutex // taken by who writes
	out []byte     // publishes that wait
}

var errWireBroken = errors.New("the connection to NATS is broken")

func (c *wireConn) Read(p []byte) (int, error) { return c.info.Read(p) }

// Write writes what the client has to say.
func (c *wireConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.write(p)
}

// SetWriteDeadline does nothing: each write has a deadline of its own, and the
// client's could end in the middle of a publish.
func (c *wireConn) SetWriteDeadline(time.Time) error { return nil }

func (c *wireConn) publish(b *builder, reply []byte, sequence uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out = b.appendPublish(c.out, reply, sequence)
	if len(c.out) >= writeSize {
		return c.flush()
	}
	return nil
}

// flush writes what waits. c.mu is held.
func (c *wireConn) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	_, err := c.write(c.out)
	c.out = c.out[:0]
	if cap(c.out) > keepOut {
		c.out = nil
	}
	return err
}

// write writes all of p or ends the connection: nothing can follow half a
// protocol message. c.mu is held.
func (c *wireConn) write(p []byte) (int, error) {
	if err := c.Conn.SetWriteDeadline(time.Now().Add(writeWait)); err != nil {
		return 0, fmt.Errorf("%w: %w", errWireBroken, err)
	}
	n, err := c.Conn.Write(p)
	if err != nil {
		_ = c.Close() // its reader tells the client
		return n, fmt.Errorf("%w: %w", errWireBroken, err)
	}
	return n, nil
}
