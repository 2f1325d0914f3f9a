// Package flock locks folders against other processes.
package flock

import (
	"context"
	"errors"
	"os"
	"syscall"
	"time"

	"outbox-relay/internal/wait"
)

// Try locks the folder dir against other processes, until the returned file
// is closed or this process ends. syscall.EWOULDBLOCK: another one has it.
func Try(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, &os.PathError{Op: "lock", Path: dir, Err: err}
		}
	}
}

// Wait is Try that waits for its turn, or until ctx ends.
func Wait(ctx context.Context, dir string) (*os.File, error) {
	for {
		f, err := Try(dir)
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return f, err
		}
		if err := wait.For(ctx, 50*time.Millisecond); err != nil {
			return nil, err
		}
	}
}
