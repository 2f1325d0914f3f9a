package replication

import (
	"errors"
	"strings"
	"syscall"
	"time"
)

// unacknowledged is how long sent data may be without an answer of the other
// side's kernel; without a limit it is about 15 minutes (tcp_retries2).
const unacknowledged = 10 * time.Second

// tcpUserTimeout is TCP_USER_TIMEOUT, in milliseconds.
// Source: include/uapi/linux/tcp.h; tcp(7).
const tcpUserTimeout = 18

func limitUnacknowledged(network, _ string, conn syscall.RawConn) error {
	if !strings.HasPrefix(network, "tcp") {
		return nil // a socket of this machine
	}
	var set error
	err := conn.Control(func(fd uintptr) {
		set = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(unacknowledged.Milliseconds()))
	})
	return errors.Join(err, set)
}
