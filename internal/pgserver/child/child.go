// Package child runs programs that must not outlive this process: throw-away
// servers, and the relay under test. Linux and macOS.
package child

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// Process is a running or ended child. Its methods are safe for concurrent use.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

// Start starts cmd in a process group of its own, so that Ctrl-C at the
// terminal reaches only us. Where the OS can do that (Linux), the child gets
// the signal orphaned when this process dies, however it dies.
//
// Start owns cmd from then on: it waits for it, nobody else may.
func Start(cmd *exec.Cmd, orphaned syscall.Signal) (*Process, error) {
	family, inherited, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	cmd.ExtraFiles = append(cmd.ExtraFiles, inherited)
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	setDeathSignal(cmd.SysProcAttr, orphaned)

	p := &Process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go p.run(started, family, inherited)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	return p, nil
}

// run starts the child and waits for it on one thread, which it holds: Linux
// sends the death signal when the thread that forked ends, not the process.
// Every descendant inherits a pipe's end, so end of file means that all ended.
func (p *Process) run(started chan<- error, family, inherited *os.File) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer family.Close()
	err := p.cmd.Start()
	inherited.Close()
	started <- err
	if err != nil {
		return
	}
	p.cmd.Wait() // its outcome stays in ProcessState
	io.Copy(io.Discard, family)
	close(p.done)
}

// Pid is the child's process id, also after its end.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Signal sends sig to the child alone. os.ErrProcessDone: it has ended.
func (p *Process) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

// Done is closed once the child and all that it forked have ended and all
// output has been copied.
func (p *Process) Done() <-chan struct{} { return p.done }

// ExitCode waits for the end. -1: ended by a signal.
func (p *Process) ExitCode() int {
	<-p.done
	return p.cmd.ProcessState.ExitCode()
}

// Usage waits for the end and returns what the child used: its CPU time, user
// and system, and its largest resident set in bytes; at least what this process
// had when it forked, as Linux counts.
func (p *Process) Usage() (cpu time.Duration, memory int64) {
	<-p.done
	state := p.cmd.ProcessState
	cpu = state.UserTime() + state.SystemTime()
	if usage, ok := state.SysUsage().(*syscall.Rusage); ok {
		memory = usage.Maxrss * maxrssUnit
	}
	return cpu, memory
}
