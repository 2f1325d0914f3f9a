package replication

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"outbox-relay/internal/charset"
	"outbox-relay/internal/wait"
	"outbox-relay/replication/pace"
)

const (
	// statusInterval keeps an idle or stalled session alive.
	statusInterval = senderTimeout / 3
	// confirmInterval bounds how often a moving LSN is sent.
	confirmInterval = 100 * time.Millisecond
	// reliefInterval is how often a connection is looked at while the handler blocks.
	reliefInterval = 500 * time.Millisecond
	// lostWait is how long the reader, which hears why the server ends a session, may
	// take to find a connection broken that the writer has found so.
	lostWait = time.Second
)

var (
	// ErrStopped says that Run ended because its context did.
	ErrStopped = errors.New("session stopped")
	// ErrEnded says that the server ended the stream: it shuts down.
	ErrEnded = errors.New("the server ended the stream")
	// ErrWalsender says that the walsender failed, for the cause that it is wrapped with.
	ErrWalsender = errors.New("the walsender failed")
	// ErrPublication says that the server cannot apply the publication: it
	// passes over events while it goes on streaming.
	ErrPublication = errors.New("the publication is not usable")
	// ErrMalformed says that the walsender sent what is not of the protocol.
	// What it carried is unknown, so it can't be skipped.
	ErrMalformed = errors.New("malformed replication message")
)

// Handler takes what the walsender sends, in order. All but Lost are called from the
// goroutine that reads; while they block, no more than has to be is read, but status
// goes on being sent.
type Handler interface {
	// Data gets one pgoutput message, and where its change stands in WAL: a
	// Commit's is where the transaction ends (commit_cb_wrapper in
	// src/backend/replication/logical/logical.c); one that stands nowhere, such
	// as a Relation, comes with the LSN before. data is valid until it returns.
	Data(walStart pglogrepl.LSN, data []byte) error
	// Keepalive gets the end of WAL that the walsender has decoded. urgent says
	// that it wants to hear how far the reader is: it may be shutting down.
	Keepalive(walEnd pglogrepl.LSN, urgent bool) error
	// Notice gets what the server has to say about the session, such as that it
	// waits for a standby.
	Notice(text string)
	// Idle says that all that was received has been handed on: more is waited
	// for.
	Idle()
	// Lost says that the connection is broken, and why, while another call may block:
	// it has to return then. It is called by another goroutine, and once.
	Lost(err error)
}

// Session is a replication connection that streams from a slot. One goroutine
// reads, one writes; both belong to Run.
type Session struct {
	conn      *Conn
	slot      string
	confirmed atomic.Uint64         // end LSN below which everything is done; never 0, never back
	moved     chan struct{}         // confirmed has moved
	ask       chan struct{}         // send status now
	asking    atomic.Bool           // with a request for an answer
	at        pglogrepl.LSN         // of the last message read: what is wrong comes behind it
	lost      atomic.Pointer[error] // what the writer found broken, once Lost was called
}

// Start begins to stream from the slot's confirmed LSN, which is passed in and
// reported until Confirm moves it on. ErrSlotInUse if another relay has it.
func (c *Conn) Start(ctx context.Context, slot, publication string, confirmed pglogrepl.LSN) (*Session, error) {
	if confirmed == 0 {
		return nil, errors.New("start replication: the slot's confirmed LSN is 0") // 0 would be taken for the write position
	}
	if err := c.takeRaw(ctx, publication); err != nil {
		return nil, fmt.Errorf("start replication from slot %s: %w", slot, err)
	}
	err := pglogrepl.StartReplication(ctx, c.pg, quote(slot), 0, pglogrepl.StartReplicationOptions{
		Mode: pglogrepl.LogicalReplication,
		PluginArgs: []string{
			"proto_version '1'",
			"publication_names " + literal(quote(publication)), // a list of identifiers in a literal
			"messages 'true'",
		},
	})
	switch {
	case hasCode(err, objectInUse):
		return nil, fmt.Errorf("start replication from slot %s: %w: %w", slot, ErrSlotInUse, err)
	case err != nil:
		return nil, fmt.Errorf("start replication from slot %s: %w", slot, err)
	}
	s := &Session{conn: c, slot: slot, at: confirmed, moved: make(chan struct{}, 1), ask: make(chan struct{}, 1)}
	s.confirmed.Store(uint64(confirmed))
	return s, nil
}

