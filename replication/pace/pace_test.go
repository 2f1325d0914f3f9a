package pace

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"testing/iotest"
	"time"

	"outbox-relay/internal/testenv"
)

// The pace is a matter of load only: bytes in a window, not the size of a read.
func TestPaceFollowsTheLoad(t *testing.T) {
	const heavy = int(busyRate / 1000 * 2) // bytes a millisecond, at twice the rate that counts as load
	now := time.Unix(1, 0)
	p := NewConn(reading{})
	play := func(reads, bytes int, apart time.Duration) bool {
		for range reads {
			now = now.Add(apart)
			p.measure(bytes, now)
		}
		return p.busy
	}
	if play(100, 200, 10*time.Millisecond) {
		t.Error("busy with 100 small messages a second")
	}
	if !play(100, heavy/10, time.Millisecond/10) {
		t.Error("not busy with many small reads")
	}
	if play(20, heavy/100, time.Millisecond) {
		t.Error("still busy after the load")
	}
	if !play(3, heavy*10, 10*time.Millisecond) {
		t.Error("not busy with a few large reads")
	}
	if play(1, 100, time.Hour) {
		t.Error("busy after an hour's silence")
	}
}

// A backlog is left alone for ever longer, and then read without a pause until all is
// read; under load there is always loadPause.
func TestPausesOfABacklog(t *testing.T) {
	p := NewConn(reading{})
	read := func(reads, bytes int) (more bool, pause time.Duration) {
		for range reads {
			p.adapt(bytes)
		}
		return p.more, p.pause
	}
	for _, bytes := range []int{1, 1 << 20} {
		if more, pause := read(20, bytes); more || pause != loadPause {
			t.Errorf("a pause of %v after %d bytes under load (%v), want %v", pause, bytes, more, loadPause)
		}
	}
	p.deep = true
	if more, pause := read(1, drained-1); more || pause <= loadPause || pause >= longPause {
		t.Errorf("a pause of %v when a backlog has begun (%v)", pause, more)
	}
	if more, pause := read(20, drained-1); more || pause != longPause {
		t.Errorf("a pause of %v with a backlog (%v), want %v", pause, more, longPause)
	}
	if more, _ := read(20, drained); !more {
		t.Error("a pause where there is more to read")
	}
	p.deep = false
	if more, pause := read(1, 1<<20); more || pause != loadPause {
		t.Errorf("a pause of %v after the backlog (%v), want %v", pause, more, loadPause)
	}
}

// Only within a machine, and by TCP, the sender goes on while nobody reads.
func TestBacklogsOfOthers(t *testing.T) {
	for network, c := range map[string]struct {
		address string
		near    bool
	}{"tcp": {"127.0.0.1:0", true}, "unix": {filepath.Join(t.TempDir(), "socket"), false}} {
		listener, err := net.Listen(network, c.address)
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		conn, err := net.Dial(network, listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		p := NewConn(conn)
		p.since = time.Unix(1, 0)
		p.measure(1<<30, p.since.Add(window))
		if !p.busy || p.deep != c.near {
			t.Errorf("%s: busy %v, a backlog %v; want %v", network, p.busy, p.deep, c.near)
		}
	}
}

// TLS reads one record at a time, and the walsender makes one of each message: those
// that have arrived come by one read all the same.
func TestManyRecordsComeByOneRead(t *testing.T) {
	const records = 1000
	authority := testenv.NewAuthority(t)
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{authority.Issue("server")}})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	written := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		for range records {
			if err == nil {
				_, err = conn.Write([]byte("a message"))
			}
		}
		written <- err
	}()
	socket, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	paced := NewConn(socket)
	reads := 0
	paced.Idle = func() { reads++ }
	conn := tls.Client(paced, &tls.Config{RootCAs: authority.Pool(), ServerName: "localhost"})
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	if Below(conn) != paced || Below(paced) != paced {
		t.Error("the Conn below TLS is another one")
	}
	if _, err := io.ReadFull(conn, make([]byte, records*len("a message"))); err != nil {
		t.Fatal(err)
	}
	if reads > records/10 {
		t.Errorf("%d reads for %d records", reads, records)
	}
}

// reading is a connection of which only reads are used.
type reading struct {
	net.Conn
	io.Reader
}

func (r reading) Read(b []byte) (int, error) { return r.Reader.Read(b) }
func (reading) RemoteAddr() net.Addr         { return nil }

// Whatever the buffer, the pace and the size of the reads: the bytes come as
// they were, then the error.
func TestConnKeepsTheBytes(t *testing.T) {
	want := bytes.Repeat([]byte("0123456789"), 300_000)
	broken := errors.New("cut")
	idles := 0
	p := NewConn(reading{Reader: iotest.HalfReader(io.MultiReader(bytes.NewReader(want), iotest.ErrReader(broken)))})
	p.Idle = func() { idles++ }
	got, err := io.ReadAll(p)
	if !errors.Is(err, broken) || !bytes.Equal(got, want) {
		t.Errorf("%d bytes and %v, want %d and %v", len(got), err, len(want), broken)
	}
	if idles < 3 {
		t.Errorf("idle %d times", idles)
	}
}
