// Package pgserver runs throw-away Postgres clusters, ready for logical
// decoding: for tests and for the demo. Linux and macOS.
package pgserver

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"outbox-relay/internal/pgserver/child"

	"github.com/jackc/pgx/v5"
)

const (
	readyTimeout = time.Minute      // from the start of the server to its first connection
	stopTimeout  = 20 * time.Second // Postgres itself kills hung backends after 5 s
)

// Options of a cluster. The zero value works.
type Options struct {
	Major    int               // the major version; 0: POSTGRES_VERSION, else the first found
	Settings map[string]string // for postgresql.conf, over the defaults; values unquoted
	Password string            // of the user postgres, for scram-sha-256; empty: trust
	Logf     logFunc           // gets progress lines; nil: discarded
}

type logFunc = func(format string, args ...any)

func (o Options) logf() logFunc {
	if o.Logf == nil {
		return func(string, ...any) {}
	}
	return o.Logf
}

// Cluster is a Postgres cluster with a folder and a port of its own. Its
// superuser is postgres. Its methods are safe for concurrent use; starting and
// stopping at the same time is for the caller to order.
type Cluster struct {
	installation Installation
	dir          string
	port         int
	password     string
	user         *syscall.Credential
	lock         *os.File // on dir

	mu      sync.Mutex
	process *child.Process // nil: never started
	closed  bool
}

// Start makes a cluster in a temporary folder and starts it. It returns when
// the server accepts connections. ctx bounds the start, not the cluster's life:
// call Close.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	found, err := Find(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("find Postgres: %w", err)
	}
	user, err := serverUser()
	if err != nil {
		return nil, err
	}
	dir, lock, err := newDir(ctx)
	if err != nil {
		return nil, fmt.Errorf("make the cluster's folder: %w", err)
	}
	c := &Cluster{installation: found, dir: dir, password: o.Password, user: user, lock: lock}
	err = c.create(ctx, c.initdb, o.settings())
	if err == nil {
		err = c.Restart(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// Copy makes a copy of a cluster that is stopped, with settings over those that
// it has; Restart starts it. signal is standby.signal for a standby,
// recovery.signal for a restore, or empty.
func (c *Cluster) Copy(ctx context.Context, signal string, settings map[string]string) (*Cluster, error) {
	if c.Running() {
		return nil, errors.New("copy a cluster: it still runs")
	}
	dir, lock, err := newDir(ctx)
	if err != nil {
		return nil, fmt.Errorf("make the cluster's folder: %w", err)
	}
	twin := &Cluster{installation: c.installation, dir: dir, password: c.password, user: c.user, lock: lock}
	fill := func(ctx context.Context) error {
		if out, err := twin.as(ctx, "cp", "-a", c.data(), twin.data()).CombinedOutput(); err != nil {
			return fmt.Errorf("copy the data: %w\n%s", err, out)
		}
		if signal == "" {
			return nil
		}
		path := filepath.Join(twin.data(), signal)
		return errors.Join(os.WriteFile(path, nil, 0o600), give(path, c.user))
	}
	if err := twin.create(ctx, fill, settings); err != nil {
		return nil, errors.Join(err, twin.Close())
	}
	return twin, nil
}

// create fills the cluster's folder.
func (c *Cluster) create(ctx context.Context, fill func(context.Context) error, settings map[string]string) error {
	if err := give(c.dir, c.user); err != nil {
		return err
	}
	if err := fill(ctx); err != nil {
		return err
	}
	port, err := FreePort()
	if err != nil {
		return err
	}
	c.port = port
	if err := c.configure(settings); err != nil {
		return fmt.Errorf("write postgresql.conf: %w", err)
	}
	return nil
}

// Restart starts the server again on the same folder and port, whatever way it
// ended, and returns when it accepts connections. A server that still runs is
// stopped first (Fast).
func (c *Cluster) Restart(ctx context.Context) error {
	if err := c.Stop(ctx, Fast); err != nil {
		return err
	}
	if err := c.launch(); err != nil {
		return err
	}
	return c.awaitReady(ctx)
}

// launch starts the server. All of an earlier one has ended.
func (c *Cluster) launch() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return errors.New("start Postgres: the cluster is closed")
	}
	// Left by a kill, it would be believed if another process got the old id.
	os.Remove(filepath.Join(c.data(), "postmaster.pid"))
	log, err := os.OpenFile(c.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("start Postgres: %w", err)
	}
	defer log.Close()
	cmd := c.command(context.Background(), "postgres", "-D", c.data())
	cmd.Stdout, cmd.Stderr = log, log
	c.process, err = child.Start(cmd, syscall.SIGQUIT)
	return err
}

