package replication

import (
	"net"
	"path/filepath"
	"syscall"
	"testing"
)

// A host that vanishes while something is under way is noticed by the kernel's
// limit; to make one vanish takes a network of its own, so the option is read.
func TestDialLimitsWhatIsUnacknowledged(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := Dial(t.Context(), "tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		got, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout)
		if err != nil || got != 10_000 {
			t.Errorf("TCP_USER_TIMEOUT is %d, %v", got, err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Postgres on a Unix socket can be dialed, too.
func TestDialUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), ".s.PGSQL.5432")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := Dial(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}
