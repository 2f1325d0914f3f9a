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

	// How long bytes may pile up: loadPause under load, and from leastPause to longPause
	// with a backlog, where nobody waits for one event.
	loadPause  = 400 * time.Microsecond
	leastPause = 20 * time.Microsecond
	longPause  = 4 * time.Millisecond

	// A read of fullRead bytes has found the receive buffer full, as long as that is
	// receiveBuffer.
	receiveBuffer = 128 << 10
	fullRead      = 64 << 10
)

// Reader buffers reads and, under load only, waits a little before it reads again. A reader that always waits on the socket makes the walsender
// wake it for every message it sends, which halves the walsender.
//
// So does a reader whose receive buffer has room for every message: each goes through
// TCP by itself. Where there is none it is only appended to what waits already. With a
// backlog the pauses are therefore as long as it takes to fill the buffer.
// docs/performance.md has the figures.
type Reader struct {
	Idle func() // called before each read

	r          io.Reader
	buf        []byte
	begin, end int

	busy   bool          // there is load
	deep   bool          // there is a backlog
	pause  time.Duration // before the next read, if busy
	since  time.Time     // when the window began
	gained int           // bytes read in it
}

// NewReader returns a Reader of a connection that FixBuffer has prepared.
func NewReader(r io.Reader) *Reader {
	return &Reader{Idle: func() {}, r: r, buf: make([]byte, readBuffer), pause: loadPause}
}

// FixBuffer fixes the receive buffer of a connection within this machine: by itself it
// grows, and is never full then. Over a network the buffer has to hold what is under
// way, and stays as it is.
func FixBuffer(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok && tcp.RemoteAddr().(*net.TCPAddr).IP.IsLoopback() {
		_ = tcp.SetReadBuffer(receiveBuffer) // without it, it is slower
	}
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
	if p.busy {
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
	p.deep = float64(p.gained) > deepRate*elapsed.Seconds()
	p.since, p.gained = now, 0
}

// adapt sets the pause after a read of n bytes. That of a backlog becomes half as long
// again where the buffer was not full, and else a third shorter: large events fill it
// at once, and are not to wait.
func (p *Reader) adapt(n int) {
	switch {
	case !p.deep:
		p.pause = loadPause
	case n < fullRead:
		p.pause = min(p.pause*3/2, longPause)
	default:
		p.pause = max(p.pause*2/3, leastPause)
	}
}