// command is one of the server's programs, run as the server's user and
// untouched by our environment.
func (c *Cluster) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	return c.as(ctx, filepath.Join(c.Bin(), program), args...)
}

// as is any program, likewise.
func (c *Cluster) as(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = c.dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "TZ=UTC"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: c.user}
	return cmd
}

// awaitReady waits for the first connection that succeeds. It fails as soon as
// the server ends.
func (c *Cluster) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	process := c.current()
	for {
		err := c.ping(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-process.Done():
			return fmt.Errorf("start Postgres: it ended with exit code %d; its log:\n%s", process.ExitCode(), c.LogTail())
		case <-ctx.Done():
			return fmt.Errorf("start Postgres: no connection (%w); its log:\n%s", err, c.LogTail())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (c *Cluster) ping(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, c.URL("postgres"))
	if err != nil {
		return err
	}
	return conn.Close(ctx)
}

// Mode is how a server is asked to stop.
type Mode int

const (
	Smart     Mode = iota // waits for the clients to leave
	Fast                  // ends sessions, waits for walsenders to have sent all, writes a checkpoint
	Immediate             // stops as if crashed
)

func (m Mode) signal() syscall.Signal {
	return map[Mode]syscall.Signal{Smart: syscall.SIGTERM, Fast: syscall.SIGINT, Immediate: syscall.SIGQUIT}[m]
}

// Stop asks the server to stop and waits until it and its backends have ended,
// or until ctx ends, whose error it then returns; the request stands. It may be
// followed by a Stop in a sharper mode. nil if the server does not run.
func (c *Cluster) Stop(ctx context.Context, mode Mode) error {
	return c.end(ctx, mode.signal())
}

// Kill ends the server by SIGKILL. It returns when its backends, too, have
// noticed and ended.
func (c *Cluster) Kill() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	return c.end(ctx, syscall.SIGKILL)
}

func (c *Cluster) end(ctx context.Context, sig syscall.Signal) error {
	process := c.current()
	if process == nil {
		return nil
	}
	if err := process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop Postgres: %w", err)
	}
	select {
	case <-process.Done():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stop Postgres (%v): %w", sig, ctx.Err())
	}
}

// Close stops the server at once and removes the cluster's folder. Calling it
// again does nothing.
func (c *Cluster) Close() error {
	c.mu.Lock()
	wasClosed := c.closed
	c.closed = true
	c.mu.Unlock()
	if wasClosed {
		return nil
	}
	defer c.lock.Close()
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	c.thaw()
	return errors.Join(c.Stop(ctx, Immediate), os.RemoveAll(c.dir))
}

// thaw wakes a server that somebody froze by SIGSTOP.
func (c *Cluster) thaw() {
	if process := c.current(); process != nil {
		process.Signal(syscall.SIGCONT) // it may have ended
	}
}

func (c *Cluster) current() *child.Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.process
}

// Running tells whether the server, or a backend of it, runs.
func (c *Cluster) Running() bool {
	process := c.current()
	if process == nil {
		return false
	}
	select {
	case <-process.Done():
		return false
	default:
		return true
	}
}

// URL is the connection string for database db as the superuser, without TLS.
func (c *Cluster) URL(db string) string {
	u := url.URL{
		Scheme:   "postgres",
		User:     url.User("postgres"),
		Host:     "127.0.0.1:" + strconv.Itoa(c.port),
		Path:     "/" + db,
		RawQuery: "sslmode=disable",
	}
	if c.password != "" {
		u.User = url.UserPassword("postgres", c.password)
	}
	return u.String()
}

// Port is the TCP port on 127.0.0.1, the same for the cluster's whole life.
func (c *Cluster) Port() int { return c.port }

// Version is the server's major version.
func (c *Cluster) Version() int { return c.installation.Major }

// Bin is the folder of the server's programs.
func (c *Cluster) Bin() string { return c.installation.Bin }

// Dir is the cluster's folder, gone after Close. The data directory is in it.
func (c *Cluster) Dir() string { return c.dir }

// Pid is the postmaster's process id.
func (c *Cluster) Pid() int { return c.current().Pid() }

// LogFile is the path of the server's log, gone after Close.
func (c *Cluster) LogFile() string { return filepath.Join(c.dir, "postgres.log") }

// LogTail is the last 4 KiB of the server's log.
func (c *Cluster) LogTail() string {
	log, err := os.ReadFile(c.LogFile())
	if err != nil {
		return err.Error()
	}
	return string(log[max(0, len(log)-4<<10):])
}

func (c *Cluster) data() string { return filepath.Join(c.dir, "data") }
