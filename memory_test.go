package main

import (
	"bytes"
	"log/slog"
	"math"
	"runtime/debug"
	"strings"
	"testing"
)

func TestMemoryFollowsTheWindow(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(math.MaxInt64))
	if window := limitMemory(10<<20, slog.New(slog.DiscardHandler)); window != 10<<20 {
		t.Errorf("the window is %d", window)
	}
	if limit := debug.SetMemoryLimit(-1); limit != 10<<20+besidesWindow {
		t.Errorf("the limit is %d", limit)
	}
}

// Whoever sets GOMEMLIMIT has a container in mind: the window is what gives way.
func TestWindowFollowsGOMEMLIMIT(t *testing.T) {
	for _, c := range []struct {
		limit, window, want int64
		told                bool
	}{
		{limit: 200 << 20, window: 64 << 20, want: 64 << 20},
		{limit: 64 << 20, window: 64 << 20, want: 64<<20 - besidesWindow, told: true},
		{limit: 20 << 20, window: 64 << 20, want: leastWindow, told: true},
	} {
		before := debug.SetMemoryLimit(c.limit) // as the runtime does with GOMEMLIMIT
		var out bytes.Buffer
		if window := limitMemory(c.window, slog.New(slog.NewTextHandler(&out, nil))); window != c.want {
			t.Errorf("limit %d: the window is %d, want %d", c.limit, window, c.want)
		}
		if told := strings.Contains(out.String(), "GOMEMLIMIT"); told != c.told {
			t.Errorf("limit %d: the log says %q", c.limit, out.String())
		}
		if limit := debug.SetMemoryLimit(before); limit != c.limit {
			t.Errorf("limit %d became %d", c.limit, limit)
		}
	}
}
