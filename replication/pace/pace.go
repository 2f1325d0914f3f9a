// Package pace reads from a walsender so that it is left undisturbed.
package pace

import (
	"io"
	"net"
	"time"
)

const (
	readBuffer = 1 << 20
	paceWindow = 2 * time.Millisecond // over which the load is measured
	busyRate   = 1 << 20              // bytes a second that count as load: about 2,000 small transactions
	deepRate   = 8 << 20              // bytes a second that count as a backlog

	// How long bytes may pile up: loadPause under load, and up to longPause with a
	// backlog, where nobody waits for one event.
	loadPause = 400 * time.Microsecond
	longPause = 10 * time.Millisecond

	// A read of less than drained bytes has found little more than what came while it
	// was made; what waited before came in reads of about receiveBuffer. In a quarter of
	// that the sender's kernel waits for room that never comes (tried).
	drained       = 16 << 10
	receiveBuffer = 64 << 10
)

// Reader buffers reads and, under load only, waits a little before it reads again. A
// reader that always waits on the socket makes the walsender wake it for every message
// it sends, which halves the walsender.
//
// So does a reader whose receive buffer has room for every message: each goes through
// TCP by itself. Where there is none it is only appended to what waits already. With a
// backlog within a machine the buffer is therefore left full for a while, and then all
// is read that has gathered behind it. docs/performance.md has the figures.
type Reader struct {
	Idle func() // called before each read

	r          io.Reader
	near       bool // within this machine, with a receive buffer that does not grow
	buf        []byte
	begin, end int

	busy   bool          // there is load
	deep   bool          // there is a backlog
	more   bool          // there is more to read than what arrives just now
	pause  time.Duration // before the next read, if busy
	since  time.Time     // when the window began
	gained int           // bytes read in it
}

// NewReader returns a Reader of r, which reads what comes on a connection that
// FixBuffer has prepared; w writes to it.
func NewReader(r io.Reader, w io.Writer) *Reader {
	conn, ok := w.(net.Conn)
	return &Reader{Idle: func() {}, r: r, near: ok && isNear(conn), buf: make([]byte, readBuffer), pause: loadPause}
}

// FixBuffer fixes the receive buffer of a connection within this machine: by itself it
// grows, and is never full then. Over a network the buffer has to hold what is under
// way, and stays as it is.
func FixBuffer(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok && isNear(conn) {
		_ = tcp.SetReadBuffer(receiveBuffer) // without it, it is slower
	}
}

// isNear reports whether a connection is one by TCP within this machine. A Unix socket
// makes its sender wait after a few hundred messages, and is not to be left alone.
func isNear(conn net.Conn) bool {
	address, ok := conn.RemoteAddr().(*net.TCPAddr)
	return ok && address.IP.IsLoopback()
}

// Read returns what is buffered, else what one read brings.
func (p *Reader) Read(dst []byte) (int, error) {
	if p.begin == p.end {
		if err := p.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(dst, p.buf[p.begin:p.end])
	p.begin += n
	return n, nil
}

func (p *Reader) fill() error {
	p.Idle()
	if p.busy && !p.more {
		nap(p.pause)
	}
	n, err := p.r.Read(p.buf)
	p.begin, p.end = 0, n
	p.measure(n, time.Now())
	p.adapt(n)
	if n > 0 {
		return nil
	}
	return err
}

// measure decides, once a window, whether there is load, and a backlog.
func (p *Reader) measure(n int, now time.Time) {
	p.gained += n
	elapsed := now.Sub(p.since)
	if elapsed < paceWindow {
		return
	}
	p.busy = float64(p.gained) > busyRate*elapsed.Seconds()
	p.deep = p.near && float64(p.gained) > deepRate*elapsed.Seconds()
	p.since, p.gained = now, 0
}

// adapt sets the pause after a read of n bytes. That of a backlog doubles whenever all
// was read, so that what comes behind a mere burst does not wait long.
func (p *Reader) adapt(n int) {
	p.more = p.deep && n >= drained
	switch {
	case !p.deep:
		p.pause = loadPause
	case !p.more:
		p.pause = min(2*p.pause, longPause)
	}
}
