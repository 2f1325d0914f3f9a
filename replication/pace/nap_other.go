//go:build !linux

package pace

import "time"

// Nap pauses for a part of a millisecond.
func Nap(d time.Duration) { time.Sleep(d) }
