package testenv

import (
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

func startFake(t *testing.T, env map[string]string, args ...string) *Relay {
	t.Helper()
	return startRelay(t, binary(t, "./internal/testenv/testdata/fakerelay"), env, args...)
}

func TestRelayTerminates(t *testing.T) {
	t.Setenv("OUTBOX_STRAY", "1")
	r := startFake(t, map[string]string{"OUTBOX_SLOT": "s", "OUTBOX_EXIT": "1"}, "run", "--json")
	r.WaitLog("ready")
	for _, want := range []string{"arguments: [run --json]", "OUTBOX_SLOT=s", "PATH="} {
		if !strings.Contains(r.Logs(), want) {
			t.Errorf("logs lack %q:\n%s", want, r.Logs())
		}
	}
	if strings.Contains(r.Logs(), "OUTBOX_STRAY") {
		t.Error("the relay got a variable that it was not given")
	}
	if code := r.Terminate(); code != 7 {
		t.Errorf("exit code %d, want 7", code)
	}
	r.WaitLog("drained")
}

func TestRelayWait(t *testing.T) {
	if code := startFake(t, nil, "fail").Wait(time.Minute); code != 3 {
		t.Errorf("exit code %d, want 3", code)
	}
	r := startFake(t, nil)
	failure(t, func(tb testing.TB) { r.on(tb).Wait(time.Millisecond) })
}

func TestWaitLogFailsEarly(t *testing.T) {
	r := startFake(t, nil, "fail")
	said := failure(t, func(tb testing.TB) { r.on(tb).WaitLog("ready") })
	for _, want := range []string{`"ready"`, "exit code 3", "failing"} {
		if !strings.Contains(said, want) {
			t.Errorf("failure without %s: %s", want, said)
		}
	}
}

// on is r reporting to another testing.TB.
func (r *Relay) on(tb testing.TB) *Relay {
	r.tb = tb
	return r
}

func TestRelayKilledWhileFrozen(t *testing.T) {
	r := startFake(t, nil)
	r.WaitLog("ready")
	r.Freeze()
	r.Kill()
	if code := r.Wait(time.Minute); code != -1 || r.Running() {
		t.Errorf("exit code %d, running %v", code, r.Running())
	}
}

func TestRelayFreezesAndThaws(t *testing.T) {
	r := startFake(t, nil)
	r.WaitLog("ready")
	r.Freeze()
	r.Signal(syscall.SIGTERM)
	failure(t, func(tb testing.TB) { r.on(tb).Wait(100 * time.Millisecond) })
	r.on(t).Thaw()
	if code := r.Wait(time.Minute); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

func TestBinaryIsBuiltOnce(t *testing.T) {
	pkg := "./internal/testenv/testdata/fakerelay"
	first, err := os.Stat(binary(t, pkg))
	if err != nil {
		t.Fatal(err)
	}
	second, err := os.Stat(binary(t, pkg))
	if err != nil || !os.SameFile(first, second) {
		t.Errorf("built again (%v)", err)
	}
	failure(t, func(tb testing.TB) { binary(tb, "./no/such/package") })
}
