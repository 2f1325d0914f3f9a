package replication

import (
	"errors"
	"net"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/replication/pace"
)

// A host that vanishes while something is under way is noticed by the kernel's
// limit; to make one vanish takes a network of its own, so the option is read.
func TestDialLimitsWhatIsUnacknowledged(t *testing.T) {
	if got := dialedOption(t, Dial, syscall.IPPROTO_TCP, tcpUserTimeout); got != 10_000 {
		t.Errorf("TCP_USER_TIMEOUT is %d", got)
	}
}

// Within a machine the receive buffer is 64 KiB and does not grow. Linux doubles what
// is asked for; see socket(7).
func TestReceiveBufferIsFixed(t *testing.T) {
	if got := dialedOption(t, dialWalsender, syscall.SOL_SOCKET, syscall.SO_RCVBUF); got != 2*64<<10 {
		t.Errorf("SO_RCVBUF is %d, want %d", got, 2*64<<10)
	}
}

// dialedOption is an option of a connection that was dialed.
func dialedOption(t *testing.T, dial pgconn.DialFunc, level, option int) int {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := dial(t.Context(), "tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if paced, ok := conn.(*pace.Conn); ok {
		conn = paced.Conn
	}
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var value int
	var getErr error
	err = raw.Control(func(fd uintptr) { value, getErr = syscall.GetsockoptInt(int(fd), level, option) })
	if err := errors.Join(err, getErr); err != nil {
		t.Fatal(err)
	}
	return value
}

// Postgres on a Unix socket can be dialed, too.
func TestDialUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), ".s.PGSQL.5432")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := dialWalsender(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}
