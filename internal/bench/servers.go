package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/pgserver/child"
	"outbox-relay/internal/wait"
)

const (
	natsVersion = server.VERSION
	template    = "outbox" // a migrated database, of which each measurement gets a copy
)

// servers are Postgres, and the programs built for a run.
type servers struct {
	dir       string
	postgres  *pgserver.Cluster
	sql       *pgx.Conn // of the database postgres
	databases int
}

func newServers(ctx context.Context) (*servers, error) {
	s := &servers{}
	var err error
	if s.dir, err = os.MkdirTemp("", "outbox-relay-bench-"); err != nil {
		return s, err
	}
	for program, pkg := range map[string]string{"relay": "outbox-relay", "nats-server": "github.com/nats-io/nats-server/v2"} {
		if err := s.build(ctx, program, pkg); err != nil {
			return s, err
		}
	}
	return s, s.startPostgres(ctx)
}

func (s *servers) close() error {
	var err error
	if s.postgres != nil {
		err = s.postgres.Close()
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}

func (s *servers) path(name string) string { return filepath.Join(s.dir, name) }

func (s *servers) build(ctx context.Context, program, pkg string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", s.path(program), pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", pkg, err, bytes.TrimSpace(out))
	}
	return nil
}

func (s *servers) startPostgres(ctx context.Context) error {
	var err error
	s.postgres, err = pgserver.Start(ctx, pgserver.Options{Settings: map[string]string{
		"shared_buffers": "256MB", "max_wal_size": "8GB", "checkpoint_timeout": "1h", "autovacuum": "off",
	}})
	if err != nil {
		return err
	}
	if s.sql, err = pgx.Connect(ctx, s.postgres.URL("postgres")); err != nil {
		return err
	}
	if _, err := s.sql.Exec(ctx, `create database `+template); err != nil {
		return err
	}
	migrate := exec.CommandContext(ctx, s.path("relay"), "migrate")
	migrate.Env = []string{"OUTBOX_POSTGRES_URL=" + s.postgres.URL(template)}
	if out, err := migrate.CombinedOutput(); err != nil {
		return fmt.Errorf("migrate: %w\n%s", err, out)
	}
	return nil
}

// broker is one nats-server process, or a cluster of them.
type broker struct {
	nodes []*child.Process
	urls  []string
	dir   string
	nc    *nats.Conn
	js    jetstream.JetStream
}

// startBroker starts n servers with an empty store, on files.
func (s *servers) startBroker(ctx context.Context, n int) (*broker, error) {
	b := &broker{dir: s.path("nats")}
	err := b.launch(s.path("nats-server"), n)
	if err == nil {
		err = b.connect(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, b.close())
	}
	return b, nil
}

func (b *broker) launch(program string, n int) error {
	var routes []string
	for range n {
		port, err := pgserver.FreePort()
		if err != nil {
			return err
		}
		routes = append(routes, fmt.Sprintf("nats://127.0.0.1:%d", port))
	}
	for i := range n {
		port, err := pgserver.FreePort()
		if err != nil {
			return err
		}
		name := fmt.Sprintf("node%d", i+1)
		cmd := exec.Command(program, "-n", name, "-a", "127.0.0.1", "-p", fmt.Sprint(port), "-js", "-sd", filepath.Join(b.dir, name))
		if n > 1 {
			cmd.Args = append(cmd.Args, "--cluster_name", "bench", "--no_advertise", "--cluster", routes[i], "--routes", strings.Join(routes, ","))
		}
		node, err := child.Start(cmd, syscall.SIGKILL)
		if err != nil {
			return err
		}
		b.nodes = append(b.nodes, node)
		b.urls = append(b.urls, fmt.Sprintf("nats://127.0.0.1:%d", port))
	}
	return nil
}

// connect waits until streams can be made.
func (b *broker) connect(ctx context.Context) error {
	err := await(ctx, "NATS to accept connections", 5*time.Millisecond, func() (bool, error) {
		var err error
		b.nc, err = nats.Connect(b.url())
		return err == nil, nil
	})
	if err != nil {
		return err
	}
	if b.js, err = jetstream.New(b.nc); err != nil {
		return err
	}
	return await(ctx, "JetStream", 20*time.Millisecond, func() (bool, error) {
		config := jetstream.StreamConfig{Name: "READY", Subjects: []string{"ready"}, Replicas: len(b.nodes)}
		if _, err := b.js.CreateStream(ctx, config); err != nil {
			return false, nil // it has no leader yet, or not all nodes
		}
		return true, b.js.DeleteStream(ctx, config.Name)
	})
}

func (b *broker) url() string { return strings.Join(b.urls, ",") }

// cpu is what all nodes have used.
func (b *broker) cpu() (time.Duration, error) {
	var sum time.Duration
	for _, node := range b.nodes {
		used, err := cpuTime(node.Pid())
		if err != nil {
			return 0, err
		}
		sum += used
	}
	return sum, nil
}

func (b *broker) close() error {
	if b.nc != nil {
		b.nc.Close()
	}
	for _, node := range b.nodes {
		_ = node.Signal(syscall.SIGTERM) // it may have ended
		<-node.Done()
	}
	return os.RemoveAll(b.dir)
}

// await asks again and again until done.
func await(ctx context.Context, what string, pace time.Duration, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Minute, fmt.Errorf("waited 10 minutes for %s", what))
	defer cancel()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		if err := wait.For(ctx, pace); err != nil {
			return err
		}
	}
}
