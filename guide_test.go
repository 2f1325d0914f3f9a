package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"outbox-relay/internal/debian"
	"outbox-relay/internal/pgserver"
)

// The commands of the getting-started guide, as they stand in the page, print what
// it says that they print.
func TestGettingStarted(t *testing.T) {
	steps := guideSteps(readFile(t, filepath.Join("docs", "getting-started.md")))
	if len(steps) < 10 {
		t.Fatalf("the guide has %d steps", len(steps))
	}
	shell := startShell(t)
	for i, step := range steps {
		shell.run(i, step)
	}
	shell.end()
}

// guideStep is a block of commands, and the lines that it is said to print.
type guideStep struct {
	commands string
	prints   []string
}

func guideSteps(page string) []guideStep {
	var steps []guideStep
	for _, block := range regexp.MustCompile("(?ms)^```(sh|text)\n(.*?)^```$").FindAllStringSubmatch(page, -1) {
		if block[1] == "sh" {
			steps = append(steps, guideStep{commands: block[2]})
			continue
		}
		last := &steps[len(steps)-1]
		last.prints = strings.Split(strings.TrimSpace(block[2]), "\n")
	}
	return steps
}

// guideShell is a shell that reads what a reader types, as fast as a reader who
// goes on when he sees what the page says.
type guideShell struct {
	t     *testing.T
	typed *os.File
	out   shellOutput
	done  chan struct{}
	ended error
}

const guidePatience = 3 * time.Minute // for a step: the first one may build the demo

func startShell(t *testing.T) *guideShell {
	t.Helper()
	if _, err := debian.Installed(t.Context(), "postgresql-client", "psql", t.Logf); err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{"outbox-relay", "consumer"} {
		path := filepath.Join("bin", program)
		if _, err := os.Stat(path); err != nil { // what a developer has there stays
			t.Cleanup(func() { _ = os.Remove(path) })
		}
	}
	stdin, typed, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	port, err := pgserver.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	s := &guideShell{t: t, typed: typed, done: make(chan struct{})}
	cmd := exec.Command("bash")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &s.out, &s.out
	cmd.Env = append(os.Environ(), "SHELLOPTS=errexit", "GOFLAGS=-buildvcs=false", "GOWORK=off",
		fmt.Sprintf("OUTBOX_HTTP_ADDR=127.0.0.1:%d", port))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stdin.Close()
	go func() { s.ended = cmd.Wait(); close(s.done) }()
	t.Cleanup(func() {
		typed.Close()
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) // what a step that failed has left; none: all went well
		<-s.done
	})
	return s
}

// run types the commands, and waits until they are done and all lines are there.
func (s *guideShell) run(number int, step guideStep) {
	s.t.Helper()
	from := s.out.len()
	if _, err := fmt.Fprintf(s.typed, "%secho done-%d\n", step.commands, number); err != nil {
		s.t.Fatal(err)
	}
	want := step.prints
	if !strings.HasPrefix(step.commands, "go run ./demo") { // a shell of its own, which answers later
		want = append([]string{fmt.Sprintf("done-%d", number)}, want...)
	}
	for deadline := time.Now().Add(guidePatience); ; {
		missing := missingLine(s.out.from(from), want)
		if missing == "" {
			return
		}
		select {
		case <-s.done:
			s.t.Fatalf("the shell ended (%v) at:\n%s\n%s", s.ended, step.commands, s.out.from(0))
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%s\ndoes not print\n%s\n%s", step.commands, missing, s.out.from(0))
		}
	}
}

// end leaves the outer shell.
func (s *guideShell) end() {
	s.t.Helper()
	s.typed.Close()
	select {
	case <-s.done:
	case <-time.After(guidePatience):
		s.t.Fatalf("it does not end:\n%s", s.out.from(0))
	}
	if s.ended != nil {
		s.t.Fatalf("%v\n%s", s.ended, s.out.from(0))
	}
}

// missingLine returns the first of the lines that is not in the output; … stands
// for anything.
func missingLine(output string, lines []string) string {
	for _, line := range lines {
		pattern := strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSpace(line)), "…", ".*")
		if !regexp.MustCompile(`(?m)^\s*` + pattern + `\s*$`).MatchString(output) {
			return line
		}
	}
	return ""
}

// shellOutput is safe for concurrent use.
type shellOutput struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *shellOutput) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *shellOutput) len() int { return len(o.from(0)) }

func (o *shellOutput) from(start int) string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()[start:]
}
