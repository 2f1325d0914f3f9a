// outbox-relay publishes the events of a Postgres outbox table to a NATS
// JetStream stream: each exactly once, in commit order.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"outbox-relay/internal/config"
	"outbox-relay/migrations"
	"outbox-relay/ops"
	"outbox-relay/outbox"
	"outbox-relay/relay"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// Exit codes of the contract.
const (
	exitOK    = 0
	exitFatal = 1
	exitUsage = 2
)

const usage = `outbox-relay publishes the events of a Postgres outbox table to NATS JetStream.

  outbox-relay [run]             relay until SIGTERM or SIGINT
  outbox-relay migrate           make the table, the publication and the relay's own tables
  outbox-relay migrate --print   show the SQL of that instead
  outbox-relay healthcheck       ask the relay that runs here whether it is well
  outbox-relay version
  outbox-relay help              this, and every variable of the configuration
`

// version is set when a release is built.
var version string

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	command, args := split(args)
	commands := map[string]func(context.Context, config.Config, io.Writer, io.Writer) error{
		"run":         relayEvents,
		"migrate":     migrate,
		"healthcheck": healthcheck,
	}
	switch command {
	case "help":
		fmt.Fprintf(stdout, "%s\n%s", usage, config.Usage())
		return exitOK
	case "version":
		fmt.Fprintln(stdout, buildVersion())
		return exitOK
	}
	if command == "migrate" && len(args) == 1 && args[0] == "--print" {
		command, args = "migrate --print", nil
		commands[command] = printMigrations
	}
	do := commands[command]
	if do == nil || len(args) > 0 {
		fmt.Fprintf(stderr, "outbox-relay: unknown command or argument %q\n\n%s", append([]string{command}, args...), usage)
		return exitUsage
	}
	cfg, err := config.Load()
	if err != nil {
		fmt.Fprintf(stderr, "outbox-relay: the configuration has faults:\n%s\n", err)
		return exitUsage
	}
	if err := do(ctx, cfg, stdout, stderr); err != nil {
		fmt.Fprintf(stderr, "outbox-relay: %s\n", err)
		return exitFatal
	}
	return exitOK
}

func split(args []string) (command string, rest []string) {
	if len(args) == 0 {
		return "run", nil
	}
	switch args[0] {
	case "-h", "-help", "--help":
		return "help", nil
	case "-v", "-version", "--version":
		return "version", nil
	}
	return args[0], args[1:]
}

// relayEvents runs the relay and its HTTP server until ctx ends.
func relayEvents(ctx context.Context, cfg config.Config, _, stderr io.Writer) error {
	log := logger(cfg.Log, stderr)
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		collectors.NewBuildInfoCollector())
	r := relay.New(relayConfig(cfg), log, relay.NewMetrics(registry))
	log.Info("outbox-relay", "version", buildVersion(), "table", cfg.Postgres.Table.String(), "slot", cfg.Postgres.Slot,
		"stream", cfg.Stream.Name, "after_publish", string(cfg.AfterPublish))
	if cfg.HTTPAddr == "" {
		return r.Run(ctx)
	}
	listener, err := net.Listen("tcp", cfg.HTTPAddr)
	if err != nil {
		return fmt.Errorf("OUTBOX_HTTP_ADDR: %w: choose another address, or set it empty to serve nothing", err)
	}
	serving, stop := context.WithCancel(context.WithoutCancel(ctx)) // the server outlasts the draining
	group, working := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer stop()
		return r.Run(working)
	})
	group.Go(func() error { return ops.NewServer(r, registry).Run(serving, listener) })
	return group.Wait()
}

func relayConfig(cfg config.Config) relay.Config {
	columns := outbox.Columns{Extra: extraColumns(cfg.Subject)}
	return relay.Config{
		Postgres: cfg.Postgres.URL.Value,
		Table: outbox.Table{
			Schema: cfg.Postgres.Table.Schema, Name: cfg.Postgres.Table.Name,
			Publication: cfg.Postgres.Publication, Slot: cfg.Postgres.Slot,
			Mode: outbox.Mode(cfg.AfterPublish), Columns: columns,
		},
		Sink: func(system replication.System) sink.Config {
			return sinkConfig(cfg, system, columns)
		},
		Halt:         cfg.OnReject == config.OnRejectHalt,
		ConfirmDelay: cfg.ConfirmDelay,
		Backfill:     cfg.Backfill,
		Grace:        cfg.ShutdownGrace,
	}
}

