// Package discard is the best reader of a slot that is known: it leaves the walsender
// undisturbed, as the relay does, and only counts events. What others read is compared
// with it, and with it what a walsender costs is measured, as the walsender waits for
// nobody else. Linux only: CPU times come from /proc.
package discard

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"outbox-relay/replication/pace"
)

// Reading is a slot, and how it is to be read.
type Reading struct {
	URL, Slot   string
	Publication string
	Options     []string          // of pgoutput; nil: those of the relay
	Parameters  map[string]string // of the session
	Events      int               // inserts after which it ends
	Pace        Pace
}

// Pace is how a connection is read.
type Pace int

const (
	Undisturbed Pace = iota // as the relay does it
	Waiting                 // whatever comes, at once
	Pausing                 // what comes within pileUp, by a receive buffer that grows
)

const (
	pileUp  = 400 * time.Microsecond
	oneRead = 1 << 20 // bytes
)

// pausing pauses before each read.
type pausing struct{ io.Reader }

func (p pausing) Read(b []byte) (int, error) {
	pace.Nap(pileUp)
	return p.Reader.Read(b)
}

// dial makes a connection that is read at that pace.
func (p Pace) dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err == nil && p == Undisturbed {
		conn = pace.NewConn(conn)
	}
	return conn, err
}

// frontend reads what comes on a connection; w writes to it.
func (p Pace) frontend(r io.Reader, w io.Writer) *pgproto3.Frontend {
	switch p {
	case Waiting:
		r = bufio.NewReaderSize(r, oneRead)
	case Pausing:
		r = bufio.NewReaderSize(pausing{r}, oneRead)
	}
	return pgproto3.NewFrontend(r, w)
}

// options are those of the relay.
var options = []string{"proto_version '1'", "messages 'true'"}

// Figures are what a reading took.
type Figures struct {
	Wait      time.Duration // from the start of replication to the first event
	Took      time.Duration // from the first event to the last
	Walsender time.Duration // of CPU, from its start to the last event
	Memory    int64         // of the walsender alone (RssAnon) at the first event, in bytes
	Bytes     int64         // of the messages
}

// Read reads until it has so many events.
func Read(ctx context.Context, r Reading) (f Figures, err error) {
	conn, err := r.connect(ctx)
	if err != nil {
		return f, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	plugin := r.Options
	if plugin == nil {
		plugin = options
	}
	began := time.Now()
	err = pglogrepl.StartReplication(ctx, conn, r.Slot, 0, pglogrepl.StartReplicationOptions{
		Mode:       pglogrepl.LogicalReplication,
		PluginArgs: append([]string{"publication_names '" + r.Publication + "'"}, plugin...),
	})
	if err != nil {
		return f, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Conn().Close() })
	defer stop()
	var first time.Time
	for left := r.Events; left > 0; {
		data, err := receive(conn.Frontend())
		if err != nil {
			return f, err
		}
		f.Bytes += int64(len(data))
		if !isInsert(data) {
			continue
		}
		if left--; first.IsZero() {
			first = time.Now()
			if f.Memory, err = privateMemory(conn.PID()); err != nil {
				return f, err
			}
		}
	}
	f.Wait, f.Took = first.Sub(began), time.Since(first)
	f.Walsender, err = cpuTime(conn.PID())
	return f, err
}

// receive returns the next CopyData, or nothing for what says nothing.
func receive(frontend *pgproto3.Frontend) ([]byte, error) {
	msg, err := frontend.Receive()
	if err != nil {
		return nil, err
	}
	switch msg := msg.(type) {
	case *pgproto3.CopyData:
		return msg.Data, nil
	case *pgproto3.ErrorResponse:
		return nil, pgconn.ErrorResponseToPgError(msg)
	case *pgproto3.ParameterStatus:
		return nil, nil
	default:
		return nil, fmt.Errorf("unexpected %T", msg)
	}
}

// isInsert tells whether a CopyData is XLogData, whose head has 25 bytes, with an
// insert of pgoutput.
func isInsert(data []byte) bool {
	return len(data) > 25 && data[0] == pglogrepl.XLogDataByteID && data[25] == 'I'
}

func (r Reading) connect(ctx context.Context) (*pgconn.PgConn, error) {
	config, err := pgconn.ParseConfig(r.URL)
	if err != nil {
		return nil, err
	}
	config.RuntimeParams["replication"] = "database"
	config.RuntimeParams["wal_sender_timeout"] = "0"
	for name, value := range r.Parameters {
		config.RuntimeParams[name] = value
	}
	config.DialFunc, config.BuildFrontend = r.Pace.dial, r.Pace.frontend
	return pgconn.ConnectConfig(ctx, config)
}

// cpuTime is what a process of one thread has run, in ns the first number of its
// schedstat. Source: Documentation/scheduler/sched-stats.rst of Linux.
func cpuTime(pid uint32) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", pid))
	if err != nil {
		return 0, err
	}
	ns, err := strconv.ParseInt(strings.Fields(string(text))[0], 10, 64)
	return time.Duration(ns), err
}

// privateMemory is what a process has for itself, without shared_buffers.
func privateMemory(pid uint32) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(text), "RssAnon:")
	fields := strings.Fields(after)
	if len(fields) == 0 {
		return 0, fmt.Errorf("/proc/%d/status has no RssAnon", pid)
	}
	kib, err := strconv.ParseInt(fields[0], 10, 64)
	return kib << 10, err
}
