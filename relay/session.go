package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"outbox-relay/checkpoint"
	"outbox-relay/internal/fault"
	"outbox-relay/internal/wait"
	"outbox-relay/outbox"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// session is one run of the pipeline, from connecting to whatever ends it.
// Nothing of it outlives it: the next one starts from the checkpoint.
type session struct {
	relay *Relay
	table outbox.Table
	log   *slog.Logger

	sql    *pgx.Conn // the recorder's once it runs
	store  *checkpoint.Store
	layout outbox.Layout

	system    replication.System
	left      pglogrepl.LSN // where the checkpoint's timeline was left; 0: it is the server's
	conn      *replication.Conn
	stream    sink.Stream
	message   sink.MessageConfig
	backlog   *outbox.Backlog // what does not come out of the slot, where that is to be listed; nil: it is, or all does
	reading   *pgx.Conn       // the backlog's
	confirmed pglogrepl.LSN   // of the slot, when it was started
	missed    string          // why events may have come past the slot; empty: none did
	known     bool            // the checkpoint knows the stream: one that is gone is not ours to replace
}

// session opens a session and runs it.
func (r *Relay) session(ctx context.Context) error {
	s := &session{relay: r, table: r.config.Table, log: r.log}
	defer s.close()
	defer r.starting.end()
	r.starting.begin("connecting to both ends")
	if err := s.connect(ctx); err != nil {
		return err
	}
	r.starting.begin("opening the slot")
	if err := s.openSlot(ctx); err != nil {
		return err
	}
	r.starting.begin("taking up what the checkpoint says")
	start, err := s.resume(ctx)
	if err != nil {
		return err
	}
	return s.run(ctx, start)
}

// close ends both connections to Postgres, without confirming anything.
func (s *session) close() {
	if s.conn != nil {
		s.conn.Close()
	}
	closeSQL(s.sql)
	closeSQL(s.reading)
}

func closeSQL(conn *pgx.Conn) {
	if conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = conn.Close(ctx)
}

// connect reaches both ends and checks that they can keep the promise.
func (s *session) connect(ctx context.Context) error {
	if err := s.connectSQL(ctx); err != nil {
		return err
	}
	if err := s.checkTable(ctx); err != nil {
		return err
	}
	if err := s.awaitSlot(ctx); err != nil {
		return err
	}
	if err := s.connectReplication(ctx); err != nil {
		return err
	}
	if err := s.checkSlot(ctx); err != nil {
		return err
	}
	cp, err := s.store.Read(ctx)
	if err != nil && !errors.Is(err, checkpoint.ErrNone) {
		return err
	}
	s.known = err == nil && cp.Phase == checkpoint.Streaming
	if err := s.relay.vitals.look(ctx, s.table, s.sql, nil); err != nil {
		return err
	}
	return s.connectStream(ctx)
}

// checkTable refuses a table or a publication that events can't come from.
func (s *session) checkTable(ctx context.Context) (err error) {
	if s.layout, err = s.table.Inspect(ctx, s.sql); err != nil {
		return err
	}
	s.table = s.table.As(s.layout)
	return s.table.CheckPublication(ctx, s.sql)
}

// checkSlot refuses a slot that no relay of this database can use, before a
// stream is made in its name.
func (s *session) checkSlot(ctx context.Context) error {
	slot, err := replication.ReadSlot(ctx, s.sql, s.table.Slot)
	switch {
	case errors.Is(err, replication.ErrNoSlot):
		return nil
	case err != nil:
		return err
	}
	return slot.Check(s.system.Database)
}

// awaitSlot waits while another relay has the slot, on the connection that
// stands: a standby costs one query every half second. What was looked at before
// the wait may have changed since, so the session then begins anew.
func (s *session) awaitSlot(ctx context.Context) error {
	for waited := false; ; waited = true {
		slot, err := replication.ReadSlot(ctx, s.sql, s.table.Slot)
		switch {
		case err != nil && !errors.Is(err, replication.ErrNoSlot):
			return err
		case err == nil && slot.Active:
			s.relay.standBy()
		case waited:
			return errSlotFree
		default:
			return nil
		}
		if err := s.relay.vitals.look(ctx, s.table, s.sql, nil); err != nil {
			return err
		}
		if err := wait.For(ctx, standbyPause); err != nil {
			return err
		}
	}
}

// errSlotFree says that the relay which had the slot has left it.
var errSlotFree = errors.New("the slot is free")

// standbyPause is how often a standby looks whether the slot is free.
const standbyPause = 500 * time.Millisecond

