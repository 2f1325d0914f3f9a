package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"outbox-relay/internal/pgserver/child"
)

const publication = "outbox_relay"

// prepare makes the table and everybody's slot: all stand before the backlog
// that they will read.
func (s *servers) prepare(ctx context.Context, rounds int, settings []string) error {
	if out, err := s.relay(0, settings, "migrate").CombinedOutput(); err != nil {
		return fmt.Errorf("migrate: %w\n%s", err, out)
	}
	for i := range rounds {
		if err := s.makeRelaySlot(ctx, i, settings); err != nil {
			return fmt.Errorf("first run of the relay: %w", err)
		}
		if _, err := s.sql.Exec(ctx, `select pg_create_logical_replication_slot($1, 'pgoutput')`, limitSlot(i)); err != nil {
			return err
		}
	}
	return nil
}

func limitSlot(round int) string { return fmt.Sprintf("limit_%d", round) }
func relaySlot(round int) string { return fmt.Sprintf("relay_%d", round) }
func stream(round int) string    { return fmt.Sprintf("BENCH_%d", round) }

// relay is a relay with its own slot and stream for each round.
func (s *servers) relay(round int, settings []string, args ...string) *exec.Cmd {
	cmd := exec.Command(s.path("relay"), args...)
	cmd.Env = append([]string{
		"OUTBOX_POSTGRES_URL=" + s.postgres.URL("postgres"),
		"OUTBOX_NATS_URL=" + s.natsURL,
		"OUTBOX_SLOT=" + relaySlot(round),
		"OUTBOX_STREAM=" + stream(round),
		fmt.Sprintf("OUTBOX_SUBJECT=bench_%d.{aggregate_type}.{event_type}", round),
		"OUTBOX_HTTP_ADDR=",
	}, settings...)
	return cmd
}

// makeRelaySlot runs the relay until it has made its slot and its stream.
func (s *servers) makeRelaySlot(ctx context.Context, round int, settings []string) error {
	cmd := s.relay(round, settings)
	var log bytes.Buffer
	cmd.Stderr = &log
	process, err := child.Start(cmd, syscall.SIGKILL)
	if err != nil {
		return err
	}
	err = await(ctx, "the relay's slot", 10*time.Millisecond, func() (bool, error) {
		var ready bool
		err := s.sql.QueryRow(ctx, `select exists (select from outbox_relay_checkpoints where slot = $1 and phase = 'streaming')`,
			relaySlot(round)).Scan(&ready)
		return ready || isDone(process), err
	})
	_ = process.Signal(syscall.SIGTERM) // it may have ended
	if code := process.ExitCode(); err == nil && code != 0 {
		err = fmt.Errorf("exit code %d\n%s", code, log.Bytes())
	}
	return err
}

func isDone(p *child.Process) bool {
	select {
	case <-p.Done():
		return true
	default:
		return false
	}
}

// fill writes the backlog.
func (s *servers) fill(ctx context.Context, load backlog) error {
	_, err := s.sql.Exec(ctx, `set synchronous_commit = off;
		create procedure fill(transactions int, events int, bytes int) language plpgsql as $$
		begin
			for t in 1..transactions loop
				insert into events (aggregate_type, aggregate_id, event_type, payload)
				select 'order', 'order-' || t, 'created', jsonb_build_object('order', t, 'line', i, 'text', repeat('x', greatest(0, bytes - 40)))
				from generate_series(1, events) i;
				commit;
			end loop;
		end $$;`)
	if err != nil {
		return err
	}
	if _, err := s.sql.Exec(ctx, `call fill($1, $2, $3)`, load.events/load.perTransaction, load.perTransaction, load.payload); err != nil {
		return err
	}
	_, err = s.sql.Exec(ctx, `checkpoint`)
	return err
}

