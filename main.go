// outbox-relay publishes the events of a Postgres outbox table to a NATS
// JetStream stream: each exactly once, in commit order.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"outbox-relay/internal/config"
	"outbox-relay/internal/dsn"
	"outbox-relay/internal/progress"
	"outbox-relay/migrations"
	"outbox-relay/ops"
	"outbox-relay/outbox"
	"outbox-relay/outbox/event"
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
      --partitioned                a table that is partitioned by time, where there is none yet
      --print                      show the SQL instead
  outbox-relay status [--json]   how slot, checkpoint, stream and rows stand, and what is wrong;
                                 exit code 0 whatever it finds, as long as Postgres can be asked
  outbox-relay doctor [--json]   examine both ends, before going live and after, and say how to mend
                                 what is wrong; it changes nothing; exit code 1 where there is a fault
  outbox-relay retry ID…         have failed rows published again, once their cause is mended
  outbox-relay retry --all       have all failed rows published again
  outbox-relay park ID [REASON]  let a relay that halted before this event pass over it: it is failed
      --gone                       also if its row was deleted
  outbox-relay replay …          have rows that are still in the table published once more:
      --from TIME, --to TIME       created_at in [from, to): RFC 3339, or a date in UTC
      --aggregate-type T, --event-type T
      --id ID                      may be given many times
      --all                        every row, where none of the above is given
      --run NAME, --after ID       go on with a run: the same name gives a message the same id
      --dry-run                    only say which rows
      --yes                        do not ask
  outbox-relay drop SLOT         remove a relay that is not to come back: slot, publication, checkpoint
      --force                      with what is kept of rejected events
  outbox-relay healthcheck       ask the relay that runs here whether it is well
  outbox-relay version           version, commit, and the Go that built it
  outbox-relay help              this, and every variable of the configuration
