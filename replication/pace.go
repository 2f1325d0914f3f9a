package replication

import (
	"io"
	"time"
)

const (
	readBuffer = 1 << 20
	busyRead   = 32 << 10               // a read of at least this much means load
	pileUp     = 400 * time.Microsecond // how long bytes then may pile up
)

// pacedReader buffers reads and, under load only, waits a little before it
// reads again. A reader that always waits on the socket makes the walsender
// wake it for every message it sends, which halves the walsender.
type pacedReader struct {
	r          io.Reader
	buf        []byte
	begin, end int
	busy       bool
	idle       func() // called before each read
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
		time.Sleep(pileUp)
	}
	n, err := p.r.Read(p.buf)
	p.begin, p.end = 0, n
	p.busy = n >= busyRead
	if n > 0 {
		return nil
	}
	return err
}