// takeRaw lets the walsender send text as it is where the relay converts it: one that
// converts text itself can't be led past a row that does not convert. With SQL_ASCII at
// either end Postgres converts nothing, and what is sent to it has to be of the database's encoding.
// Source: pg_server_to_any in src/backend/utils/mb/mbutils.c.
func (c *Conn) takeRaw(ctx context.Context, publication string) error {
	switch {
	case !c.charset.Raw():
		return nil
	case !charset.ASCII(publication):
		return fmt.Errorf("the database's encoding is %s: OUTBOX_PUBLICATION must have a name of ASCII characters there, not %s", c.charset.Name, publication)
	}
	_, err := c.pg.Exec(ctx, "set client_encoding to 'SQL_ASCII'").ReadAll()
	return err
}

// explain is what the server says, in UTF-8.
func (c *Conn) explain(msg *pgproto3.ErrorResponse) error {
	for _, text := range []*string{&msg.Message, &msg.Detail, &msg.Hint, &msg.Where} {
		*text = c.charset.Text(*text)
	}
	return pgconn.ErrorResponseToPgError(msg)
}

// Confirm lets the slot move on to lsn. Lower values than before are ignored.
// Safe for concurrent use.
func (s *Session) Confirm(lsn pglogrepl.LSN) {
	for {
		old := s.confirmed.Load()
		if uint64(lsn) <= old {
			return
		}
		if s.confirmed.CompareAndSwap(old, uint64(lsn)) {
			signal(s.moved)
			return
		}
	}
}

// Confirmed returns the LSN that was confirmed last.
func (s *Session) Confirmed() pglogrepl.LSN { return pglogrepl.LSN(s.confirmed.Load()) }

// Ask requests a keepalive from the walsender: where it is in WAL.
func (s *Session) Ask() {
	s.asking.Store(true)
	signal(s.ask)
}

// Run reads until ctx ends (ErrStopped; the session is then still open and can
// Finish), the handler fails, or the connection does.
func (s *Session) Run(ctx context.Context, handler Handler) error {
	writing, stop := context.WithCancel(context.Background())
	var writer sync.WaitGroup
	writer.Go(func() { s.keep(writing, handler) })
	defer writer.Wait()
	defer stop()

	pace.Below(s.conn.pg.Conn()).Idle = handler.Idle
	// The read itself has no context: a deadline for each message would cost
	// more than decoding it.
	interrupt := context.AfterFunc(ctx, func() { _ = s.conn.pg.Conn().SetReadDeadline(time.Unix(1, 0)) })
	defer interrupt()
	err := s.read(handler)
	if lost := s.lost.Load(); lost != nil {
		return *lost
	}
	if ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		return ErrStopped
	}
	return err
}

func (s *Session) read(handler Handler) error {
	frontend := s.conn.pg.Frontend()
	for {
		msg, err := frontend.Receive()
		if err != nil {
			return fmt.Errorf("read from slot %s behind %s: %w", s.slot, s.at, err)
		}
		switch msg := msg.(type) {
		case *pgproto3.CopyData:
			err = s.handle(msg.Data, handler)
		case *pgproto3.ErrorResponse:
			err = fmt.Errorf("slot %s behind %s: %w: %w", s.slot, s.at, ErrWalsender, s.conn.explain(msg))
		case *pgproto3.NoticeResponse:
			err = s.notice(msg, handler)
		case *pgproto3.ParameterStatus:
		case *pgproto3.CopyDone:
			err = fmt.Errorf("slot %s: %w", s.slot, ErrEnded)
		default:
			err = fmt.Errorf("slot %s behind %s: %w: unexpected %T", s.slot, s.at, ErrMalformed, msg)
		}
		if err != nil {
			return err
		}
	}
}

// handle takes one CopyData: 'w' is XLogData (start, end, time, then the
// message), 'k' a keepalive.
// Source: https://www.postgresql.org/docs/current/protocol-replication.html
func (s *Session) handle(data []byte, handler Handler) error {
	switch {
	case len(data) >= 25 && data[0] == pglogrepl.XLogDataByteID:
		if start := pglogrepl.LSN(binary.BigEndian.Uint64(data[1:])); start != 0 { // a Relation has none
			s.at = start
		}
		return handler.Data(s.at, data[25:])
	case len(data) > 0 && data[0] == pglogrepl.PrimaryKeepaliveMessageByteID:
		keepalive, err := pglogrepl.ParsePrimaryKeepaliveMessage(data[1:])
		if err != nil {
			return fmt.Errorf("slot %s behind %s: %w: %w", s.slot, s.at, ErrMalformed, err)
		}
		if keepalive.ReplyRequested {
			signal(s.ask)
		}
		return handler.Keepalive(keepalive.ServerWALEnd, keepalive.ReplyRequested)
	default:
		return fmt.Errorf("slot %s behind %s: %w: %d bytes, %.1q", s.slot, s.at, ErrMalformed, len(data), data)
	}
}

