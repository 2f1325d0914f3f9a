package ops_test

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"

	"outbox-relay/internal/testenv"
)

// screen is a program whose errors and progress go to a real terminal, or to a
// pipe.
type screen struct {
	*exec.Cmd
	mu    sync.Mutex
	shown bytes.Buffer
	done  chan struct{} // all that it wrote has been read
}

func (s *screen) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shown.String()
}

func (s *screen) read(from io.Reader) {
	defer close(s.done)
	chunk := make([]byte, 4096)
	for {
		n, err := from.Read(chunk)
		s.mu.Lock()
		s.shown.Write(chunk[:n])
		s.mu.Unlock()
		if err != nil {
			return // EIO: nobody has the terminal any more
		}
	}
}

// watch starts the relay's program at a terminal, or not.
func (e *ends) watch(t *testing.T, terminal bool, args ...string) *screen {
	t.Helper()
	var master, slave *os.File
	var err error
	if terminal {
		if master, slave, err = pty.Open(); err == nil {
			err = pty.Setsize(slave, &pty.Winsize{Rows: 24, Cols: 100})
		}
	} else {
		master, slave, err = os.Pipe()
	}
	if err != nil {
		t.Fatal(err)
	}
	s := &screen{Cmd: exec.Command(testenv.RelayBinary(t), args...), done: make(chan struct{})}
	s.Env = append(os.Environ(), "OUTBOX_POSTGRES_URL="+e.postgres, "OUTBOX_NATS_URL="+e.nats, "OUTBOX_SLOT="+e.slot, "OUTBOX_HTTP_ADDR=", "OUTBOX_SHUTDOWN_GRACE=1s")
	s.Stderr = slave
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	go s.read(master)
	t.Cleanup(func() {
		_ = s.Process.Kill()
		_ = s.Wait()
		<-s.done
		master.Close()
		if t.Failed() {
			t.Logf("%v showed %q", args, s.text())
		}
	})
	return s
}

// await waits until the text was shown.
func (s *screen) await(t *testing.T, text string) {
	t.Helper()
	testenv.Eventually(t, "the screen to show "+text, func() bool { return strings.Contains(s.text(), text) })
}

// end waits for the program's end and looks at what it showed: at a terminal a
// bar, and every line of the log whole behind what cleared the bar; elsewhere no
// bar and not one control character.
func (s *screen) end(t *testing.T, terminal bool, bar string) {
	t.Helper()
	_ = s.Wait()
	<-s.done
	text := s.text()
	bars := strings.Contains(text, "█") || strings.Contains(text, "it/s") || strings.Contains(text, bar+"   0% |")
	if bars != terminal {
		t.Errorf("terminal %t, bar %t", terminal, bars)
	}
	if !terminal && strings.ContainsAny(text, "\x1b\r") {
		t.Error("control characters where there is no terminal")
	}
	for line := range strings.Lines(text) {
		if at := strings.Index(line, "time="); at > 0 && !strings.HasSuffix(line[:at], "\x1b[2K\r") {
			t.Errorf("a line of the log is torn: %q", line)
		}
	}
}

func forms(t *testing.T, run func(t *testing.T, terminal bool)) {
	for name, terminal := range map[string]bool{"terminal": true, "pipe": false} {
		t.Run(name, func(t *testing.T) { run(t, terminal) })
	}
}

func TestMigrateShowsProgress(t *testing.T) {
	forms(t, func(t *testing.T, terminal bool) {
		e := &ends{postgres: testenv.InhabitedDatabase(t, testenv.Postgres(t)), nats: "nats://127.0.0.1:1", slot: "outbox_relay"}
		s := e.watch(t, terminal, "migrate")
		s.end(t, terminal, "migrating")
		if !strings.Contains(s.text(), "migration applied") {
			t.Error("the log does not tell what was applied")
		}
	})
}

// Backfill and draining, with events in flight that a frozen broker holds up.
func TestRunShowsBackfillAndDraining(t *testing.T) {
	forms(t, func(t *testing.T, terminal bool) {
		e := newEnds(t)
		e.exec(t, `insert into events (aggregate_type, event_type, payload) select 'order', 'placed', '{}' from generate_series(1, 20000)`)
		nats := testenv.NewProxy(t, strings.TrimPrefix(e.nats, "nats://"))
		e.nats = "nats://" + nats.Addr()
		s := e.watch(t, terminal)
		s.await(t, "msg=streaming")
		if !strings.Contains(s.text(), "publishing the rows that do not come out of the slot") {
			t.Error("nothing of the backfill")
		}
		nats.Stall(true)
		e.exec(t, `insert into events (aggregate_type, event_type, payload) select 'order', 'placed', '{}' from generate_series(1, 10)`)
		s.await(t, "publishing is interrupted")
		if err := s.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		s.end(t, terminal, "stopping")
		if drained := strings.Contains(s.text(), "stopping   0% |"); drained != terminal {
			t.Errorf("terminal %t, bar of the draining %t", terminal, drained)
		}
	})
}

func TestReplayShowsProgress(t *testing.T) {
	e := newEnds(t)
	served := serve(t, e.config())
	served.run()
	served.await("/readyz", 200, "streaming")
	e.exec(t, `insert into events (aggregate_type, event_type, payload) select 'order', 'placed', '{}' from generate_series(1, 5000)`)
	testenv.EventuallyWithin(t, time.Minute, "all published", func() bool {
		return count(t, e, `select count(*) from events where status = 'published' and aggregate_type <> 'history'`) == 5000
	})
	forms(t, func(t *testing.T, terminal bool) {
		s := e.watch(t, terminal, "replay", "--all", "--yes")
		s.end(t, terminal, "replaying")
		if !strings.Contains(s.text(), "run replay-") {
			t.Error("the run has no name")
		}
	})
}
