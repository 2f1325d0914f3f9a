package pace

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"
	"time"
)

// The pace is a matter of load only: bytes in a window, not the size of a read.
func TestPaceFollowsTheLoad(t *testing.T) {
	const heavy = int(busyRate / 1000 * 2) // bytes a millisecond, at twice the rate that counts as load
	now := time.Unix(1, 0)
	p := NewReader(nil)
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

// A backlog is read when the buffer is full, under load after loadPause.
func TestPauseFillsTheBufferOfABacklog(t *testing.T) {
	p := NewReader(nil)
	read := func(reads, bytes int) time.Duration {
		for range reads {
			p.adapt(bytes)
		}
		return p.pause
	}
	if got := read(20, 1000); got != loadPause {
		t.Errorf("a pause of %v under load, want %v", got, loadPause)
	}
	p.deep = true
	if got := read(1, fullRead-1); got <= loadPause {
		t.Errorf("a pause of %v before the buffer is full", got)
	}
	if got := read(20, fullRead-1); got != longPause {
		t.Errorf("a pause of %v with a buffer that never fills, want %v", got, longPause)
	}
	if got := read(20, fullRead); got != leastPause {
		t.Errorf("a pause of %v with a full buffer, want %v", got, leastPause)
	}
	p.deep = false
	if got := read(20, 1000); got != loadPause {
		t.Errorf("a pause of %v after the backlog, want %v", got, loadPause)
	}
}

// Whatever the buffer, the pace and the size of the reads: the bytes come as
// they were, then the error.
func TestPacedReaderKeepsTheBytes(t *testing.T) {
	want := bytes.Repeat([]byte("0123456789"), 300_000)
	broken := errors.New("cut")
	idles := 0
	p := NewReader(iotest.HalfReader(io.MultiReader(bytes.NewReader(want), iotest.ErrReader(broken))))
	p.Idle = func() { idles++ }
	got, err := io.ReadAll(p)
	if !errors.Is(err, broken) || !bytes.Equal(got, want) {
		t.Errorf("%d bytes and %v, want %d and %v", len(got), err, len(want), broken)
	}
	if idles < 3 {
		t.Errorf("idle %d times", idles)
	}
}
