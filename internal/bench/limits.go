package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/jackc/pglogrepl"
	"golang.org/x/sync/errgroup"

	"outbox-relay/internal/pgserver/child"
	"outbox-relay/outbox/event"
	"outbox-relay/sink"
)

// The limits that the relay is compared with, each in events a second.

// readByRecvlogical measures from the first to the last byte in the file.
func (d *database) readByRecvlogical(ctx context.Context, w Workload, end string) (float64, error) {
	program, err := d.servers.recvlogical()
	if err != nil {
		return 0, err
	}
	file := d.servers.path("backlog")
	defer os.Remove(file)
	cmd := exec.Command(program, "--dbname", d.url, "--slot", d.slot("limit"), "--start", "--file", file,
		"--endpos", end, "-o", "proto_version=1", "-o", "publication_names="+publication, "-o", "messages=true")
	var log bytes.Buffer
	cmd.Stderr = &log
	process, err := child.Start(cmd, syscall.SIGKILL)
	if err != nil {
		return 0, err
	}
	var size int64
	var first, last time.Time
	err = await(ctx, "pg_recvlogical", 2*time.Millisecond, func() (bool, error) {
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
	if minimum := int64(w.Events) * int64(w.Payload/2); err == nil && size < minimum {
		err = fmt.Errorf("it wrote %d bytes, less than %d", size, minimum)
	}
	return w.rate(last.Sub(first)), err
}

func (w Workload) rate(took time.Duration) float64 { return float64(w.Events) / took.Seconds() }

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

// rawEvents bounds what is published without Postgres: its rate does not depend on
// how much it is.
const rawEvents = 300_000

// publishRaw measures the relay's own sink, fed from memory: the same messages in
// the same chain, without Postgres. From the first to the last stored message, by
// the stream's own timestamps.
func (b *broker) publishRaw(ctx context.Context, w Workload) (float64, error) {
	w.Events = min(w.Events, rawEvents)
	client, err := sink.Connect(ctx, sink.Config{
		Servers: b.urls, InboxPrefix: "_INBOX_bench", MaxInflight: 8192, MaxBytes: 64 << 20,
	}, slog.New(slog.DiscardHandler))
	if err != nil {
		return 0, err
	}
	defer client.Close()
	stream, err := client.OpenStream(ctx, sink.StreamConfig{
		Name: "RAW", Create: true, Subjects: "raw.*.*", Replicas: w.Replicas, DuplicateWindow: 2 * time.Minute, SystemID: "1", Slot: "raw",
	})
	if err != nil {
		return 0, err
	}
	chain := client.NewChain(sink.Origin{Stream: stream, Message: sink.MessageConfig{
		Subject:     []sink.Token{{Literal: "raw"}, {Column: "aggregate_type"}, {Column: "event_type"}},
		CloudEvents: w.Headers == "cloudevents", Source: "/bench/raw", Timeline: 1,
	}}, indifferent{})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var group errgroup.Group
	group.Go(func() error { return chain.Run(ctx) })
	err = publishAll(ctx, chain, w)
	cancel()
	if runErr := group.Wait(); err == nil && !errors.Is(runErr, context.Canceled) {
		err = runErr
	}
	if err != nil {
		return 0, err
	}
	took, err := b.storing(context.WithoutCancel(ctx), stream.Name, w.Events)
	return w.rate(took), err
}

func publishAll(ctx context.Context, chain *sink.Chain, w Workload) error {
	payload := fmt.Appendf(nil, `{"text": "%s"}`, bytes.Repeat([]byte{'x'}, max(0, w.Payload-12)))
	e := event.Event{
		Version: []byte("0"), AggregateType: []byte("order"), AggregateID: []byte("order-42"), EventType: []byte("created"),
		Status: []byte("pending"), CreatedAt: []byte("2026-11-24 12:00:00.123456+00"), Payload: payload,
	}
	for i := range w.Events {
		e.ID = fmt.Appendf(e.ID[:0], "event_01M84GZK0V5X0J%012d", i)
		e.Position = event.Position{Commit: pglogrepl.LSN(1 + i/w.PerTransaction), Ordinal: uint64(1 + i%w.PerTransaction)}
		if err := chain.Publish(ctx, uint64(i), &e); err != nil {
			return err
		}
	}
	chain.Flush()
	return chain.Drain(ctx)
}

// indifferent takes every outcome, but for those that a broker of our own has no
// reason for.
type indifferent struct{}

func (indifferent) Stored(uint64, uint64, bool, *event.Event, time.Time, time.Time) {}
func (indifferent) Rejected(_ context.Context, _ uint64, _ *event.Event, reason string) error {
	return errors.New(reason)
}
func (indifferent) Foreign(context.Context, int) error { return errors.New("messages of others") }
func (indifferent) Resync(sink.Reason)                 {}

// storing returns how long it took from the first to the last of the stream's
// messages, and removes the stream.
func (b *broker) storing(ctx context.Context, name string, events int) (time.Duration, error) {
	stream, err := b.js.Stream(ctx, name)
	if err != nil {
		return 0, err
	}
	state := stream.CachedInfo().State
	if state.LastSeq != uint64(events) {
		return 0, fmt.Errorf("stream %s has %d messages and not %d", name, state.LastSeq, events)
	}
	return state.LastTime.Sub(state.FirstTime), b.js.DeleteStream(ctx, name)
}