func (s *session) connectSQL(ctx context.Context) error {
	config, err := s.relay.sqlConfig("outbox-relay recorder", outbox.LookupSettings())
	if err != nil {
		return err
	}
	config.OnNotice = func(_ *pgconn.PgConn, notice *pgconn.Notice) {
		// "The transaction has already committed locally, but might not have
		// been replicated to the standby." (syncrep.c) Triggers raise warnings
		// of the same SQLSTATE, and texts are translated.
		if notice.Routine == "SyncRepWaitForLSN" && s.store != nil {
			s.store.NotReplicated()
		}
	}
	if s.sql, err = pgx.ConnectConfig(ctx, config); err != nil {
		return ExplainConnect(err)
	}
	s.store = checkpoint.NewStore(s.sql, s.table.Schema, s.table.Slot)
	return s.checkServer(ctx)
}

func (s *session) checkServer(ctx context.Context) error {
	server, err := readServer(ctx, s.sql)
	if err != nil {
		return err
	}
	return cmp.Or(server.CheckVersion(), server.CheckRecovery(), server.CheckWALLevel())
}

func (s *session) connectReplication(ctx context.Context) error {
	config, err := s.relay.postgres()
	if err != nil {
		return err
	}
	conn, err := replication.Connect(ctx, &config.Config)
	if err != nil {
		return ExplainConnect(err)
	}
	s.conn = conn
	if s.system, err = conn.Identify(ctx); err != nil {
		return err
	}
	return s.checkSameServer(ctx, s.sql)
}

// errTwoServers says that the two connections lead to different servers.
var errTwoServers = errors.New("the two connections lead to different servers")

// checkSameServer makes sure that what is read and what is recorded are of one
// server: of several hosts, each connection chooses its own.
func (s *session) checkSameServer(ctx context.Context, sql *pgx.Conn) error {
	var started string
	if err := sql.QueryRow(ctx, `select pg_catalog.pg_postmaster_start_time()::text`).Scan(&started); err != nil {
		return fmt.Errorf("identify server: %w", err)
	}
	if started != s.system.Started {
		return &fault.Error{What: errTwoServers.Error(), Cause: errTwoServers,
			Remedy: "name one host in OUTBOX_POSTGRES_URL, or add target_session_attrs=read-write"}
	}
	return nil
}

// connectStream connects to NATS, unless an earlier session has, and opens the stream.
func (s *session) connectStream(ctx context.Context) error {
	config := s.relay.config.Sink(s.system)
	config.Stream.Create = config.Stream.Create && !s.known
	s.message = config.Message
	s.message.Columns = s.table.Columns
	client := s.relay.client.Load()
	if client == nil || client.Closed() {
		var err error
		if client, err = sink.Connect(ctx, config, s.log); err != nil {
			return err
		}
		if old := s.relay.client.Swap(client); old != nil {
			old.Close()
		}
		s.relay.metrics.inflightLimit.Set(float64(config.MaxInflight))
		s.relay.metrics.bytesLimit.Set(float64(config.MaxBytes))
	}
	var err error
	s.stream, err = client.OpenStream(ctx, config.Stream)
	return s.explainStream(err)
}

// explainStream adds what to do about a stream that is not there.
func (s *session) explainStream(err error) error {
	switch {
	case !errors.Is(err, sink.ErrNoStream):
		return err
	case s.known:
		return &fault.Error{What: err.Error() + ": the checkpoint knows it: it was deleted, or OUTBOX_NATS_URL or OUTBOX_NATS_DOMAIN lead elsewhere",
			Remedy: "restore it, or " + s.startAnew(), SQL: s.anewSQL(), Cause: err}
	}
	return &fault.Error{What: err.Error(), Remedy: "create it, or set OUTBOX_STREAM_CREATE=true", Cause: err,
		Shell: s.relay.config.Sink(s.system).Stream.Command()}
}

// start begins to stream, and claims the checkpoint: only who holds the slot
// claims, so that the newest claim is that of the relay that reads.
func (s *session) start(ctx context.Context) (*replication.Session, checkpoint.Checkpoint, error) {
	slot, err := replication.ReadSlot(ctx, s.sql, s.table.Slot)
	if err != nil {
		return nil, checkpoint.Checkpoint{}, err
	}
	if err := slot.Check(s.system.Database); err != nil {
		return nil, checkpoint.Checkpoint{}, err
	}
	if slot.Confirmed == 0 { // it is being created
		return nil, checkpoint.Checkpoint{}, replication.ErrSlotInUse
	}
	if slot.Lost() {
		return nil, checkpoint.Checkpoint{}, errSlotLost
	}
	reader, err := s.conn.Start(ctx, s.table.Slot, s.table.Publication, slot.Confirmed)
	if err != nil {
		return nil, checkpoint.Checkpoint{}, err
	}
	cp, err := s.store.Claim(ctx)
	if err != nil {
		return nil, cp, err
	}
	// Now nobody else moves the slot, and the stream holds what the checkpoint
	// was claimed with.
	if slot, err = replication.ReadSlot(ctx, s.sql, s.table.Slot); err != nil {
		return nil, cp, err
	}
	if err := s.connectStream(ctx); err != nil {
		return nil, cp, err
	}
	reader.Confirm(slot.Confirmed)
	s.confirmed = slot.Confirmed
	err = s.verify(ctx, &cp, slot)
	return reader, cp, err
}

