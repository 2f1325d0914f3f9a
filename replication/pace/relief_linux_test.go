package pace

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"

	"outbox-relay/internal/testenv"
)

// What is not taken although it comes, and what stays unacknowledged, is starved of
// acknowledgements. Silence and a moment without an acknowledgement are not.
func TestStarved(t *testing.T) {
	before := counters{segments: 10, taken: 1000, unacknowledged: true}
	for name, c := range map[string]struct {
		now  counters
		want bool
	}{
		"silence":                 {counters{10, 1000, false}, false},
		"more comes and is taken": {counters{12, 1400, false}, false},
		"dropped":                 {counters{12, 1000, false}, true},
		"not acknowledged":        {counters{12, 1400, true}, true},
	} {
		if got := c.now.starved(before); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if (counters{segments: 10, taken: 1000, unacknowledged: true}).starved(counters{segments: 10, taken: 1000}) {
		t.Error("what was written just now counts as not acknowledged")
	}
}

// pair is a connection within the machine, and its other side.
func pair(t *testing.T) (*Conn, *net.TCPConn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	other, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Close() })
	return NewConn(conn), other.(*net.TCPConn)
}

// What was held comes first, then what the socket has; and the receive buffer is then
// what it was.
func TestHeldBytesComeFirst(t *testing.T) {
	c, other := pair(t)
	want := bytes.Repeat([]byte("0123456789"), 1000)
	write := func(part []byte) {
		t.Helper()
		if _, err := other.Write(part); err != nil {
			t.Fatal(err)
		}
	}
	write(want[:3000])
	c.relief.seen.unacknowledged = true
	testenv.Eventually(t, "what was written to be held", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.relief.held = c.relief.kernel.drain(c.relief.held)
		return len(c.relief.held) == 3000
	})
	c.relief.room = c.relief.kernel.room()
	c.relief.kernel.setRoom(leastRoom, false)
	if room := c.relief.kernel.room(); room > 4<<10 {
		t.Errorf("the least room is %d", room)
	}
	write(want[3000:4000])
	got := make([]byte, 4000)
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = other.Write(want[4000:]) }()
	rest := make([]byte, len(want)-4000)
	if _, err := io.ReadFull(c, rest); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(append(got, rest...), want) {
		t.Error("the bytes are others, or in another order")
	}
	if room := c.relief.kernel.room(); room != receiveBuffer {
		t.Errorf("the receive buffer is %d, want %d", room, receiveBuffer)
	}
}

// Nobody reads, the other side writes many small messages, and what is written to it is
// acknowledged all the same; then every byte comes.
func TestAcknowledgementsComeThrough(t *testing.T) {
	c, other := pair(t)
	message := bytes.Repeat([]byte("m"), 350)
	const messages = 8000
	go func() {
		for range messages {
			if _, err := other.Write(message); err != nil {
				return
			}
		}
	}()
	go func() { _, _ = io.Copy(io.Discard, other) }()
	for range 20 {
		if _, err := c.Write([]byte("status")); err != nil {
			t.Fatal(err)
		}
		testenv.Eventually(t, "an acknowledgement", func() bool {
			if err := c.Relieve(); err != nil {
				t.Fatal(err)
			}
			now, err := c.relief.kernel.counters()
			return err == nil && !now.unacknowledged
		})
	}
	if _, err := io.ReadFull(c, make([]byte, messages*len(message))); err != nil {
		t.Fatal(err)
	}
}

// A connection that the other side has reset is found broken without a read.
func TestResetIsFound(t *testing.T) {
	c, other := pair(t)
	if err := other.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	other.Close()
	testenv.Eventually(t, "the reset", func() bool { return errors.Is(c.Relieve(), ErrLost) })
}
