package relay

import (
	"context"
	"errors"
	"log/slog"
	"maps"

	"github.com/jackc/pgx/v5"

	"outbox-relay/checkpoint"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// Examination looks at both ends with a session's own eyes and changes nothing:
// it makes no slot and no stream, claims no checkpoint, and can't write to
// Postgres. A relay may run beside it. For one goroutine.
type Examination struct{ s *session }

// Examine begins an examination of what a relay with this configuration finds.
func Examine(config Config) *Examination {
	sinkOf := config.Sink
	config.Sink = func(system replication.System) sink.Config {
		c := sinkOf(system)
		c.Stream.Create = false
		return c
	}
	log := slog.New(slog.DiscardHandler)
	return &Examination{&session{relay: &Relay{config: config, log: log}, table: config.Table, log: log}}
}

// Close closes all connections.
func (e *Examination) Close() {
	e.s.close()
	if client := e.s.relay.client.Load(); client != nil {
		client.Close()
	}
}

// readOnly are settings of a session that must change nothing and be in nobody's
// way.
var readOnly = map[string]string{"default_transaction_read_only": "on", "search_path": "pg_catalog", "lock_timeout": "5s", "statement_timeout": "10s"}

// Postgres connects for SQL as the relay does, and returns the connection, which
// Close closes.
func (e *Examination) Postgres(ctx context.Context) (*pgx.Conn, error) {
	config, err := e.s.relay.sqlConfig("outbox-relay doctor", nil)
	if err != nil {
		return nil, err
	}
	maps.Copy(config.RuntimeParams, readOnly)
	if e.s.sql, err = pgx.ConnectConfig(ctx, config); err != nil {
		return nil, ExplainConnect(err)
	}
	e.s.store = checkpoint.NewStore(e.s.sql, e.s.table.Schema, e.s.table.Slot)
	return e.s.sql, nil
}

// Server asks Postgres what it is.
func (e *Examination) Server(ctx context.Context) (Server, error) { return readServer(ctx, e.s.sql) }

// Replication opens a replication connection, which takes a walsender until Close.
func (e *Examination) Replication(ctx context.Context) (replication.System, error) {
	err := e.s.connectReplication(ctx)
	return e.s.system, err
}

// NATS connects as the relay does, and waits no longer than ctx. Close closes the
// client.
func (e *Examination) NATS(ctx context.Context) (*sink.Client, error) {
	client, err := sink.Connect(ctx, e.s.relay.config.Sink(e.s.system), e.s.log)
	e.s.relay.client.Store(client)
	return client, err
}

// Standing is the slot and the checkpoint; what is nil is not there.
type Standing struct {
	Slot       *replication.Slot
	Checkpoint *checkpoint.Checkpoint
}

// Standing reads both: the slot first, since the checkpoint is always written
// before it and never behind it.
func (e *Examination) Standing(ctx context.Context) (s Standing, err error) {
	slot, err := replication.ReadSlot(ctx, e.s.sql, e.s.table.Slot)
	switch {
	case err == nil:
		s.Slot = &slot
	case !errors.Is(err, replication.ErrNoSlot):
		return s, err
	}
	cp, err := e.s.store.Read(ctx)
	switch {
	case err == nil:
		s.Checkpoint = &cp
	case !errors.Is(err, checkpoint.ErrNone):
		return s, err
	}
	return s, nil
}

// CheckSlot holds slot and checkpoint against each other and against the server.
// What the next start mends by itself is no error: mends says it.
func (e *Examination) CheckSlot(st Standing) (mends string, err error) {
	var slot replication.Slot
	var cp checkpoint.Checkpoint
	var noSlot error
	if st.Checkpoint != nil {
		cp = *st.Checkpoint
		if err := e.s.verifySystem(cp); err != nil {
			return "", err
		}
	}
	if st.Slot == nil {
		noSlot = replication.ErrNoSlot
	} else if slot = *st.Slot; st.Checkpoint == nil {
		return "", noCheckpointFault(slot.Name)
	}
	if why := e.s.slotLost(slot, noSlot, cp); why != "" {
		return why, e.s.mayHeal(why)
	}
	if st.Slot == nil || st.Checkpoint == nil {
		return "", nil
	}
	return e.missing(func() error {
		if err := e.s.verifyConfirmed(&cp, slot); err != nil {
			return err
		}
		return e.s.verifyTimeline(cp)
	})
}

// CheckPublication holds the publication against what the checkpoint knows of it;
// mends as in CheckSlot.
func (e *Examination) CheckPublication(ctx context.Context, cp checkpoint.Checkpoint) (mends string, err error) {
	return e.missing(func() error { return e.s.verifyPublication(ctx, cp) })
}

// missing runs a check that notes what would be published from the table.
func (e *Examination) missing(check func() error) (mends string, err error) {
	e.s.missed = ""
	err = check()
	return e.s.missed, err
}

// CheckStream holds the checkpoint against the stream. What the broker has
// forgotten is an error, though the relay may go back behind it by itself: mends
// then says so.
func (e *Examination) CheckStream(ctx context.Context, st Standing, stream sink.Stream) (mends string, err error) {
	cp, slot := *st.Checkpoint, replication.Slot{}
	if st.Slot != nil {
		slot = *st.Slot
	}
	e.s.stream = stream
	if cp.Stream != stream.Name {
		return "", e.s.otherStream(cp)
	}
	if err := e.s.verifyIdentity(ctx, &cp, slot); err != nil {
		return "", err
	}
	what, err := e.s.forgotten(ctx, cp)
	if err != nil || what == "" {
		return "", err
	}
	earlier, err := e.s.earlier(ctx, slot)
	if err != nil || earlier != nil {
		return what, err
	}
	return "", e.s.forgot(what)
}

// ExplainMissing says what to do about a stream that is not there.
func (e *Examination) ExplainMissing(err error, known bool) error {
	e.s.known = known
	return e.s.explainStream(err)
}
