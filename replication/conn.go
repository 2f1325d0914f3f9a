// Package replication owns the replication connection to Postgres: the slot,
// the session that reads from it, and the feedback that lets it move on.
package replication

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/internal/charset"
	"outbox-relay/internal/lsn"
	"outbox-relay/replication/pace"
)

// senderTimeout is how long Postgres keeps a slot for a relay that fell
// silent: a successor of a frozen relay waits that long. Status goes out
// at three times the pace.
const senderTimeout = 10 * time.Second

// SQLSTATEs that decide what to do.
// Source: src/backend/utils/errcodes.txt.
const (
	objectInUse         = "55006" // the slot is another relay's
	duplicateObject     = "42710"
	configurationLimits = "53400" // all replication slots are in use
)

// ErrSlotInUse says that another relay reads from the slot.
var ErrSlotInUse = errors.New("the slot is in use")

// Conn is a replication connection before it streams. It has one owner.
type Conn struct {
	pg      *pgconn.PgConn
	charset charset.Charset // of the database's text
}

// Connect opens a replication connection to the database of config, which is
// not changed. The session is pinned to what the decoder expects, whatever the
// role's or the database's defaults are.
func Connect(ctx context.Context, config *pgconn.Config) (*Conn, error) {
	config = config.Copy()
	for name, value := range map[string]string{
		"replication":         "database",
		"application_name":    "outbox-relay",
		"client_encoding":     "UTF8",
		"DateStyle":           "ISO, MDY",
		"bytea_output":        "hex",
		"TimeZone":            "UTC",
		"IntervalStyle":       "postgres",
		"extra_float_digits":  "1",
		"statement_timeout":   "0",
		"lock_timeout":        "0",
		"wal_sender_timeout":  fmt.Sprint(senderTimeout.Milliseconds()),
		"tcp_keepalives_idle": "5", "tcp_keepalives_interval": "2", "tcp_keepalives_count": "3",
		// It bounds also how long data waits for a window that is closed, as it is while
		// NATS is down (tcp(7)); wal_sender_timeout tells that from a host that is gone.
		"tcp_user_timeout":    "0",
		"client_min_messages": "notice", // a missing publication is a warning from 18 on
		// Idle it is until it streams, and with the snapshot that a new slot exports
		// also in a transaction.
		"idle_session_timeout": "0", "idle_in_transaction_session_timeout": "0",
	} {
		config.RuntimeParams[name] = value
	}
	config.DialFunc, config.ConnectTimeout = dialWalsender, cmp.Or(config.ConnectTimeout, ConnectTimeout)
	config.AfterConnect = NoTransactionTimeout
	pg, err := pgconn.ConnectConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	return &Conn{pg, charset.Of(pg.ParameterStatus("server_encoding"))}, nil
}

// NoTransactionTimeout is what follows connecting: no transaction of the session
// is bounded. The walsender has one open for each that it decodes, so the limit
// would hit a large one, and any that is under way while NATS is out
// (ReorderBufferProcessTXN in src/backend/replication/logical/reorderbuffer.c).
// 15 and 16 do not know the setting, and refuse it at the start of a session.
func NoTransactionTimeout(ctx context.Context, conn *pgconn.PgConn) error {
	_, err := conn.Exec(ctx, `select pg_catalog.set_config('transaction_timeout', '0', false)
		where pg_catalog.current_setting('transaction_timeout', true) is not null`).ReadAll()
	return err
}

// ConnectTimeout bounds connecting to one host where the URL does not: a server
// that accepts and then says nothing is passed over.
const ConnectTimeout = 10 * time.Second

// Dial notices within about ten seconds that the other side is gone: by
// keepalives where nothing is sent, and where something is under way, when no
// keepalive goes out, by the limit to which it may be unacknowledged (Linux).
func Dial(ctx context.Context, network, address string) (net.Conn, error) {
	dialer := net.Dialer{
		Timeout:         10 * time.Second,
		Control:         limitUnacknowledged,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3},
	}
	return dialer.DialContext(ctx, network, address)
}

