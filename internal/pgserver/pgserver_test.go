package pgserver_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"outbox-relay/internal/pgserver"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv("PGSERVER_TEST_ORPHAN") != "" {
		orphan()
	}
	goleak.VerifyTestMain(m)
}

func start(t *testing.T, o pgserver.Options) *pgserver.Cluster {
	t.Helper()
	o.Logf = t.Logf
	c, err := pgserver.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func setting(t *testing.T, c *pgserver.Cluster, name string) string {
	t.Helper()
	var value string
	err := connect(t, c.URL("postgres")).QueryRow(t.Context(), "SELECT current_setting($1)", name).Scan(&value)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

func TestSettings(t *testing.T) {
	c := start(t, pgserver.Options{Settings: map[string]string{
		"max_connections":  "50",
		"application_name": `it's a \ test`,
	}})
	for name, want := range map[string]string{
		"wal_level":          "logical",
		"server_encoding":    "UTF8",
		"synchronous_commit": "on",
		"max_connections":    "50",
		"application_name":   `it's a \ test`,
	} {
		if got := setting(t, c, name); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	if got := setting(t, c, "server_version"); !strings.HasPrefix(got, strconv.Itoa(c.Version())) {
		t.Errorf("server %s, but Version() = %d", got, c.Version())
	}
}

func TestDecodesLogically(t *testing.T) {
	c := start(t, pgserver.Options{})
	_, err := connect(t, c.URL("postgres")).Exec(t.Context(), "SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
	if err != nil {
		t.Fatal(err)
	}
}

func TestPassword(t *testing.T) {
	c := start(t, pgserver.Options{Password: "s3cret/?"})
	connect(t, c.URL("postgres"))
	_, err := pgx.Connect(t.Context(), strings.Replace(c.URL("postgres"), "s3cret", "wrong", 1))
	if err == nil || !strings.Contains(err.Error(), "28P01") {
		t.Fatalf("wrong password: %v", err)
	}
}

func TestRestartKeepsDataAndPort(t *testing.T) {
	for name, end := range map[string]func(*pgserver.Cluster) error{
		"running":   func(*pgserver.Cluster) error { return nil },
		"smart":     func(c *pgserver.Cluster) error { return c.Stop(t.Context(), pgserver.Smart) },
		"immediate": func(c *pgserver.Cluster) error { return c.Stop(t.Context(), pgserver.Immediate) },
		"killed":    (*pgserver.Cluster).Kill,
	} {
		t.Run(name, func(t *testing.T) {
			c := start(t, pgserver.Options{})
			port := c.Port()
			conn := connect(t, c.URL("postgres"))
			if _, err := conn.Exec(t.Context(), "CREATE TABLE kept ()"); err != nil {
				t.Fatal(err)
			}
			conn.Close(t.Context())
			if err := end(c); err != nil {
				t.Fatal(err)
			}
			if got := c.Running(); got != (name == "running") {
				t.Errorf("Running() = %v", got)
			}
			if err := c.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := connect(t, c.URL("postgres")).Exec(t.Context(), "TABLE kept"); err != nil {
				t.Error(err)
			}
			if c.Port() != port {
				t.Errorf("port %d, was %d", c.Port(), port)
			}
		})
	}
}

func TestSmartStopWaitsForClients(t *testing.T) {
	c := start(t, pgserver.Options{})
	connect(t, c.URL("postgres"))
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := c.Stop(ctx, pgserver.Smart); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("smart stop with a client: %v", err)
	}
	if err := c.Stop(t.Context(), pgserver.Fast); err != nil {
		t.Fatal(err)
	}
}

func TestKillWithBusyBackend(t *testing.T) {
	c := start(t, pgserver.Options{})
	conn := connect(t, c.URL("postgres"))
	asleep := make(chan error, 1)
	go func() {
		_, err := conn.Exec(context.Background(), "SELECT pg_sleep(60)")
		asleep <- err
	}()
	if err := c.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-asleep; err == nil {
		t.Error("the backend outlived its postmaster")
	}
	if err := c.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	c := start(t, pgserver.Options{})
	if err := syscall.Kill(c.Pid(), syscall.SIGSTOP); err != nil { // not even frozen
		t.Fatal(err)
	}
	for range 2 {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(c.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("folder after Close: %v", err)
	}
	if err := c.Restart(t.Context()); err == nil {
		t.Error("a closed cluster started again")
	}
}

func TestBadSettingShowsTheLog(t *testing.T) {
	c, err := pgserver.Start(t.Context(), pgserver.Options{Settings: map[string]string{"no_such_setting": "1"}})
	if err == nil {
		c.Close()
		t.Fatal("started")
	}
	if !strings.Contains(err.Error(), "no_such_setting") {
		t.Errorf("error without the server's reason: %v", err)
	}
}

// TestOrphan kills a process that has a cluster: the server must end too, and
// the next cluster's start removes the folder.
func TestOrphan(t *testing.T) {
	temp := t.TempDir()
	openParents(t, temp)
	t.Setenv("TMPDIR", temp)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "PGSERVER_TEST_ORPHAN=1")
	out, err := cmd.Output()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != -1 {
		t.Fatalf("orphan: %v", err)
	}
	url := strings.TrimSpace(string(out))
	waitFor(t, "the orphaned server to end", func() bool {
		conn, err := pgx.Connect(t.Context(), url)
		if err == nil {
			conn.Close(t.Context())
		}
		return err != nil
	})
	c := start(t, pgserver.Options{})
	left, err := filepath.Glob(filepath.Join(filepath.Dir(c.Dir()), "outbox-relay-postgres-*"))
	if err != nil || len(left) != 1 {
		t.Errorf("folders %v (%v), want only the new one", left, err)
	}
}

// orphan is the process of TestOrphan.
func orphan() {
	c, err := pgserver.Start(context.Background(), pgserver.Options{})
	if err != nil {
		os.Stderr.WriteString(err.Error())
		os.Exit(1)
	}
	os.Stdout.WriteString(c.URL("postgres"))
	syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

// openParents lets other users into t.TempDir(), which is in folders of mode
// 0700 or 0755 depending on the Go release.
func openParents(t *testing.T, dir string) {
	t.Helper()
	for ; dir != filepath.Dir(dir) && dir != os.TempDir(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("gave up waiting for %s", what)
		}
	}
}
