package replication

import (
	"io"
	"time"
)

const (
	readBuffer = 1 << 20
	pileUp     = 400 * time.Microsecond // how long bytes may pile up under load
	paceWindow = 2 * time.Millisecond   // over which the load is measured
	busyRate   = 2 << 20                // bytes a second that count as load: about 4,000 small transactions
)

// pacedReader buffers reads and, under load only, waits a little before it
// reads again. A reader that always waits on the socket makes the walsender
// wake it for every message it sends, which halves the walsender.
type pacedReader struct {
	r          io.Reader
	buf        []byte
	begin, end int
	idle       func() // called before each read

	busy   bool
	since  time.Time // when the window began
	gained int       // bytes read in it
}

func newPacedReader(r io.Reader) *pacedReader {
	return &pacedReader{r: r, buf: make([]byte, readBuffer), idle: func() {}}
}

// Read returns what is buffered, else what one read brings.
func (p *pacedReader) Read(dst []byte) (int, error) {
	if p.begin == p.end {
		if err := p.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(dst, p.buf[p.begin:p.end])
	p.begin += n
	return n, nil
}

func (p *pacedReader) fill() error {
	p.idle()
	if p.busy {
		nap(pileUp)
	}
	n, err := p.r.Read(p.buf)
	p.begin, p.end = 0, n
	p.measure(n, time.Now())
	if n > 0 {
		return nil
	}
	return err
}

// measure decides, once a window, whether there is load.
func (p *pacedReader) measure(n int, now time.Time) {
	p.gained += n
	elapsed := now.Sub(p.since)
	if elapsed < paceWindow {
		return
	}
	p.busy = float64(p.gained) > busyRate*elapsed.Seconds()
	p.since, p.gained = now, 0
}