// dialWalsender dials a connection whose reads leave the walsender undisturbed.
func dialWalsender(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := Dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return pace.NewConn(conn), nil
}

// System is what IDENTIFY_SYSTEM tells.
type System struct {
	ID       string // of the cluster, the same on its standbys
	Timeline int32
	Database string
	Started  string // when this server was started, by pg_postmaster_start_time
	history  string // of its timeline
}

// Identify asks who the server is.
func (c *Conn) Identify(ctx context.Context) (System, error) {
	id, err := pglogrepl.IdentifySystem(ctx, c.pg)
	if err != nil {
		return System{}, fmt.Errorf("identify system: %w", err)
	}
	results, err := c.pg.Exec(ctx, "select pg_catalog.pg_postmaster_start_time()").ReadAll()
	if err != nil {
		return System{}, fmt.Errorf("identify server: %w", err)
	}
	s := System{ID: id.SystemID, Timeline: id.Timeline, Database: id.DBName, Started: string(results[0].Rows[0][0])}
	if s.Timeline > 1 { // the first has no history
		history, err := pglogrepl.TimelineHistory(ctx, c.pg, s.Timeline)
		if err != nil {
			return System{}, fmt.Errorf("read the history of timeline %d: %w", s.Timeline, err)
		}
		s.history = string(history.Content)
	}
	return s, nil
}

// ErrNotAncestor says that the server's history does not have a timeline.
var ErrNotAncestor = errors.New("the timeline is not in the server's history")

// Left returns where the server left an older timeline for the next one: WAL
// below it is common to both. ErrNotAncestor if it never was on that one.
// A line of a history file has the timeline, the LSN at which it was left, and
// why, between tabs. Source: src/backend/access/transam/timeline.c.
func (s System) Left(timeline int32) (pglogrepl.LSN, error) {
	for line := range strings.Lines(s.history) {
		fields := strings.Fields(line)
		if len(fields) >= 2 && fields[0] == strconv.Itoa(int(timeline)) {
			return lsn.Parse(fields[1])
		}
	}
	return 0, fmt.Errorf("%w: timeline %d", ErrNotAncestor, timeline)
}

// Created is a slot that was made: what commits after its consistent point
// comes out of it, and what its snapshot sees does not. The snapshot can be taken
// over until the connection is used again.
type Created struct {
	Point    pglogrepl.LSN
	Snapshot string
}

// CreateSlot creates the slot. It waits for all transactions that are open
// anywhere in the cluster.
func (c *Conn) CreateSlot(ctx context.Context, slot string, failover bool) (Created, error) {
	options := "SNAPSHOT 'export'"
	if failover {
		options += ", FAILOVER true"
	}
	// pglogrepl.CreateReplicationSlot neither quotes the name nor knows the
	// option form, which FAILOVER needs.
	rows := c.pg.Exec(ctx, fmt.Sprintf(`CREATE_REPLICATION_SLOT %s LOGICAL pgoutput (%s)`, quote(slot), options))
	created, err := pglogrepl.ParseCreateReplicationSlot(rows)
	switch {
	case hasCode(err, duplicateObject): // another relay is creating it, or has
		return Created{}, fmt.Errorf("create slot %s: %w: %w", slot, ErrSlotInUse, err)
	case hasCode(err, configurationLimits):
		return Created{}, fmt.Errorf("create slot %s: all replication slots are in use: raise max_replication_slots, or drop a slot that nobody needs: %w", slot, err)
	case err != nil:
		return Created{}, fmt.Errorf("create slot %s: %w", slot, err)
	}
	point, err := lsn.Parse(created.ConsistentPoint)
	return Created{Point: point, Snapshot: created.SnapshotName}, err
}

// Close ends the connection without confirming anything.
func (c *Conn) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = c.pg.Close(ctx)
}

func quote(name string) string {
	return `"` + strings.ReplaceAll(name, `"`, `""`) + `"`
}

func hasCode(err error, code string) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == code
}
