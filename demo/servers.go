package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/pgserver"
	"outbox-relay/internal/pgserver/child"
)

const stream = "EVENTS"

// servers are what runs beside the shop: Postgres, NATS, and the relay as a
// process of its own.
type servers struct {
	dir      string
	postgres *pgserver.Cluster
	nats     *server.Server
	nc       *nats.Conn
	js       jetstream.JetStream
	relay    *child.Process
	log      safeBuffer // what the relay has to say
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
	if s.postgres, err = pgserver.Start(ctx, pgserver.Options{Logf: tell}); err != nil {
		return s, fmt.Errorf("start Postgres: %w", err)
	}
	if err := s.startNATS(); err != nil {
		return s, fmt.Errorf("start NATS: %w", err)
	}
	out.step("started", "Postgres %d and NATS %s, for this demo only, in %.1f s", s.postgres.Version(), server.VERSION, time.Since(began).Seconds())
	if err := s.build(ctx); err != nil {
		return s, err
	}
	if err := s.migrate(ctx); err != nil {
		return s, err
	}
	out.step("migrated", "outbox-relay migrate: the table events, its trigger, the publication")
	return s, nil
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

func (s *servers) program() string { return filepath.Join(s.dir, "outbox-relay") }

func (s *servers) build(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "go", "build", "-o", s.program(), "outbox-relay").CombinedOutput()
	if err != nil {
		return fmt.Errorf("build the relay (run the demo in its repository): %w\n%s", err, bytes.TrimSpace(out))
	}
	return nil
}

// command is the relay's, with the configuration of the demo.
func (s *servers) command(args ...string) *exec.Cmd {
	cmd := exec.Command(s.program(), args...)
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
func (s *servers) startRelay(ctx context.Context) error {
	cmd := s.command()
	from := s.log.len()
	cmd.Stdout, cmd.Stderr = &s.log, &s.log
	var err error
	if s.relay, err = child.Start(cmd, syscall.SIGTERM); err != nil {
		return err
	}
	for !bytes.Contains(s.log.from(from), []byte("msg=streaming")) {
		select {
		case <-s.relay.Done():
			return fmt.Errorf("the relay ended:\n%s", s.log.from(from))
		default:
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// killRelay kills the relay in whatever it is doing.
func (s *servers) killRelay() {
	_ = s.relay.Signal(syscall.SIGKILL) // it may have ended, which its log then tells
	<-s.relay.Done()
}

// awaitStored waits until the stream has so many events.
func (s *servers) awaitStored(ctx context.Context, n uint64) error {
	for {
		stored, err := s.stored(ctx)
		if err != nil || stored >= n {
			return err
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
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

// progress returns how many events are stored and committed.
func (s *servers) progress(ctx context.Context, shop *shop) (stored uint64, committed int, err error) {
	stored, err = s.stored(ctx)
	return stored, shop.ledger.len(), err
}

// close stops everything, the relay first, and leaves nothing behind.
func (s *servers) close() error {
	var relay, postgres error
	if s.relay != nil {
		_ = s.relay.Signal(syscall.SIGTERM) // it may have ended
		if code := s.relay.ExitCode(); code > 0 {
			relay = fmt.Errorf("the relay ended with exit code %d:\n%s", code, s.log.from(0))
		}
	}
	if s.nc != nil {
		s.nc.Close()
	}
	if s.nats != nil {
		s.nats.Shutdown()
		s.nats.WaitForShutdown()
	}
	if s.postgres != nil {
		postgres = s.postgres.Close()
	}
	return errors.Join(relay, postgres, os.RemoveAll(s.dir))
}

// safeBuffer keeps what is written to it. Safe for concurrent use.
type safeBuffer struct {
	mu   sync.Mutex
	text []byte
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text = append(b.text, p...)
	return len(p), nil
}

func (b *safeBuffer) from(n int) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.text[n:])
}

func (b *safeBuffer) len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.text)
}
