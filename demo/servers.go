package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/wait"
)

const stream = "EVENTS"

// servers are all that runs: Postgres and NATS, and, each as a process of its
// own, the relay and the programs of examples/orders.
type servers struct {
	dir      string
	postgres *pgserver.Cluster
	sql      *pgx.Conn // for what the demo itself asks
	nats     *server.Server
	nc       *nats.Conn
	js       jetstream.JetStream
	tables   string     // the SQL of examples/orders
	programs []*program // as they were started
}

// startServers returns what it has started also where it fails.
func startServers(ctx context.Context, out *printer) (*servers, error) {
	s := &servers{}
	var err error
	if s.dir, err = os.MkdirTemp("", "outbox-relay-demo-"); err != nil {
		return s, err
	}
	began := time.Now()
	tell := func(format string, args ...any) { out.detail("", format, args...) }
	// When a transaction was committed is told by Postgres: the latencies are exact.
	settings := map[string]string{"track_commit_timestamp": "on"}
	if s.postgres, err = pgserver.Start(ctx, pgserver.Options{Settings: settings, Logf: tell}); err != nil {
		return s, fmt.Errorf("start Postgres: %w", err)
	}
	if s.sql, err = pgx.Connect(ctx, s.postgres.URL("postgres")); err != nil {
		return s, err
	}
	if err := s.startNATS(); err != nil {
		return s, fmt.Errorf("start NATS: %w", err)
	}
	out.step("started", "Postgres %d and NATS %s, for this demo only, in %.1f s", s.postgres.Version(), server.VERSION, time.Since(began).Seconds())
	return s, nil
}

// prepare makes what the demo runs.
func (s *servers) prepare(ctx context.Context, out *printer) error {
	if err := s.build(ctx, out); err != nil {
		return err
	}
	if err := s.migrate(ctx); err != nil {
		return err
	}
	out.step("migrated", "outbox-relay migrate: the table events, its trigger, the publication")
	return nil
}

// lend runs a command that finds the servers in its environment.
func (s *servers) lend(ctx context.Context, out *printer, command []string) error {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "OUTBOX_POSTGRES_URL="+s.postgres.URL("postgres"),
		"OUTBOX_NATS_URL="+s.nats.ClientURL(), "NATS_URL="+s.nats.ClientURL())
	out.step("ready", "they end when you leave %s", command[0])
	return cmd.Run()
}

func (s *servers) startNATS() error {
	var err error
	s.nats, err = server.NewServer(&server.Options{ServerName: "demo", Host: "127.0.0.1", Port: server.RANDOM_PORT,
		JetStream: true, StoreDir: filepath.Join(s.dir, "nats"), NoSigs: true, NoLog: true})
	if err != nil {
		return err
	}
	s.nats.Start()
	if !s.nats.ReadyForConnections(30 * time.Second) {
		return errors.New("it accepts no connections")
	}
	if s.nc, err = nats.Connect(s.nats.ClientURL()); err != nil {
		return err
	}
	s.js, err = jetstream.New(s.nc)
	return err
}

func (s *servers) path(name string) string { return filepath.Join(s.dir, name) }

// build builds the relay, and examples/orders, which is in a module of its own.
func (s *servers) build(ctx context.Context, out *printer) error {
	began := time.Now()
	out.detail("", "building the relay and examples/orders")
	root, err := goCommand(ctx, ".", "list", "-f", "{{.Dir}}", "outbox-relay")
	if err != nil {
		return fmt.Errorf("find the repository (run the demo in it): %w", err)
	}
	examples := filepath.Join(root, "examples")
	_, relay := goCommand(ctx, root, "build", "-buildvcs=false", "-o", s.path("outbox-relay"), ".")
	_, orders := goCommand(ctx, examples, "build", "-buildvcs=false", "-o", s.path("orders"), "./orders")
	if err := errors.Join(relay, orders); err != nil {
		return err
	}
	tables, err := os.ReadFile(filepath.Join(examples, "orders", "tables.sql"))
	if err != nil {
		return err
	}
	s.tables = string(tables)
	out.step("built", "the relay and examples/orders, in %.1f s", time.Since(began).Seconds())
	return nil
}

// goCommand runs the go command in a folder, whatever workspace that is in, and
// returns what it prints.
func goCommand(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "GOWORK=off")
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go %s in %s: %w\n%s", args[0], dir, err, bytes.TrimSpace(complaint.Bytes()))
	}
	return string(bytes.TrimSpace(out)), nil
}

// command is the relay's, with the configuration of the demo.
func (s *servers) command(args ...string) *exec.Cmd {
	cmd := exec.Command(s.path("outbox-relay"), args...)
	cmd.Env = []string{
		"OUTBOX_POSTGRES_URL=" + s.postgres.URL("postgres"),
		"OUTBOX_NATS_URL=" + s.nats.ClientURL(),
		"OUTBOX_STREAM=" + stream,
		"OUTBOX_HTTP_ADDR=",
	}
	return cmd
}

func (s *servers) migrate(ctx context.Context) error {
	cmd := s.command("migrate")
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("outbox-relay migrate: %w\n%s", err, bytes.TrimSpace(out))
	}
	return nil
}

// startRelay returns once the relay streams.
func (s *servers) startRelay(ctx context.Context) (*program, error) {
	return s.start(ctx, "the relay", s.command(), "msg=streaming")
}

// startOrders starts a service of examples/orders and returns once it is ready.
func (s *servers) startOrders(ctx context.Context, service, ready string, env ...string) (*program, error) {
	cmd := exec.Command(s.path("orders"), service)
	cmd.Env = append(env, "DATABASE_URL="+s.postgres.URL("postgres"), "NATS_URL="+s.nats.ClientURL())
	return s.start(ctx, "orders "+service, cmd, ready)
}

// awaitStored waits until the stream has so many events.
func (s *servers) awaitStored(ctx context.Context, n uint64) error {
	for {
		stored, err := s.stored(ctx)
		if err != nil || stored >= n {
			return err
		}
		if err := wait.For(ctx, 5*time.Millisecond); err != nil {
			return err
		}
	}
}

func (s *servers) stored(ctx context.Context) (uint64, error) {
	info, err := s.js.Stream(ctx, stream)
	if err != nil {
		return 0, err
	}
	return info.CachedInfo().State.LastSeq, nil
}

// close stops everything, the last program first, and leaves nothing behind.
func (s *servers) close() error {
	var errs []error
	for _, p := range slices.Backward(s.programs) {
		errs = append(errs, p.stop())
	}
	if s.nc != nil {
		s.nc.Close()
	}
	if s.nats != nil {
		s.nats.Shutdown()
		s.nats.WaitForShutdown()
	}
	if s.sql != nil {
		_ = s.sql.Close(context.Background())
	}
	if s.postgres != nil {
		errs = append(errs, s.postgres.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(s.dir))...)
}
