package pace

import (
	"syscall"
	"time"
)

// nap pauses for a part of a millisecond. time.Sleep can't: where nothing else wakes
// the process, the runtime waits for whole milliseconds (runtime/netpoll_epoll.go
// rounds up), and a walsender that is left alone that long does half as much
// (docs/performance.md). A signal may cut it short.
func nap(d time.Duration) {
	pause := syscall.NsecToTimespec(d.Nanoseconds())
	_ = syscall.Nanosleep(&pause, nil)
}
