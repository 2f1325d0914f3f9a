package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/pgserver/child"
)

const natsVersion = server.VERSION

// servers are the real processes of a run, and the programs built for it.
type servers struct {
	dir      string
	postgres *pgserver.Cluster
	sql      *pgx.Conn
	nats     *child.Process
	natsURL  string
	js       jetstream.JetStream
	nc       *nats.Conn
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
	if err := s.startPostgres(ctx); err != nil {
		return s, err
	}
	return s, s.startNATS(ctx)
}

func (s *servers) close() error {
	if s.nc != nil {
		s.nc.Close()
	}
	if s.nats != nil {
		_ = s.nats.Signal(syscall.SIGTERM) // it may have ended
		<-s.nats.Done()
	}
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
	s.sql, err = pgx.Connect(ctx, s.postgres.URL("postgres"))
	return err
}

func (s *servers) startNATS(ctx context.Context) error {
	port, err := pgserver.FreePort()
	if err != nil {
		return err
	}
	s.natsURL = fmt.Sprintf("nats://127.0.0.1:%d", port)
	cmd := exec.Command(s.path("nats-server"), "-a", "127.0.0.1", "-p", fmt.Sprint(port), "-js", "-sd", s.path("nats"))
	if s.nats, err = child.Start(cmd, syscall.SIGKILL); err != nil {
		return err
	}
	err = await(ctx, "NATS to accept connections", time.Millisecond, func() (bool, error) {
		s.nc, err = nats.Connect(s.natsURL)
		return err == nil, nil
	})
	if err != nil {
		return err
	}
	s.js, err = jetstream.New(s.nc)
	return err
}

// await asks again and again until done.
func await(ctx context.Context, what string, pace time.Duration, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Minute, fmt.Errorf("waited 10 minutes for %s", what))
	defer cancel()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pace):
		}
	}
}
