//go:build unix && !linux

package child

import "syscall"

// maxrssUnit is what getrusage counts a resident set in, in bytes.
const maxrssUnit = 1

// setDeathSignal does nothing: only Linux tells a child of its parent's death.
func setDeathSignal(*syscall.SysProcAttr, syscall.Signal) {}
