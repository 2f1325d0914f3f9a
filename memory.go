package main

import (
	"log/slog"
	"math"
	"runtime/debug"
)

// besidesWindow is what the process may hold beside what is sent and unacknowledged:
// buffers, the ids of what is not recorded yet, garbage. 29 to 45 MiB were seen in all
// with a window of 8192 events of 200 B.
const besidesWindow = 48 << 20

// leastWindow is the least that OUTBOX_MAX_INFLIGHT_BYTES takes.
const leastWindow = 1 << 20

// limitMemory ties the window and the garbage collector's limit together, so that
// memory is bounded whatever the sizes of events: the limit follows from the window,
// or, where GOMEMLIMIT sets it, the window from the limit. It returns the window.
func limitMemory(window int64, log *slog.Logger) int64 {
	limit := debug.SetMemoryLimit(-1)
	if limit == math.MaxInt64 {
		debug.SetMemoryLimit(window + besidesWindow)
		return window
	}
	room := max(limit-besidesWindow, leastWindow)
	if room >= window {
		return window
	}
	log.Warn("GOMEMLIMIT is too small for the window: fewer bytes are sent ahead", "gomemlimit_bytes", limit,
		"max_inflight_bytes", room, "remedy", "lower OUTBOX_MAX_INFLIGHT_BYTES, or raise GOMEMLIMIT")
	return room
}