// notice decides about a NoticeResponse inside the stream. From 18 on a
// missing publication is only a warning of SQLSTATE 55000, and its changes are
// passed over (tried; src/backend/replication/pgoutput/pgoutput.c,
// LoadPublications). The same SQLSTATE says that a standby of
// synchronized_standby_slots is not there: what is read waits for it (tried on
// 18; src/backend/replication/slot.c, StandbySlotsHaveCaughtup). Messages are
// translated, so only the routine tells them apart.
func (s *Session) notice(msg *pgproto3.NoticeResponse, handler Handler) error {
	if msg.Code == "55000" && msg.Routine != "StandbySlotsHaveCaughtup" {
		return fmt.Errorf("slot %s: %w: %s", s.slot, ErrPublication, s.conn.charset.Text(msg.Message))
	}
	handler.Notice(s.conn.charset.Text(msg.Message))
	return nil
}

// keep keeps the session alive until ctx ends. A connection that it finds broken ends
// the session, also while the handler blocks.
func (s *Session) keep(ctx context.Context, handler Handler) {
	err := s.write(ctx)
	if err == nil || wait.For(ctx, lostWait) != nil {
		return
	}
	err = fmt.Errorf("write to slot %s: %w", s.slot, err)
	s.lost.Store(&err)
	handler.Lost(err)
}

// write sends status: when the confirmed LSN moved, when asked to, and often enough to
// keep the session alive while the handler blocks. It returns nil once ctx has ended.
func (s *Session) write(ctx context.Context) error {
	alive, relief := time.NewTicker(statusInterval), time.NewTicker(reliefInterval)
	defer alive.Stop()
	defer relief.Stop()
	conn := pace.Below(s.conn.pg.Conn())
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-relief.C:
			if err := conn.Relieve(); err != nil {
				return err
			}
			continue
		case <-alive.C:
		case <-s.ask:
		case <-s.moved:
			if wait.For(ctx, confirmInterval) != nil {
				return nil
			}
		}
		// A walsender that reads nothing for so long is not there.
		if err := conn.SetWriteDeadline(time.Now().Add(senderTimeout)); err != nil {
			return err
		}
		if err := s.status(s.asking.Swap(false)); err != nil {
			return err
		}
	}
}

// status reports write = flush = apply = confirmed. What was received and not
// confirmed is none of the server's business: it may only keep WAL for it.
func (s *Session) status(replyRequested bool) error {
	lsn := s.Confirmed()
	return pglogrepl.SendStandbyStatusUpdate(context.Background(), s.conn.pg, pglogrepl.StandbyStatusUpdate{
		WALWritePosition: lsn, WALFlushPosition: lsn, WALApplyPosition: lsn, ReplyRequested: replyRequested,
	})
}

// Finish ends a stopped session in order: a last status, CopyDone, and the
// server's CopyDone, behind which the slot has moved and is free.
func (s *Session) Finish(ctx context.Context) error {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(senderTimeout)
	}
	if err := s.conn.pg.Conn().SetDeadline(deadline); err != nil {
		return err
	}
	if err := s.status(false); err != nil {
		return fmt.Errorf("send the last status: %w", err)
	}
	frontend := s.conn.pg.Frontend()
	frontend.Send(&pgproto3.CopyDone{})
	if err := frontend.Flush(); err != nil {
		return fmt.Errorf("send CopyDone: %w", err)
	}
	for {
		msg, err := frontend.Receive()
		if err != nil {
			return fmt.Errorf("wait for CopyDone: %w", err)
		}
		switch msg := msg.(type) {
		case *pgproto3.ReadyForQuery:
			return nil
		case *pgproto3.ErrorResponse:
			return s.conn.explain(msg)
		}
	}
}

// literal quotes a string for a replication command.
func literal(s string) string {
	return `'` + strings.ReplaceAll(s, `'`, `''`) + `'`
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
