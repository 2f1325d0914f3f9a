//go:build !linux

package replication

import "syscall"

// limitUnacknowledged does nothing: the system has no such limit to set.
func limitUnacknowledged(_, _ string, _ syscall.RawConn) error { return nil }
