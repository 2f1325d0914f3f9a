//go:build !linux

package pace

import "time"

// nap pauses for a part of a millisecond.
func nap(d time.Duration) { time.Sleep(d) }
