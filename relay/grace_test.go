package relay_test

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"outbox-relay/internal/testenv"
)

// hung is a relay whose servers have stopped answering, with an event under way.
func hung(t *testing.T, changes ...string) (*bundle, *testenv.Relay) {
	b := setup(t)
	nats := testenv.NATSProcesses(t, testenv.NATSBinary(t, ""), 1)[0]
	r := testenv.StartRelay(t, b.asRelay(b.with(append(changes, "NATS_URL="+nats.URL(), "NATS_USER=", "NATS_PASSWORD=")...)))
	r.WaitLog("msg=streaming")
	b.requireStatus("published", b.insert(1))
	nats.Freeze()
	b.insert(1)
	r.WaitLog("publishing is interrupted")
	return b, r
}

// All that a stop takes ends within the grace, whatever hangs. The bound is far above
// the grace, and below what each wait that has a limit of its own would add.
func TestStopWhileNATSHangs(t *testing.T) {
	t.Parallel()
	_, r := hung(t, "SHUTDOWN_GRACE=1s")
	began := time.Now()
	if code := r.Terminate(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %s to stop, with a grace of 1 s", took)
	}
	if !strings.Contains(r.Logs(), "stopped before all was done") {
		t.Error("the log does not say that it was cut short")
	}
}

// A second signal ends it at once.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	_, r := hung(t, "SHUTDOWN_GRACE=1h")
	r.Signal(syscall.SIGTERM)
	r.WaitLog("msg=stopping")
	requireRuns(t, r)
	r.Signal(syscall.SIGTERM)
	if code := r.Wait(time.Minute); code != 1 {
		t.Errorf("exit code %d", code)
	}
	if !strings.Contains(r.Logs(), "a second signal") {
		t.Error("the log does not say why it ended")
	}
}

func requireRuns(t *testing.T, r *testenv.Relay) {
	t.Helper()
	if !r.Running() {
		t.Fatal("it has ended")
	}
}
