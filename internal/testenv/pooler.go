package testenv

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"outbox-relay/internal/debian"
	"outbox-relay/internal/pgserver/child"
)

// Pooler starts pgbouncer before the server of address, as a pooler of
// transactions that passes over these startup parameters, and returns the address
// to reach the same database through it. Its program is of Debian's package.
func Pooler(tb testing.TB, address, ignored string) string {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	program, err := debian.Installed(ctx, "pgbouncer", "pgbouncer", logToStderr)
	if err != nil {
		tb.Fatal(err)
	}
	u, err := url.Parse(address)
	if err != nil {
		tb.Fatal(err)
	}
	port := FreePort(tb)
	config := filepath.Join(tb.TempDir(), "pgbouncer.ini")
	text := fmt.Sprintf("[databases]\n* = host=%s port=%s user=%s\n[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port=%d\nunix_socket_dir=\nauth_type=any\npool_mode=transaction\nignore_startup_parameters=%s\n",
		u.Hostname(), u.Port(), u.User.Username(), port, ignored)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		tb.Fatal(err)
	}
	args := []string{config}
	if os.Geteuid() == 0 { // it refuses to run as root
		args = []string{"-u", "nobody", config}
	}
	startPooler(tb, exec.Command(program, args...), fmt.Sprintf("127.0.0.1:%d", port))
	u.Host = fmt.Sprintf("127.0.0.1:%d", port)
	return u.String()
}

// startPooler returns when it accepts connections. Cleanup ends it.
func startPooler(tb testing.TB, cmd *exec.Cmd, address string) {
	tb.Helper()
	logs := &logBuffer{changed: make(chan struct{})}
	cmd.Stderr = logs
	process, err := child.Start(cmd, syscall.SIGKILL)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		_ = process.Signal(syscall.SIGKILL)
		<-process.Done()
	})
	Eventually(tb, "pgbouncer accepts connections", func() bool {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
}
