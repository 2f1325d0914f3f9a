package pace

import (
	"errors"
	"net"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	tcpClose   = 7        // TCP_CLOSE: by a reset, or since nothing was acknowledged in time
	bufferLock = 72       // SO_BUF_LOCK, from Linux 5.14 on
	oneDrain   = 64 << 10 // bytes that one system call may read
)

// kernel is what the kernel knows of a TCP connection.
type kernel struct{ raw syscall.RawConn }

// kernelOf returns nil for what is no TCP connection.
func kernelOf(conn net.Conn) *kernel {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil
	}
	return &kernel{raw}
}

// control calls do with the socket, and returns its error, or that there is none.
func (k *kernel) control(do func(fd int) error) (err error) {
	return errors.Join(k.raw.Control(func(fd uintptr) { err = do(int(fd)) }), err)
}

// counters reads what has come and what has left. ErrLost: the connection is no more.
func (k *kernel) counters() (now counters, err error) {
	err = k.control(func(fd int) error {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return err
		}
		if info.State == tcpClose {
			return ErrLost
		}
		left, err := unix.IoctlGetInt(fd, unix.TIOCOUTQ)
		now = counters{segments: info.Data_segs_in, taken: info.Bytes_received, unacknowledged: left > 0}
		return err
	})
	return now, err
}

// drain appends all that waits in the kernel. What ends the connection is found again
// by who reads it.
func (k *kernel) drain(to []byte) []byte {
	_ = k.control(func(fd int) error {
		for {
			to = slices.Grow(to, oneDrain)
			n, err := unix.Read(fd, to[len(to):len(to)+oneDrain])
			if n <= 0 || err != nil {
				return err
			}
			to = to[:len(to)+n]
		}
	})
	return to
}

// room returns the size of the receive buffer, as setRoom takes it.
func (k *kernel) room() (bytes int) {
	_ = k.control(func(fd int) (err error) {
		bytes, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
		return err
	})
	return bytes / 2 // Linux doubles what is asked for; see socket(7)
}

// setRoom sets the size of the receive buffer. free lets it grow by itself, as it does
// where nobody has set it.
func (k *kernel) setRoom(bytes int, free bool) {
	_ = k.control(func(fd int) error {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, bytes)
		if free {
			err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_SOCKET, bufferLock, 0))
		}
		return err
	})
}
