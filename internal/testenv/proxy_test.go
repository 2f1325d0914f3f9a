package testenv

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// pair is a connection through a proxy, with both its ends in the test's hands.
type pair struct {
	proxy          *Proxy
	client, server net.Conn
}

// newPair is a proxied connection over which a byte has gone each way.
func newPair(t *testing.T) pair {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	proxy := NewProxy(t, listener.Addr().String())
	client := dial(t, proxy)
	server, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	p := pair{proxy, client, server}
	p.carries(t, client, server)
	p.carries(t, server, client)
	return p
}

func dial(t *testing.T, p *Proxy) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return conn
}

func (pair) carries(t *testing.T, from, to net.Conn) {
	t.Helper()
	if _, err := from.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(to, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
}

// silent wants nothing to arrive for a while.
func silent(t *testing.T, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	defer conn.SetReadDeadline(time.Now().Add(patience))
	if n, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read %d bytes, %v; want silence", n, err)
	}
}

func wantReset(t *testing.T, conn net.Conn) {
	t.Helper()
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want a reset", err)
	}
}

// wantRefused wants a reset, in the handshake or soon after.
func wantRefused(t *testing.T, p *Proxy) {
	t.Helper()
	conn, err := net.Dial("tcp", p.Addr())
	if err == nil {
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		_, err = conn.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("new connection: %v, want a reset", err)
	}
}

func wantEOF(t *testing.T, conn net.Conn) {
	t.Helper()
	if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read: %v, want end of file", err)
	}
}

func TestProxyCarriesALotUnharmed(t *testing.T) {
	p := newPair(t)
	sent := bytes.Repeat([]byte("0123456789abcde"), 1<<18)
	go func() {
		p.client.Write(sent) // the reader notices an error
		p.client.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(p.server)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(sent), err)
	}
	p.carries(t, p.server, p.client) // the other direction is still open
	p.server.Close()
	wantEOF(t, p.client)
	Eventually(t, "the proxy to forget the connection", func() bool { return p.proxy.Connections() == 0 })
}

func TestProxyCut(t *testing.T) {
	p := newPair(t)
	p.proxy.Cut()
	wantReset(t, p.client)
	wantReset(t, p.server)
}

func TestProxyRefuse(t *testing.T) {
	p := newPair(t)
	p.proxy.Refuse(true)
	wantRefused(t, p.proxy)
	p.carries(t, p.client, p.server)
	p.proxy.Refuse(false)
	silent(t, dial(t, p.proxy))
}

func TestProxyWithoutServer(t *testing.T) {
	port := FreePort(t)
	p := NewProxy(t, (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}).String())
	wantRefused(t, p)
}

func TestProxyStall(t *testing.T) {
	p := newPair(t)
	p.proxy.Stall(true)
	p.client.Write([]byte("up"))
	p.server.Write([]byte("down"))
	silent(t, p.server)
	silent(t, p.client)
	p.proxy.StallDirection(Downstream, false)
	if _, err := io.ReadFull(p.client, make([]byte, 4)); err != nil {
		t.Error(err)
	}
	silent(t, p.server)
	p.proxy.Stall(false)
	if _, err := io.ReadFull(p.server, make([]byte, 2)); err != nil {
		t.Error(err)
	}
}

func TestProxyStallHoldsTheSenderBack(t *testing.T) {
	p := newPair(t)
	p.proxy.StallDirection(Upstream, true)
	p.client.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	n, err := p.client.Write(make([]byte, 64<<20))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("wrote %d bytes into a stalled connection: %v", n, err)
	}
}

func TestProxyHalfClose(t *testing.T) {
	p := newPair(t)
	p.proxy.HalfClose(Downstream)
	wantEOF(t, p.client)
	for range 10 {
		p.server.Write([]byte("lost"))
		p.carries(t, p.client, p.server)
	}
}

func TestProxyDelay(t *testing.T) {
	p := newPair(t)
	const latency = 50 * time.Millisecond
	p.proxy.Delay(latency)
	began := time.Now()
	p.carries(t, p.client, p.server)
	p.carries(t, p.server, p.client)
	if took := time.Since(began); took < 2*latency {
		t.Errorf("round trip of %s, want at least %s", took, 2*latency)
	}
}

func TestProxyTruncate(t *testing.T) {
	for _, n := range []int{0, 1, 100_000} {
		p := newPair(t)
		p.proxy.TruncateAfter(Upstream, n)
		p.server.Write([]byte("unread")) // must not turn the end into a reset
		go p.client.Write(make([]byte, 200_000))
		got, err := io.ReadAll(p.server)
		if err != nil || len(got) != n {
			t.Errorf("the server got %d bytes, %v; want %d", len(got), err, n)
		}
		p.server.Write([]byte("lost")) // the answer
		_, err = io.ReadAll(p.client)
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client's read: %v, want a reset", err)
		}
	}
}

func TestProxyTruncateDownstream(t *testing.T) {
	p := newPair(t)
	p.proxy.TruncateAfter(Downstream, 3)
	p.server.Write([]byte("abcdef"))
	got, err := io.ReadAll(p.client)
	if err != nil || string(got) != "abc" {
		t.Errorf("the client got %q, %v", got, err)
	}
	wantReset(t, p.server)
}

func TestProxyClosesWhileStalled(t *testing.T) {
	p := newPair(t)
	p.proxy.Stall(true)
	p.client.Write([]byte("x")) // Cleanup must not wait for it to arrive
}
