// Package pace reads from a walsender so that it is left undisturbed.
package pace

import (
	"crypto/tls"
	"net"
	"sync"
	"time"
)

const (
	readBuffer = 1 << 20
	window     = 2 * time.Millisecond // over which the load is measured
	busyRate   = 1 << 20              // bytes a second that count as load: about 2,000 small transactions
	deepRate   = 8 << 20              // bytes a second that count as a backlog

	// How long bytes may pile up: loadPause under load, and up to longPause with a
	// backlog, where nobody waits for one event.
	loadPause = 400 * time.Microsecond
	longPause = 10 * time.Millisecond

	// A read of less than drained bytes has found little more than what came while it
	// was made; what waited before came in reads of about receiveBuffer.
	drained = 16 << 10

	// With a buffer of 16 KiB the sender's kernel waits for room that never comes, with
	// 32 KiB it does so at moments (tried).
	receiveBuffer = 64 << 10
)

// Conn is a connection to a walsender. It buffers reads and, under load only, waits a
// little before it reads again. A reader that always waits on the socket makes the
// walsender wake it for every message it sends, which halves the walsender.
//
// A reader whose receive buffer has room for every message costs it something, too: each
// goes through TCP by itself. Where there is none it is only appended to what waits
// already. With a backlog within a machine the buffer is therefore left full for a while,
// and then all is read that has gathered behind it. docs/performance.md has the figures.
//
// It belongs below TLS, which reads one message of the walsender at a time.
type Conn struct {
	net.Conn
	Idle func() // called before each read from the socket

	near   bool   // within this machine, with a receive buffer that does not grow
	buf    []byte // what the socket is read into
	unread []byte // what was read and not taken yet, in buf or what was held

	mu     sync.Mutex // held by whoever reads from the socket; relief is guarded by it
	relief relief

	busy   bool          // there is load
	deep   bool          // there is a backlog
	more   bool          // there is more to read than what arrives just now
	pause  time.Duration // before the next read, if busy
	since  time.Time     // when the window began
	gained int           // bytes read in it
}

// NewConn returns a Conn over a connection that was just made. Within this machine its
// receive buffer is fixed: by itself it grows, and is never full then. Over a network it
// has to hold what is under way, and stays as it is.
func NewConn(conn net.Conn) *Conn {
	near := isNear(conn)
	if tcp, ok := conn.(*net.TCPConn); ok && near {
		_ = tcp.SetReadBuffer(receiveBuffer) // without it, it is slower
	}
	return &Conn{Conn: conn, Idle: func() {}, near: near, buf: make([]byte, readBuffer), relief: relief{kernel: kernelOf(conn)}, pause: loadPause}
}

// Below returns the Conn that conn is, or that is below its TLS.
func Below(conn net.Conn) *Conn {
	if secured, ok := conn.(*tls.Conn); ok {
		conn = secured.NetConn()
	}
	return conn.(*Conn)
}

// isNear reports whether a connection is one by TCP within this machine. A Unix socket
// makes its sender wait after 100 to 300 messages (tried), and is not to be left alone.
func isNear(conn net.Conn) bool {
	address, ok := conn.RemoteAddr().(*net.TCPAddr)
	return ok && address.IP.IsLoopback()
}

// Read returns what is buffered, else what one read brings.
func (c *Conn) Read(dst []byte) (int, error) {
	if len(c.unread) == 0 {
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(dst, c.unread)
	c.unread = c.unread[n:]
	return n, nil
}

func (c *Conn) fill() error {
	c.Idle()
	if c.busy && !c.more {
		Nap(c.pause)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.unread = c.relief.release(!c.near); len(c.unread) > 0 {
		return nil
	}
	n, err := c.Conn.Read(c.buf)
	c.unread = c.buf[:n]
	c.measure(n, time.Now())
	c.adapt(n)
	if n > 0 {
		return nil
	}
	return err
}

// measure decides, once a window, whether there is load, and a backlog.
func (c *Conn) measure(n int, now time.Time) {
	c.gained += n
	elapsed := now.Sub(c.since)
	if elapsed < window {
		return
	}
	c.busy = float64(c.gained) > busyRate*elapsed.Seconds()
	c.deep = c.near && float64(c.gained) > deepRate*elapsed.Seconds()
	c.since, c.gained = now, 0
}

// adapt sets the pause after a read of n bytes. That of a backlog doubles whenever all
// was read, so that what comes behind a mere burst does not wait long.
func (c *Conn) adapt(n int) {
	c.more = c.deep && n >= drained
	switch {
	case !c.deep:
		c.pause = loadPause
	case !c.more:
		c.pause = min(2*c.pause, longPause)
	}
}
