package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pglogrepl"

	"outbox-relay/decoder"
	"outbox-relay/outbox/event"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// look lets a lookahead read until it has enough. The session has then been read
// from, and must be restarted.
func (s *session) look(ctx context.Context, reader *replication.Session, ahead *lookahead) error {
	ahead.decoder = decoder.New(s.layout.OID, s.table.Columns, s.layout.Proof)
	// The walsender sends what is flushed; the last records before the end may not be,
	// and where nothing commits they would not for a quarter of a minute. A commit
	// of our own flushes them.
	if _, err := s.sql.Exec(ctx, `select pg_catalog.pg_logical_emit_message(true, 'outbox_relay', '')`); err != nil {
		return fmt.Errorf("flush WAL: %w", err)
	}
	reading, cancel := context.WithCancel(ctx)
	defer cancel()
	asking := time.NewTicker(100 * time.Millisecond)
	defer asking.Stop()
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		for {
			select {
			case <-reading.Done():
				return
			case <-asking.C:
				reader.Ask()
			}
		}
	}()
	err := reader.Run(reading, ahead)
	cancel()
	<-asked
	if errors.Is(err, errEnough) {
		return nil
	}
	return cmp.Or(context.Cause(ctx), s.explainReading(err))
}

var errEnough = errors.New("enough")

// lookahead is a handler that looks at what the slot has up to an LSN, or until
// take returns errEnough.
type lookahead struct {
	decoder *decoder.Decoder
	end     pglogrepl.LSN
	take    func(decoder.Kind, *decoder.Decoder) error
}

func (l *lookahead) Data(start pglogrepl.LSN, data []byte) error {
	kind, err := decode(l.decoder, start, data)
	switch {
	case err != nil:
		return err
	case kind == decoder.Commit && l.decoder.End >= l.end:
		return errEnough
	}
	return l.take(kind, l.decoder)
}

func (l *lookahead) Idle() {}

func (l *lookahead) Notice(string) {}

// Lost has nothing to interrupt: what is called waits for nobody.
func (l *lookahead) Lost(error) {}

func (l *lookahead) Keepalive(walEnd pglogrepl.LSN, _ bool) error {
	if walEnd >= l.end && !l.decoder.InTransaction() {
		return errEnough
	}
	return nil
}

// collector collects the ids of the first events behind a position.
type collector struct {
	after  event.Position
	left   pglogrepl.LSN // events from here on were not there to be published; 0: all were
	limit  int
	enough func(id string) bool // all that is wanted is found
	events sink.Events
}

func (c *collector) take(kind decoder.Kind, d *decoder.Decoder) error {
	e := &d.Event
	switch {
	case kind != decoder.Insert && kind != decoder.Request || e.Position.Compare(c.after) <= 0:
		return nil
	case kind == decoder.Request:
		return errEnough // what it asks for is announced before anything of it, or behind it, is sent
	case !pending(e):
		return nil
	}
	c.events.IDs = append(c.events.IDs, string(e.ID))
	if c.left == 0 || e.Position.Commit < c.left {
		c.events.Old = len(c.events.IDs)
	}
	if c.enough(string(e.ID)) || len(c.events.IDs) >= c.limit {
		return errEnough
	}
	return nil
}

// brought collects which rows come out of the slot: inserted, or to be tried again.
type brought struct {
	known   map[string]bool
	retried map[string]int // and as what attempt
}

func (b *brought) take(kind decoder.Kind, d *decoder.Decoder) error {
	switch {
	case kind == decoder.Insert && pending(&d.Event):
		b.known[string(d.Event.ID)] = true
	case kind == decoder.Request && d.Request.Run == "":
		for i, id := range d.Request.IDs {
			b.retried[id] = d.Request.Attempts[i]
		}
	}
	return nil
}
