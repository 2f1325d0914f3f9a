package pace

import "errors"

// ErrLost says that the kernel has given the connection up, which a reader would find
// if it read.
var ErrLost = errors.New("the connection is broken")

const (
	// leastRoom makes the kernel take its least for the receive buffer, about 2 KiB.
	leastRoom = 1

	// mostHeld bounds what is held. The first relief takes what the receive buffer has,
	// at most tcp_rmem[2], and each one behind that about leastRoom.
	mostHeld = 64 << 20
)

// counters are a connection's, as the kernel counts.
type counters struct {
	segments       uint32 // with data that came, whether they were taken or not
	taken          uint64 // bytes that came and were kept
	unacknowledged bool   // something that was written is
}

// starved reports whether the kernel drops what comes: segments do, and nothing is
// taken; or what was written is not acknowledged from one look to the next.
func (now counters) starved(before counters) bool {
	return now.segments != before.segments && now.taken == before.taken || now.unacknowledged && before.unacknowledged
}

// relief is what Relieve knows of a connection.
type relief struct {
	kernel *kernel // nil: it is not TCP, or not Linux
	reads  uint64  // of the socket, by the connection's reader
	looked uint64  // what reads was at the last look
	seen   counters
	held   []byte // was read in place of the reader, which gets it next
	room   int    // that the receive buffer had before; 0: it still has it
}

// Relieve keeps the other side's acknowledgements coming while the reader is busy with
// what it has read, for however long. It is called at intervals of about half a second,
// from any goroutine but the reader's. ErrLost says that the connection is no more.
//
// What is not read stays in the receive buffer. Linux bounds that by what the segments
// take in memory, which for small ones is many times their bytes. So the buffer can be
// full before the window that the other side was offered has come. Then Linux drops whole
// segments, and with them the acknowledgements that they carry, and it takes none that
// lies beyond the window, which it has shrunk (tcp_validate_incoming and tcp_data_queue
// in net/ipv4/tcp_input.c; seen in 6.18 as TcpExtTCPRcvQDrop and TcpExtBeyondWindow).
// What was written to the walsender arrives, but the acknowledgement does not come back;
// the kernel sends the same again, ever more rarely, and nothing behind it. The walsender
// hears nothing for wal_sender_timeout, and ends.
//
// No size of the buffer prevents that (tried: the smallest, larger ones, one that grows
// by itself, TCP_WINDOW_CLAMP, also over Ethernet). Where segments come and nothing is
// taken, what waits is read in the reader's place and held for it, and the buffer is made
// so small that next to nothing is offered. That is repeated until what comes fills the
// window that was offered. The other side then knows that the window is closed, and sends
// on as soon as it opens.
func (c *Conn) Relieve() error {
	if c.relief.kernel == nil || !c.mu.TryLock() { // the reader reads
		return nil
	}
	defer c.mu.Unlock()
	return c.relief.look()
}

func (r *relief) look() error {
	now, err := r.kernel.counters()
	if err != nil {
		return err
	}
	before, blocked := r.seen, r.looked == r.reads
	r.seen, r.looked = now, r.reads
	if !blocked || !now.starved(before) || len(r.held) >= mostHeld {
		return nil
	}
	if r.room == 0 {
		r.room = r.kernel.room()
		r.kernel.setRoom(leastRoom, false)
	}
	r.held = r.kernel.drain(r.held)
	return nil
}

// release gives the reader what was held for it; nil: nothing was. The receive buffer
// gets the room that it had. free: it grew by itself.
func (r *relief) release(free bool) (held []byte) {
	r.reads++
	if r.room != 0 {
		r.kernel.setRoom(r.room, free)
		r.room = 0
	}
	held, r.held = r.held, nil
	return held
}
