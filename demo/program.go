package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"outbox-relay/internal/pgserver/child"
	"outbox-relay/internal/wait"
)

// program is a process with its log.
type program struct {
	*child.Process
	name string
	log  safeBuffer
}

// start starts a program, which close stops, and returns once its log has ready.
func (s *servers) start(ctx context.Context, name string, cmd *exec.Cmd, ready string) (*program, error) {
	p := &program{name: name}
	cmd.Stdout, cmd.Stderr = &p.log, &p.log
	var err error
	if p.Process, err = child.Start(cmd, syscall.SIGTERM); err != nil {
		return nil, err
	}
	s.programs = append(s.programs, p)
	for !bytes.Contains(p.log.all(), []byte(ready)) {
		select {
		case <-p.Done():
			return nil, p.ended()
		default:
		}
		if err := wait.For(ctx, 5*time.Millisecond); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// kill kills the program in whatever it is doing.
func (p *program) kill() {
	_ = p.Signal(syscall.SIGKILL) // it may have ended, which its log then tells
	<-p.Done()
}

// stop lets the program finish. One that was killed is no error.
func (p *program) stop() error {
	_ = p.Signal(syscall.SIGTERM) // it may have ended
	if p.ExitCode() > 0 {
		return p.ended()
	}
	return nil
}

func (p *program) ended() error {
	return fmt.Errorf("%s ended with exit code %d:\n%s", p.name, p.ExitCode(), p.log.all())
}

// safeBuffer keeps what is written to it. Safe for concurrent use.
type safeBuffer struct {
	mu   sync.Mutex
	text []byte
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text = append(b.text, p...)
	return len(p), nil
}

func (b *safeBuffer) all() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.text)
}