// restart gives the slot's events again to a session that has read some, behind
// this checkpoint.
func (s *session) restart(ctx context.Context, from checkpoint.Checkpoint) (*replication.Session, error) {
	// The server may not have noticed yet that the first connection is gone.
	for deadline := time.Now().Add(5 * time.Second); ; {
		s.conn.Close()
		if err := s.connectReplication(ctx); err != nil {
			return nil, err
		}
		reader, cp, err := s.start(ctx)
		switch {
		case err == nil && cp.Sequence != from.Sequence:
			return nil, fmt.Errorf("%w meanwhile", sink.ErrForgotten) // and the checkpoint has gone back
		case !errors.Is(err, replication.ErrSlotInUse) || time.Now().After(deadline):
			return reader, err
		}
		if err := wait.For(ctx, 20*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

// origin is where a session takes up the work.
type origin struct {
	reader     *replication.Session
	checkpoint checkpoint.Checkpoint
	batch      checkpoint.TableBatch // to be finished first; found speaks of what is left of it
	found      sink.Found
	heritage   sink.Heritage
}

// run is the pipeline: the reader's goroutine reads, decodes and publishes;
// the chain's settles what goes wrong; the recorder's records and confirms.
func (s *session) run(ctx context.Context, from origin) error {
	cp := from.checkpoint
	tracker := checkpoint.NewTracker(unrecordedBound, cp.Sequence, from.reader.Confirmed())
	recorder := newRecorder(s, tracker, from)
	p := newPipeline(s, tracker, recorder, from)
	s.relay.pipeline.Store(p)
	defer s.relay.pipeline.Store(nil)

	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	group, work := errgroup.WithContext(work)
	group.Go(func() error { return p.chain.Run(work) })
	group.Go(func() error { return recorder.run(work) })
	group.Go(func() error { return newHousekeeper(s, p.chain, &recorder.working).run(work) })
	group.Go(func() error { return p.watch(work) })

	reading, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer context.AfterFunc(work, func() { stop(nil) })() // a part that fails ends the reading
	p.ctx, p.stop = reading, stop

	s.relay.streamed = true
	s.relay.waiting.Store(nil)
	s.relay.starting.end()
	s.relay.causes.session.Over("a session runs again")
	if p.due {
		s.relay.state.Store(Backfilling)
		from.reader.Ask() // so that there is something to take at once
	} else {
		p.streaming()
	}
	err := s.explainReading(from.reader.Run(reading, p))

	if p.halted.Load() != nil || (ctx.Err() != nil && work.Err() == nil) {
		s.relay.state.Store(Stopping)
		if drained := s.drain(work, p, recorder, from.reader); drained != nil {
			s.log.Warn("stopped before all was done: the next start takes it up", "error", drained)
		}
	}
	cancel()
	failed := ended(group.Wait())
	if halted := p.halted.Load(); halted != nil {
		return halted
	}
	return s.explainStream(cmp.Or(failed, ended(err)))
}

// drain brings what was read to its end, within three quarters of the grace: the rest is
// for the connections and the HTTP server to end.
func (s *session) drain(work context.Context, p *pipeline, recorder *recorder, reader *replication.Session) error {
	ctx, cancel := context.WithTimeoutCause(work, s.relay.config.Grace/4*3,
		fmt.Errorf("three quarters of OUTBOX_SHUTDOWN_GRACE (%s) are over", s.relay.config.Grace))
	defer cancel()
	events, _ := p.chain.InFlight()
	s.log.Info("stopping", "events", events)
	defer s.showDraining(ctx, p)()
	clean := p.chain.Drain(ctx)
	if err := recorder.flush(ctx, clean == nil); err != nil {
		return err
	}
	if clean != nil {
		return clean
	}
	if p.halted.Load() != nil {
		return nil // the session is not to be finished: its reader is in the middle of an event
	}
	if err := reader.Finish(ctx); err != nil {
		return fmt.Errorf("end the replication session: %w", err)
	}
	s.log.Info("stopped", "confirmed_lsn", reader.Confirmed().String())
	return nil
}

// ended leaves out how a part says that it was told to end.
func ended(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, replication.ErrStopped) {
		return nil
	}
	return err
}
