package pace

import (
	"syscall"
	"time"
)

// Nap pauses for a part of a millisecond. time.Sleep can't: where nothing else wakes
// the process, the runtime waits for whole milliseconds (runtime/netpoll_epoll.go
// rounds up). A signal may cut it short.
func Nap(d time.Duration) {
	pause := syscall.NsecToTimespec(d.Nanoseconds())
	_ = syscall.Nanosleep(&pause, nil)
}
