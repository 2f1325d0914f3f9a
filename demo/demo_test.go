package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

var binary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "outbox-relay-demo-test-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "demo")
	build := exec.Command("go", "build", "-o", path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as the other programs: compiled once for all
	out, err := build.CombinedOutput()
	if err != nil {
		os.Stderr.Write(out)
	}
	return path, err
})

func TestMain(m *testing.M) {
	code := m.Run()
	if path, err := binary(); err == nil {
		os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

// demo is the demo as a process, with a folder for temporary files of its own.
type demo struct {
	*exec.Cmd
	t    *testing.T
	temp string
	out  safeBuffer
	done chan struct{}
}

func startDemo(t *testing.T) *demo {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	d := &demo{Cmd: exec.Command(path), t: t, temp: t.TempDir(), done: make(chan struct{})}
	d.Env = append(os.Environ(), "TMPDIR="+d.temp)
	d.Stdout, d.Stderr = &d.out, &d.out
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = d.Wait(); close(d.done) }() // its outcome stays in ProcessState
	t.Cleanup(func() { _ = d.Process.Kill(); <-d.done })
	return d
}

// await waits until the demo has printed the text.
func (d *demo) await(text string) {
	d.t.Helper()
	for deadline := time.Now().Add(5 * time.Minute); !bytes.Contains(d.out.all(), []byte(text)); time.Sleep(5 * time.Millisecond) {
		select {
		case <-d.done:
			d.t.Fatalf("it ended without %q:\n%s", text, d.out.all())
		default:
		}
		if time.Now().After(deadline) {
			d.t.Fatalf("waited in vain for %q:\n%s", text, d.out.all())
		}
	}
}

// requireEnd waits for the end, behind which nothing is left.
func (d *demo) requireEnd(code int) {
	d.t.Helper()
	<-d.done
	if got := d.ProcessState.ExitCode(); got != code {
		d.t.Fatalf("exit code %d, want %d:\n%s", got, code, d.out.all())
	}
	left, err := os.ReadDir(d.temp)
	if err != nil {
		d.t.Fatal(err)
	}
	for _, entry := range left {
		if !strings.HasPrefix(entry.Name(), "go-build") { // of the go command
			d.t.Errorf("left behind: %s", entry.Name())
		}
	}
}

func TestDemo(t *testing.T) {
	d := startDemo(t)
	d.requireEnd(0)
	for _, want := range []string{"packs 2 × espresso cup", "Thank you, Ada: 2", "nobody will hear of it", "kill -9",
		"6304 messages: lost 0, twice 0, out of order 0, never committed 0, changed 0", "packed 6304 orders in 6304 parcels", "thanked for 6304 orders in 6304 mails", "All is well"} {
		if !bytes.Contains(d.out.all(), []byte(want)) {
			t.Errorf("it does not say %q", want)
		}
	}
	if t.Failed() || bytes.Contains(d.out.all(), []byte("\x1b[")) {
		t.Errorf("its output:\n%s", d.out.all())
	}
}

func TestInterrupted(t *testing.T) {
	for _, moment := range []string{"started", "order 2", "kill -9"} {
		t.Run(moment, func(t *testing.T) {
			d := startDemo(t)
			d.await(moment)
			if err := d.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
			d.requireEnd(130)
			if !bytes.Contains(d.out.all(), []byte("interrupted")) {
				t.Fatalf("it does not say so:\n%s", d.out.all())
			}
		})
	}
}

// The audit finds what it looks for.
func TestJudge(t *testing.T) {
	committed := map[string]string{"a": "1", "b": "2", "c": "3"}
	a, b, c := message{"a", "1/0/10/1", "1"}, message{"b", "1/0/10/2", "2"}, message{"c", "1/0/200/1", "3"}
	for name, test := range map[string]struct {
		messages []message
		want     verdict
	}{
		"right":           {[]message{a, b, c}, verdict{committed: 3}},
		"lost":            {[]message{a, c}, verdict{committed: 3, lost: 1}},
		"twice":           {[]message{a, b, c, {"b", "1/0/300/1", "2"}}, verdict{committed: 3, twice: 1}},
		"out of order":    {[]message{b, a, c}, verdict{committed: 3, outOfOrder: 1}},
		"never committed": {[]message{a, b, c, {"d", "1/0/300/1", "4"}}, verdict{committed: 3, phantom: 1}},
		"changed":         {[]message{a, b, {"c", "1/0/200/1", "3.0"}}, verdict{committed: 3, changed: 1}},
		"no position":     {[]message{a, {"b", "", "2"}, c}, verdict{committed: 3, outOfOrder: 1}},
	} {
		got := judge(test.messages, committed)
		if got != test.want {
			t.Errorf("%s: %+v, want %+v", name, got, test.want)
		}
		if (got.fault() == nil) != (name == "right") {
			t.Errorf("%s: fault %v", name, got.fault())
		}
	}
}