func sinkConfig(cfg config.Config, system replication.System, columns outbox.Columns) sink.Config {
	tokens := make([]sink.Token, len(cfg.Subject.Tokens))
	for i, token := range cfg.Subject.Tokens {
		tokens[i] = sink.Token(token)
	}
	return sink.Config{
		Servers: cfg.NATS.Servers.URLs(),
		Auth: sink.Auth{
			Creds: cfg.NATS.Creds, NKey: secret(cfg.NATS.NKey), User: cfg.NATS.User,
			Password: secret(cfg.NATS.Password), Token: secret(cfg.NATS.Token),
		},
		TLS:         sink.TLS{CA: cfg.NATS.CA, Cert: cfg.NATS.Cert, Key: cfg.NATS.Key, First: cfg.NATS.TLSFirst},
		Domain:      cfg.NATS.Domain,
		InboxPrefix: cfg.NATS.InboxPrefix,
		Stream: sink.StreamConfig{
			Name: cfg.Stream.Name, Create: cfg.Stream.Create, Subjects: cfg.Subject.Wildcard(),
			Replicas: cfg.Stream.Replicas, MaxAge: cfg.Stream.MaxAge, DuplicateWindow: cfg.Stream.DuplicateWindow,
			SystemID: system.ID, Slot: cfg.Postgres.Slot,
		},
		Message: sink.MessageConfig{
			Subject: tokens, CloudEvents: cfg.Headers == config.HeadersCloudEvents,
			Source: cfg.Source.Expand(system.Database, cfg.Postgres.Slot), Timeline: system.Timeline, Columns: columns,
		},
		MaxInflight: cfg.MaxInflight,
		MaxBytes:    int(cfg.MaxInflightBytes),
	}
}

// secret returns how to read the secret, or nil where none is set.
func secret(s config.Secret) func() (string, error) {
	if !s.IsSet() {
		return nil
	}
	return s.Value
}

// extraColumns names the columns that only the subject needs.
func extraColumns(subject config.Subject) []string {
	usual := map[string]bool{}
	for _, field := range (outbox.Columns{}).Fields(&outbox.Event{}) {
		usual[field.Name] = true
	}
	var extra []string
	for _, column := range subject.Columns() {
		if !usual[column] {
			extra = append(extra, column)
			usual[column] = true
		}
	}
	return extra
}

func target(cfg config.Config) migrations.Target {
	return migrations.Target{Schema: cfg.Postgres.Table.Schema, Table: cfg.Postgres.Table.Name,
		Publication: cfg.Postgres.Publication, Columns: extraColumns(cfg.Subject)}
}

func migrate(ctx context.Context, cfg config.Config, _, stderr io.Writer) error {
	url, err := cfg.Postgres.URL.Value()
	if err != nil {
		return err
	}
	postgres, err := pgx.ParseConfig(url)
	if err != nil {
		return fmt.Errorf("OUTBOX_POSTGRES_URL: %w", err)
	}
	return migrations.Up(ctx, postgres, target(cfg), logger(cfg.Log, stderr))
}

func printMigrations(_ context.Context, cfg config.Config, stdout, _ io.Writer) error {
	rendered, err := migrations.Render(target(cfg))
	if err != nil {
		return err
	}
	for _, file := range rendered {
		fmt.Fprintf(stdout, "-- %s\n\n%s\n", file.Name, file.SQL)
	}
	return nil
}

func healthcheck(ctx context.Context, cfg config.Config, _, _ io.Writer) error {
	return ops.Healthcheck(ctx, cfg.HTTPAddr)
}

func logger(cfg config.Log, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.Level}
	if cfg.Format == config.LogJSON {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "development"
}
