package testenv

import (
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"outbox-relay/internal/pgserver/child"
)

// Relay is the relay's binary as a child process. Its methods are safe for
// concurrent use, but those that can fail the test are for its own goroutine.
type Relay struct {
	tb      testing.TB
	process *child.Process
	logs    logBuffer
}

// StartRelay starts the relay's binary with args. Its environment is env, whose
// keys are whole names (OUTBOX_SLOT), and PATH, HOME and TMPDIR. Cleanup kills
// it and shows its output if the test failed.
func StartRelay(tb testing.TB, env map[string]string, args ...string) *Relay {
	tb.Helper()
	return startRelay(tb, RelayBinary(tb), env, args...)
}

// StartProgram starts another program in the relay's place: pkg is its import
// path, or its folder relative to the module's root ("./internal/x").
func StartProgram(tb testing.TB, pkg string, env map[string]string, args ...string) *Relay {
	tb.Helper()
	return startRelay(tb, binary(tb, pkg), env, args...)
}

// StartBinary starts the program at that path in the relay's place.
func StartBinary(tb testing.TB, path string, env map[string]string, args ...string) *Relay {
	tb.Helper()
	return startRelay(tb, path, env, args...)
}

func startRelay(tb testing.TB, binary string, env map[string]string, args ...string) *Relay {
	tb.Helper()
	r := &Relay{tb: tb, logs: logBuffer{changed: make(chan struct{})}}
	cmd := exec.Command(binary, args...)
	cmd.Dir = tb.TempDir()
	cmd.Env = relayEnv(env)
	cmd.Stdout, cmd.Stderr = &r.logs, &r.logs
	var err error
	if r.process, err = child.Start(cmd, syscall.SIGKILL); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		r.Kill()
		if tb.Failed() {
			tb.Logf("output of the relay (process %d):\n%s", r.Pid(), r.Logs())
		}
	})
	return r
}

func relayEnv(env map[string]string) []string {
	var list []string
	for _, name := range []string{"PATH", "HOME", "TMPDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			list = append(list, name+"="+value)
		}
	}
	if raceDetector() {
		list = append(list, "GORACE=halt_on_error=1 atexit_sleep_ms=0")
	}
	for name, value := range env {
		list = append(list, name+"="+value)
	}
	return list
}

// Pid is the process id.
func (r *Relay) Pid() int { return r.process.Pid() }

// Running tells whether the relay has not ended yet.
func (r *Relay) Running() bool {
	select {
	case <-r.process.Done():
		return false
	default:
		return true
	}
}

// Signal sends sig. A relay that has ended fails the test.
func (r *Relay) Signal(sig os.Signal) {
	r.tb.Helper()
	if err := r.process.Signal(sig); err != nil {
		r.tb.Fatalf("signal %v to the relay: %v\n%s", sig, err, r.Logs())
	}
}

// Kill ends the relay by SIGKILL, frozen or not, and waits for its end. One
// that has ended is left in peace.
func (r *Relay) Kill() {
	r.process.Signal(syscall.SIGKILL) // fails only if it has ended
	<-r.process.Done()
}

// Terminate sends SIGTERM, waits for the end, and returns the exit code.
func (r *Relay) Terminate() int {
	r.tb.Helper()
	r.Signal(syscall.SIGTERM)
	return r.Wait(patience)
}

// Wait waits for the relay to end by itself and returns its exit code, -1 if a
// signal ended it. Running for longer than timeout fails the test.
func (r *Relay) Wait(timeout time.Duration) int {
	r.tb.Helper()
	select {
	case <-r.process.Done():
	case <-time.After(timeout):
		r.tb.Fatalf("the relay still runs after %s", timeout)
	}
	return r.process.ExitCode()
}

// Freeze stops the relay in its tracks (SIGSTOP): its connections stay open.
func (r *Relay) Freeze() {
	r.tb.Helper()
	r.Signal(syscall.SIGSTOP)
	awaitFrozen(r.tb, r.Pid())
}

// Thaw lets a frozen relay go on.
func (r *Relay) Thaw() { r.tb.Helper(); r.Signal(syscall.SIGCONT) }

// Logs is all that the relay has written so far to stdout and stderr.
func (r *Relay) Logs() string {
	text, _ := r.logs.read()
	return text
}

// WaitLog waits until the relay has written substr, since its start. It fails
// the test after a minute, and at once when the relay ends without it.
func (r *Relay) WaitLog(substr string) {
	r.tb.Helper()
	timeout := time.After(patience)
	for {
		ended := !r.Running()
		text, changed := r.logs.read()
		if strings.Contains(text, substr) {
			return
		}
		if ended {
			r.tb.Fatalf("the relay ended (exit code %d) without logging %q; its output:\n%s", r.process.ExitCode(), substr, text)
		}
		select {
		case <-changed:
		case <-r.process.Done():
		case <-timeout:
			r.tb.Fatalf("waited %s in vain for the relay to log %q; its output:\n%s", patience, substr, text)
		}
	}
}

// logBuffer keeps what is written to it and tells when there is more.
type logBuffer struct {
	mu      sync.Mutex
	text    []byte
	changed chan struct{} // closed and replaced by each write
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text = append(b.text, p...)
	close(b.changed)
	b.changed = make(chan struct{})
	return len(p), nil
}

// read returns all that was written, and a channel that the next write closes.
func (b *logBuffer) read() (string, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.text), b.changed
}
