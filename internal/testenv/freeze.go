package testenv

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// awaitFrozen waits until every thread of a process has stopped that SIGSTOP was sent to:
// until then, which takes a moment beside load, it may still answer. Where there is no
// /proc, nobody can tell.
func awaitFrozen(tb testing.TB, pid int) {
	tb.Helper()
	Eventually(tb, fmt.Sprintf("process %d to be frozen", pid), func() bool {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil {
			tb.Fatal(err)
		}
		for _, thread := range threads {
			if stat, err := os.ReadFile(thread); err == nil && running(stat) {
				return false
			}
		}
		return true
	})
}

// running reads a thread's state, which stands behind its name in parentheses.
// Source: proc_pid_stat(5).
func running(stat []byte) bool {
	state := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	return len(state) > 0 && !bytes.ContainsAny(state[0], "TtZX")
}
