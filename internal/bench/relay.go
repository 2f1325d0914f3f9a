package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"syscall"
	"time"

	"outbox-relay/internal/pgserver/child"
)

const stream = "EVENTS"

// relay is a running relay.
type relay struct {
	*child.Process
	log bytes.Buffer
}

// startRelay starts a relay of the database.
func (d *database) startRelay(b *broker, settings ...string) (*relay, error) {
	r := &relay{}
	cmd := exec.Command(d.servers.path("relay"))
	cmd.Env = append([]string{
		"OUTBOX_POSTGRES_URL=" + d.url,
		"OUTBOX_NATS_URL=" + b.url(),
		"OUTBOX_SLOT=" + d.slot("relay"),
		"OUTBOX_STREAM=" + stream,
		"OUTBOX_HTTP_ADDR=",
	}, settings...)
	cmd.Stderr = &r.log
	var err error
	r.Process, err = child.Start(cmd, syscall.SIGKILL)
	return r, err
}

func (w Workload) settings() []string {
	return []string{"OUTBOX_AFTER_PUBLISH=" + w.AfterPublish, "OUTBOX_HEADERS=" + w.Headers, fmt.Sprint("OUTBOX_STREAM_REPLICAS=", w.Replicas)}
}

// stop ends the relay. An exit code other than 0 is an error.
func (r *relay) stop() error {
	_ = r.Signal(syscall.SIGTERM) // it may have ended
	if code := r.ExitCode(); code != 0 {
		return fmt.Errorf("relay: exit code %d\n%s", code, r.log.Bytes())
	}
	return nil
}

// awaitStreaming waits until the relay has made its slot and its stream.
func (d *database) awaitStreaming(ctx context.Context, r *relay) error {
	return await(ctx, "the relay's slot", 10*time.Millisecond, func() (bool, error) {
		var ready bool
		err := d.sql.QueryRow(ctx, `select exists (select from outbox_relay_checkpoints where slot = $1 and phase = 'streaming')`,
			d.slot("relay")).Scan(&ready)
		return ready || isDone(r.Process), err
	})
}

func isDone(p *child.Process) bool {
	select {
	case <-p.Done():
		return true
	default:
		return false
	}
}

// makeRelaySlot runs the relay until it has made its slot and its stream.
func (d *database) makeRelaySlot(ctx context.Context, b *broker, w Workload) error {
	r, err := d.startRelay(b, w.settings()...)
	if err != nil {
		return err
	}
	err = d.awaitStreaming(ctx, r)
	return errors.Join(err, r.stop())
}

// readByRelay measures the relay from the first stored event to the last one, by
// the stream's own timestamps; where outcomes are written to the rows, to the last
// that is recorded.
func (d *database) readByRelay(ctx context.Context, b *broker, w Workload) (m Relayed, err error) {
	before, err := b.cpu()
	if err != nil {
		return m, err
	}
	r, err := d.startRelay(b, w.settings()...)
	if err != nil {
		return m, err
	}
	recorded, err := d.awaitRecorded(ctx, r, w)
	var usage figures
	if err == nil && !isDone(r.Process) {
		usage, err = d.usage(ctx, b, r)
	}
	if err := errors.Join(err, r.stop()); err != nil {
		return m, err
	}
	took, err := b.stored(ctx, w, recorded)
	if err != nil {
		return m, err
	}
	cpu, _ := r.Usage()
	each := func(used time.Duration) float64 { return float64(used.Nanoseconds()) / 1e3 / float64(w.Events) }
	m = Relayed{Rate: w.rate(took), CPU: each(cpu), NATS: each(usage.nats - before), Walsender: each(usage.walsender), Memory: float64(usage.memory) / (1 << 20)}
	if w.AfterPublish == "keep" {
		return m, nil
	}
	left, err := d.pending(ctx)
	if err == nil && left > 0 {
		err = fmt.Errorf("%d rows are still pending", left)
	}
	return m, err
}

// figures are what the processes used until the last outcome.
type figures struct {
	nats, walsender time.Duration
	memory          int64 // of the relay
}

func (d *database) usage(ctx context.Context, b *broker, r *relay) (f figures, err error) {
	if f.nats, err = b.cpu(); err != nil {
		return f, err
	}
	if f.walsender, err = d.walsenderCPU(ctx, d.slot("relay")); err != nil {
		return f, err
	}
	f.memory, err = peakMemory(r.Pid())
	return f, err
}

// awaitRecorded waits until the checkpoint says that every event has its outcome,
// so that the relay's whole work is in its figures, and returns when it was.
func (d *database) awaitRecorded(ctx context.Context, r *relay, w Workload) (time.Time, error) {
	err := await(ctx, "the checkpoint to reach the last event", 10*time.Millisecond, func() (bool, error) {
		var done bool
		err := d.sql.QueryRow(ctx, `select stream_sequence >= $2 from outbox_relay_checkpoints where slot = $1`,
			d.slot("relay"), w.Events).Scan(&done)
		return done || isDone(r.Process), err
	})
	return time.Now(), err
}

// stored returns how long the relay's work took, and removes its stream.
func (b *broker) stored(ctx context.Context, w Workload, recorded time.Time) (time.Duration, error) {
	info, err := b.js.Stream(ctx, stream)
	if err != nil {
		return 0, err
	}
	first := info.CachedInfo().State.FirstTime
	took, err := b.storing(ctx, stream, w.Events)
	if w.AfterPublish != "keep" {
		took = recorded.Sub(first)
	}
	return took, err
}