// readByRelay measures from the first to the last stored event, by the
// stream's own timestamps.
func (s *servers) readByRelay(ctx context.Context, round, events int, settings []string) (measurement, error) {
	m := measurement{events: events}
	cmd := s.relay(round, settings)
	var log bytes.Buffer
	cmd.Stderr = &log
	process, err := child.Start(cmd, syscall.SIGKILL)
	if err != nil {
		return m, err
	}
	err = await(ctx, "all events in the stream", 20*time.Millisecond, func() (bool, error) {
		info, err := s.js.Stream(ctx, stream(round))
		if err != nil {
			return false, err
		}
		state := info.CachedInfo().State
		m.took = state.LastTime.Sub(state.FirstTime)
		return state.LastSeq >= uint64(events) || isDone(process), nil
	})
	if err == nil {
		err = s.awaitRecorded(ctx, round, events, process)
	}
	_ = process.Signal(syscall.SIGTERM) // it may have ended
	if code := process.ExitCode(); err == nil && code != 0 {
		err = fmt.Errorf("exit code %d\n%s", code, log.Bytes())
	}
	if err != nil {
		return m, err
	}
	m.cpu, m.memory = process.Usage()
	return m, s.js.DeleteStream(ctx, stream(round))
}

// awaitRecorded waits until the slot has passed the backlog, so that the
// relay's whole work is in its CPU time.
func (s *servers) awaitRecorded(ctx context.Context, round, events int, process *child.Process) error {
	return await(ctx, "the slot to move on", 20*time.Millisecond, func() (bool, error) {
		var done bool
		err := s.sql.QueryRow(ctx, `select stream_sequence >= $2 from outbox_relay_checkpoints where slot = $1`,
			relaySlot(round), events).Scan(&done)
		return done || isDone(process), err
	})
}

// readByRecvlogical measures from the first to the last byte in the file.
func (s *servers) readByRecvlogical(ctx context.Context, round, events int) (measurement, error) {
	m := measurement{events: events}
	program, err := s.recvlogical()
	if err != nil {
		return m, err
	}
	var end string
	if err := s.sql.QueryRow(ctx, `select pg_current_wal_lsn()::text`).Scan(&end); err != nil {
		return m, err
	}
	file := s.path("backlog")
	defer os.Remove(file)
	cmd := exec.Command(program, "--dbname", s.postgres.URL("postgres"), "--slot", limitSlot(round), "--start", "--file", file,
		"--endpos", end, "-o", "proto_version=1", "-o", "publication_names="+publication, "-o", "messages=true")
	var log bytes.Buffer
	cmd.Stderr = &log
	process, err := child.Start(cmd, syscall.SIGKILL)
	if err != nil {
		return m, err
	}
	var size int64
	var first, last time.Time
	err = await(ctx, "pg_recvlogical", 500*time.Microsecond, func() (bool, error) {
		if info, err := os.Stat(file); err == nil && info.Size() > size {
			size, last = info.Size(), time.Now()
			if first.IsZero() {
				first = last
			}
		}
		return isDone(process), nil
	})
	_ = process.Signal(syscall.SIGTERM) // it may have ended
	if code := process.ExitCode(); err == nil && code != 0 {
		err = fmt.Errorf("exit code %d\n%s", code, log.Bytes())
	}
	m.took = last.Sub(first)
	m.cpu, m.memory = process.Usage()
	return m, err
}

// recvlogical finds pg_recvlogical, which the downloaded servers lack: any
// version reads from any server.
func (s *servers) recvlogical() (string, error) {
	if path, err := exec.LookPath(filepath.Join(s.postgres.Bin(), "pg_recvlogical")); err == nil {
		return path, nil
	}
	if path, err := exec.LookPath("pg_recvlogical"); err == nil {
		return path, nil
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/pg_recvlogical") // its only error is a bad pattern
	if len(found) == 0 {
		return "", fmt.Errorf("pg_recvlogical is not here: it comes with PostgreSQL's client or server programs")
	}
	return slices.Max(found), nil
}
