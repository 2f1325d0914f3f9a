// Costs measures what the outbox costs Postgres: recording outcomes in each mode,
// with and without HOT updates, what retention does to writers, what the walsender
// uses by publication and options, by its reader, for large transactions and for each
// more slot, and what an insert is made of. It uses the relay's own statements on a
// throw-away Postgres, and compares within one run only: rounds alternate, and their
// medians count. Linux only, for it reads the CPU time of backends from /proc.
//
//	POSTGRES_VERSION=18 go run ./internal/costs recording
//	POSTGRES_VERSION=18 go run ./internal/costs retention
//	POSTGRES_VERSION=18 go run ./internal/costs walsender
//	POSTGRES_VERSION=18 go run ./internal/costs readers
//	POSTGRES_VERSION=18 go run ./internal/costs large
//	POSTGRES_VERSION=18 go run ./internal/costs slots
//	POSTGRES_VERSION=18 go run ./internal/costs insert
package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/lsn"
	"outbox-relay/internal/pgserver"
	"outbox-relay/migrations"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "costs:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	measurements := map[string]func(context.Context, []string, io.Writer) error{
		"recording": recording, "retention": retention, "walsender": walsender, "readers": readers, "large": large, "slots": slots, "insert": insert,
	}
	if len(args) == 0 || measurements[args[0]] == nil {
		return fmt.Errorf("say what to measure: one of %s", strings.Join(slices.Sorted(maps.Keys(measurements)), ", "))
	}
	return measurements[args[0]](ctx, args[1:], out)
}

func flags(name string) *flag.FlagSet { return flag.NewFlagSet("costs "+name, flag.ContinueOnError) }

// server is a throw-away Postgres; its databases are made one after the other.
type server struct {
	*pgserver.Cluster
	databases int
}

// begin takes the arguments, and starts the server that a measurement needs, which
// it describes.
func begin(ctx context.Context, flags *flag.FlagSet, args []string, settings map[string]string, out io.Writer) (*server, error) {
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	s, err := start(ctx, settings)
	if err == nil {
		s.describe(out)
	}
	return s, err
}

func start(ctx context.Context, settings map[string]string) (*server, error) {
	all := map[string]string{"shared_buffers": "512MB", "max_wal_size": "8GB", "checkpoint_timeout": "1h"}
	for name, value := range settings {
		all[name] = value
	}
	cluster, err := pgserver.Start(ctx, pgserver.Options{Settings: all})
	return &server{Cluster: cluster}, err
}

func (s *server) describe(out io.Writer) {
	fmt.Fprintf(out, "Postgres %d, %d CPUs\n\n", s.Version(), runtime.NumCPU())
}

// migrated is a new database with an outbox; prepare is SQL to run then.
func (s *server) migrated(ctx context.Context, prepare string) (*database, error) {
	s.databases++
	name := fmt.Sprintf("costs_%d", s.databases)
	admin, err := pgx.Connect(ctx, s.URL("postgres"))
	if err != nil {
		return nil, err
	}
	defer admin.Close(ctx)
	if _, err := admin.Exec(ctx, `create database `+name); err != nil {
		return nil, err
	}
	config, err := pgx.ParseConfig(s.URL(name))
	if err != nil {
		return nil, err
	}
	target := migrations.Target{Schema: "public", Table: "events", Publication: "outbox_relay"}
	if err := migrations.Up(ctx, config, target, slog.New(slog.DiscardHandler)); err != nil {
		return nil, err
	}
	d := &database{url: s.URL(name)}
	if d.sql, err = d.connect(ctx); err != nil {
		return nil, err
	}
	_, err = d.sql.Exec(ctx, prepare)
	return d, err
}

type database struct {
	url   string
	sql   *pgx.Conn
	conns []*pgx.Conn
}

func (d *database) connect(ctx context.Context) (*pgx.Conn, error) {
	conn, err := pgx.Connect(ctx, d.url)
	if err == nil {
		d.conns = append(d.conns, conn)
	}
	return conn, err
}

// planned has a connection plan its statements as the relay's are: for each batch.
func planned(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, `set plan_cache_mode = force_custom_plan`)
	return err
}

func (d *database) close(ctx context.Context) {
	for _, conn := range d.conns {
		_ = conn.Close(ctx)
	}
}

// value returns a query's only value.
func value[T any](ctx context.Context, conn *pgx.Conn, sql string, args ...any) (T, error) {
	var v T
	err := conn.QueryRow(ctx, sql, args...).Scan(&v)
	return v, err
}

// meter adds up what statements on one connection cost.
type meter struct {
	conn *pgx.Conn
	sql  *pgx.Conn // asks where WAL ends
	cpu  time.Duration
	wal  uint64 // bytes
}

// measure runs use, which works on the meter's connection alone.
func (m *meter) measure(ctx context.Context, use func() error) error {
	wal, err := walEnd(ctx, m.sql)
	if err != nil {
		return err
	}
	cpu, err := backendCPU(m.conn)
	if err != nil {
		return err
	}
	if err := use(); err != nil {
		return err
	}
	cpuAfter, err := backendCPU(m.conn)
	if err != nil {
		return err
	}
	walAfter, err := walEnd(ctx, m.sql)
	m.cpu += cpuAfter - cpu
	m.wal += walAfter - wal
	return err
}

func walEnd(ctx context.Context, conn *pgx.Conn) (uint64, error) {
	text, err := value[string](ctx, conn, `select pg_current_wal_insert_lsn()::text`)
	if err != nil {
		return 0, err
	}
	end, err := lsn.Parse(text)
	return uint64(end), err
}

// backendCPU is the time that the backend has run, in ns the first number of its
// schedstat. Source: Documentation/scheduler/sched-stats.rst of Linux.
func backendCPU(conn *pgx.Conn) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", conn.PgConn().PID()))
	if err != nil {
		return 0, fmt.Errorf("read a backend's CPU time: %w", err)
	}
	ns, err := strconv.ParseInt(strings.Fields(string(text))[0], 10, 64)
	return time.Duration(ns), err
}

// spread is a figure in all rounds.
type spread []float64

// String shows the median, and the least and the greatest.
func (s spread) String() string {
	sorted := slices.SortedFunc(slices.Values(s), cmp.Compare[float64])
	show := func(v float64) string {
		if v >= 100 || v == 0 {
			return fmt.Sprintf("%.0f", v)
		}
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%s (%s-%s)", show(sorted[len(sorted)/2]), show(sorted[0]), show(sorted[len(sorted)-1]))
}
