// Faulty is a naive relay that can be told to break the promise in one way. It
// shows that the checker catches each of them. It publishes event by event and
// waits for each ack; nothing of it is meant to survive a fault.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/decoder"
	"outbox-relay/outbox/event"
	"outbox-relay/replication"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "faulty:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	r := relay{fault: os.Getenv("OUTBOX_FAULT"), slot: os.Getenv("OUTBOX_SLOT")}
	if err := r.connect(ctx); err != nil {
		return err
	}
	defer r.nc.Close()
	session, err := r.start(ctx)
	if err != nil {
		return err
	}
	r.session = session
	slog.New(slog.NewTextHandler(os.Stderr, nil)).Info("streaming")
	if err := session.Run(ctx, &r); !errors.Is(err, replication.ErrStopped) {
		return err
	}
	return session.Finish(context.Background())
}

// message is an event that was decoded, or read from the table.
type message struct {
	id, subject string
	body        []byte
	position    string
}

// relay is the replication handler.
type relay struct {
	fault, slot string
	sql         *pgx.Conn
	conn        *replication.Conn
	nc          *nats.Conn
	js          jetstream.JetStream
	decoder     *decoder.Decoder
	session     *replication.Session

	transaction  []message
	transactions int
}

func (r *relay) connect(ctx context.Context) error {
	config, err := pgx.ParseConfig(os.Getenv("OUTBOX_POSTGRES_URL"))
	if err != nil {
		return err
	}
	if r.sql, err = pgx.ConnectConfig(ctx, config); err != nil {
		return err
	}
	if r.conn, err = replication.Connect(ctx, &config.Config); err != nil {
		return err
	}
	if r.nc, err = nats.Connect(os.Getenv("OUTBOX_NATS_URL")); err != nil {
		return err
	}
	if r.js, err = jetstream.New(r.nc); err != nil {
		return err
	}
	_, err = r.js.CreateStream(ctx, jetstream.StreamConfig{Name: os.Getenv("OUTBOX_STREAM"), Subjects: []string{"events.*.*"},
		Duplicates: 100 * time.Millisecond})
	return err
}

func (r *relay) start(ctx context.Context) (*replication.Session, error) {
	var table uint32
	if err := r.sql.QueryRow(ctx, `select 'events'::regclass::oid`).Scan(&table); err != nil {
		return nil, err
	}
	r.decoder = decoder.New(table, event.Columns{}, event.Proof{})
	slot, err := r.conn.CreateSlot(ctx, r.slot, false)
	if err != nil {
		return nil, err
	}
	if err := r.backfill(ctx, slot.Snapshot); err != nil {
		return nil, err
	}
	return r.conn.Start(ctx, r.slot, "outbox_relay", slot.Point)
}

// backfill publishes the rows that the slot's snapshot sees. The fifth is where
// the promise is broken.
func (r *relay) backfill(ctx context.Context, snapshot string) error {
	var messages []message
	err := pgx.BeginTxFunc(ctx, r.sql, pgx.TxOptions{IsoLevel: pgx.RepeatableRead}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `set transaction snapshot '`+snapshot+`'`); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, `select id, 'events.order.' || event_type, convert_to(payload::text, 'UTF8') from events where status = 'pending' order by id`)
		if err != nil {
			return err
		}
		messages, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (m message, err error) {
			err = row.Scan(&m.id, &m.subject, &m.body)
			return m, err
		})
		return err
	})
	if err != nil || len(messages) == 0 {
		return err
	}
	stored := messages
	switch r.fault {
	case "backfill-nothing":
		return nil
	case "backfill-short":
		messages = slices.Delete(messages, 4, 5)
		stored = messages
	case "backfill-twice":
		stored = append(slices.Clone(messages), messages[0])
	case "backfill-by-chance":
		stored = slices.Clone(messages)
		stored[4], stored[5] = stored[5], stored[4]
	}
	for i := range stored {
		stored[i].position = fmt.Sprintf("1/0/0/%d", i+1)
	}
	if err := r.publish(stored); err != nil {
		return err
	}
	return r.mark(messages)
}

// Data implements replication.Handler.
func (r *relay) Data(_ pglogrepl.LSN, data []byte) error {
	kind, err := r.decoder.Decode(data)
	switch {
	case err != nil:
		return err
	case kind == decoder.Insert:
		e := &r.decoder.Event
		r.transaction = append(r.transaction, message{id: string(e.ID), subject: "events.order." + string(e.EventType), body: append([]byte(nil), e.Payload...)})
	case kind == decoder.Commit && len(r.transaction) > 0:
		return r.commit(r.decoder.End)
	}
	return nil
}

// Keepalive, Idle, Notice and Lost implement replication.Handler.
func (r *relay) Keepalive(pglogrepl.LSN, bool) error { return nil }
func (r *relay) Idle()                               {}
func (r *relay) Notice(string)                       {}
func (r *relay) Lost(error)                          {}

// commit publishes a transaction, marks its rows and confirms it. The tenth
// transaction is where the promise is broken.
func (r *relay) commit(end pglogrepl.LSN) error {
	messages := r.transaction
	r.transaction = nil
	fault := ""
	if r.transactions++; r.transactions == 10 {
		fault = r.fault
	}
	stored := messages
	switch fault {
	case "lose":
		stored = messages[1:]
	case "repeat":
		stored = append(messages, messages[0])
	case "reorder":
		stored = append([]message{messages[1], messages[0]}, messages[2:]...)
	case "invent":
		stored = append(messages, message{id: "event_invented", subject: messages[0].subject, body: messages[0].body})
	case "alter":
		stored[0].body = append(stored[0].body, ' ')
	case "confirm-early":
		r.session.Confirm(end)
		time.Sleep(2 * time.Second)
	case "mark-unstored":
		if err := r.mark(messages); err != nil {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	case "heal-unlost":
		stored[0].position = "1/0/0/1000"
	}
	if err := r.publish(stored); err != nil {
		return err
	}
	if fault == "lose" {
		messages = stored
	}
	if err := r.mark(messages); err != nil {
		return err
	}
	r.session.Confirm(end)
	return nil
}

func (r *relay) publish(messages []message) error {
	for i, m := range messages {
		if i > 0 && m.id == messages[0].id {
			time.Sleep(time.Second) // the duplicate window is over
		}
		_, err := r.js.PublishMsg(context.Background(), &nats.Msg{Subject: m.subject, Data: m.body, Header: nats.Header{"Nats-Msg-Id": {m.id}, "Outbox-Position": {m.position}}})
		if err != nil {
			return err
		}
	}
	return nil
}

// mark marks the rows, once they can be seen: a walsender sends a transaction
// before its commit is visible to others.
func (r *relay) mark(messages []message) error {
	ids := make([]string, len(messages))
	for i, m := range messages {
		ids[i] = m.id
	}
	for seen := 0; seen < len(ids); {
		if err := r.sql.QueryRow(context.Background(), `select count(*) from events where id = any ($1)`, ids).Scan(&seen); err != nil {
			return err
		}
	}
	_, err := r.sql.Exec(context.Background(),
		`update events set status = 'published', published_at = now() where id = any ($1) and status = 'pending'`, ids)
	return err
}