`

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// streams are the program's own.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// action is a command, with its arguments bound.
type action func(ctx context.Context, cfg config.Config, std streams) error

// commands bind their arguments, and refuse those that make no sense.
var commands = map[string]func(args []string) (action, error){
	"run":         plain(relayEvents),
	"migrate":     parseMigrate,
	"status":      parseStatus,
	"doctor":      parseDoctor,
	"retry":       parseRetry,
	"park":        parsePark,
	"replay":      parseReplay,
	"drop":        parseDrop,
	"healthcheck": plain(healthcheck),
}

func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	defer signal.Stop(signals)
	command, args := split(args)
	switch command {
	case "help":
		fmt.Fprintf(stdout, "%s\n%s", usage, config.Usage())
		return exitOK
	case "version":
		fmt.Fprint(stdout, versionText())
		return exitOK
	}
	parse := commands[command]
	if parse == nil {
		fmt.Fprintf(stderr, "outbox-relay: unknown command %q\n\n%s", command, usage)
		return exitUsage
	}
	do, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stdout, usage)
		return exitOK
	}
	if err != nil {
		fmt.Fprintf(stderr, "outbox-relay %s: %s: see `outbox-relay help`\n", command, err)
		return exitUsage
	}
	cfg, err := config.Load()
	if err != nil {
		fmt.Fprintf(stderr, "outbox-relay: the configuration has faults:\n%s\n", err)
		return exitUsage
	}
	err = obey(signals, cfg.ShutdownGrace, func(ctx context.Context) error { return do(ctx, cfg, streams{stdin, stdout, stderr}) })
	switch {
	case errors.Is(err, errGrace) && command == "run":
		logger(cfg.Log, stderr).Warn("stopped before all was done: the next start takes it up", "error", err)
		return exitOK
	case errors.Is(err, ops.ErrUsage):
		fmt.Fprintf(stderr, "outbox-relay: %s\n", err)
		return exitUsage
	case err != nil && command == "run" && cfg.Log.Format == config.LogJSON:
		logger(cfg.Log, stderr).Error("halted", "error", err)
		return exitFatal
	case err != nil:
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

// admin is what the operator's commands work with. They make no stream, so that
// they need not know the cluster's identity.
func admin(cfg config.Config, std streams) ops.Admin {
	relaying := relayConfig(cfg)
	return ops.Admin{
		Postgres: relaying.Postgres, Table: relaying.Table, Sink: relaying.Sink(replication.System{}), HTTP: cfg.HTTP.Addr,
		In: std.in, Out: std.out, Err: std.err,
	}
}

// relayEvents runs the relay and its HTTP server until ctx ends.
func relayEvents(ctx context.Context, cfg config.Config, std streams) error {
	out, bars := terminal(std.err)
	journal := ops.NewJournal(logger(cfg.Log, out).Handler())
	log := slog.New(journal)
	cfg.MaxInflightBytes = limitMemory(cfg.MaxInflightBytes, log)
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		collectors.NewBuildInfoCollector())
	registry.MustRegister(buildInfo())
	relaying := relayConfig(cfg)
	tracing, err := ops.StartTracing(ctx, buildVersion(), cfg.Subject.String(), log)
	if err != nil {
		return err
	}
	if tracing != nil {
		defer tracing.Stop()
		relaying.Tracer = tracing
	}
	relaying.Bar = bars
	r := relay.New(relaying, log, relay.NewMetrics(registry))
	log.Info("outbox-relay", "version", buildVersion(), "table", cfg.Postgres.Table.String(), "slot", cfg.Postgres.Slot,
		"stream", cfg.Stream.Name, "after_publish", string(cfg.AfterPublish))
	if cfg.HTTP.Addr == "" {
		return r.Run(ctx)
	}
	listener, err := net.Listen("tcp", cfg.HTTP.Addr)
	if err != nil {
		return fmt.Errorf("OUTBOX_HTTP_ADDR: %w: choose another address, or set it empty to serve nothing", err)
	}
	serving, stop := context.WithCancel(context.WithoutCancel(ctx)) // the server outlasts the draining
	group, working := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer stop()
		return r.Run(working)
	})
	server := ops.NewServer(ops.Serving{
		Relay: r, Gatherer: registry, Journal: journal, Log: log, Admin: admin(cfg, std),
		Token: secret(cfg.HTTP.Token), Debug: cfg.HTTP.Debug, Version: buildVersion(), Stream: cfg.Stream.Name,
	})
	group.Go(func() error { return server.Run(serving, listener) })
	return group.Wait()
}

func relayConfig(cfg config.Config) relay.Config {
	columns := event.Columns{Names: cfg.Columns, Extra: extraColumns(cfg)}
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
		Housekeeping: relay.Housekeeping{
			Retention: cfg.Retention,
			Retries:   outbox.Retries{Attempts: cfg.Retry.Attempts, Backoff: cfg.Retry.Backoff},
		},
		Grace: cfg.ShutdownGrace,
	}
}

func sinkConfig(cfg config.Config, system replication.System, columns event.Columns) sink.Config {
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
func extraColumns(cfg config.Config) []string {
	columns := event.Columns{Names: cfg.Columns}
	var extra []string
	for _, column := range cfg.Subject.Columns() {
		if columns.Find(&event.Event{}, column) == nil {
			extra = append(extra, column)
		}
	}
	return extra
}

// target is what `migrate` brings about.
func target(cfg config.Config) migrations.Target {
	return migrations.Target{Schema: cfg.Postgres.Table.Schema, Table: cfg.Postgres.Table.Name,
		Publication: cfg.Postgres.Publication, Columns: extraColumns(cfg), Names: cfg.Columns}
}

func migrate(ctx context.Context, cfg config.Config, target migrations.Target, std streams) error {
	url, err := cfg.Postgres.URL.Value()
	if err != nil {
		return err
	}
	postgres, err := dsn.Parse(url)
	if err != nil {
		return fmt.Errorf("OUTBOX_POSTGRES_URL %w", err)
	}
	out, bars := terminal(std.err)
	conn, err := pgx.ConnectConfig(ctx, postgres)
	if err != nil {
		return relay.ExplainConnect(err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := relayConfig(cfg).Table.CheckBefore(ctx, conn); err != nil {
		return err
	}
	if err := migrateShown(ctx, postgres, target, logger(cfg.Log, out), bars); err != nil {
		return err
	}
	_, err = relayConfig(cfg).Table.Inspect(ctx, conn) // what the first run would find wrong
	return err
}

// migrateShown migrates, with a bar where there is a terminal.
func migrateShown(ctx context.Context, postgres *pgx.ConnConfig, target migrations.Target, log *slog.Logger, bars func(string, int) relay.Bar) error {
	var bar relay.Bar
	step := func(done, total int) {
		switch {
		case bar != nil:
			bar.Set(done)
		case bars != nil && total > 0:
			bar = bars("migrating", total)
		}
	}
	defer func() {
		if bar != nil {
			bar.End()
		}
	}()
	return migrations.Up(ctx, postgres, target, log, step)
}

func printMigrations(target migrations.Target, std streams) error {
	rendered, err := migrations.Render(target)
	if err != nil {
		return err
	}
	for _, file := range rendered {
		fmt.Fprintf(std.out, "-- %s\n\n%s\n", file.Name, file.SQL)
	}
	return nil
}

func healthcheck(ctx context.Context, cfg config.Config, _ streams) error {
	return ops.Healthcheck(ctx, cfg.HTTP.Addr)
}

// terminal returns where the log goes and, if that is a terminal, what shows a bar
// there that the log does not tear.
func terminal(out io.Writer) (log io.Writer, bars func(what string, total int) relay.Bar) {
	t := progress.Open(out)
	if t == nil {
		return out, nil
	}
	return t, func(what string, total int) relay.Bar { return t.Bar(what, total) }
}

func logger(cfg config.Log, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.Level}
	if cfg.Format == config.LogJSON {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}
