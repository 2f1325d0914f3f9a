package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"syscall"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
)

// pileUp is how long bytes may pile up before they are read: a reader that always
// waits makes the walsender wake it for every message, which halves the walsender.
const (
	pileUp  = 400 * time.Microsecond
	oneRead = 1 << 20 // bytes
)

// pilingUp waits before each read. Go's own timers would wait a millisecond in a
// process that does nothing else, nanosleep is exact; and a millisecond is too long
// (tried: 238,000 events/s with 0.4 ms, 106,000 with 1 ms, 155,000 without a pause).
// So is a receive buffer of a fixed size: it brought 94,000.
type pilingUp struct{ io.Reader }

func (p pilingUp) Read(b []byte) (int, error) {
	pause := syscall.NsecToTimespec(pileUp.Nanoseconds())
	_ = syscall.Nanosleep(&pause, nil) // a signal may cut it short
	return p.Reader.Read(b)
}

// readAndDiscard measures the best reader that is known, from the first event to
// the last: it lets bytes pile up, and only counts events.
func (d *database) readAndDiscard(ctx context.Context, w Workload) (float64, error) {
	conn, err := d.connectPiling(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	err = pglogrepl.StartReplication(ctx, conn, d.slot("discard"), 0, pglogrepl.StartReplicationOptions{
		Mode:       pglogrepl.LogicalReplication,
		PluginArgs: []string{"proto_version '1'", "publication_names '" + publication + "'", "messages 'true'"},
	})
	if err != nil {
		return 0, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Conn().Close() })
	defer stop()
	var first time.Time
	for left := w.Events; left > 0; {
		msg, err := conn.Frontend().Receive()
		if err != nil {
			return 0, err
		}
		switch msg := msg.(type) {
		case *pgproto3.CopyData:
			if !isInsert(msg.Data) {
				continue
			}
			if left--; first.IsZero() {
				first = time.Now()
			}
		case *pgproto3.ErrorResponse:
			return 0, pgconn.ErrorResponseToPgError(msg)
		case *pgproto3.ParameterStatus:
		default:
			return 0, fmt.Errorf("unexpected %T", msg)
		}
	}
	return w.rate(time.Since(first)), nil
}

// isInsert tells whether a CopyData is XLogData, whose head has 25 bytes, with an
// insert of pgoutput.
func isInsert(data []byte) bool {
	return len(data) > 25 && data[0] == pglogrepl.XLogDataByteID && data[25] == 'I'
}

func (d *database) connectPiling(ctx context.Context) (*pgconn.PgConn, error) {
	config, err := pgconn.ParseConfig(d.url)
	if err != nil {
		return nil, err
	}
	config.RuntimeParams["replication"] = "database"
	config.RuntimeParams["wal_sender_timeout"] = "0"
	config.BuildFrontend = func(r io.Reader, w io.Writer) *pgproto3.Frontend {
		return pgproto3.NewFrontend(bufio.NewReaderSize(pilingUp{r}, oneRead), w)
	}
	return pgconn.ConnectConfig(ctx, config)
}
