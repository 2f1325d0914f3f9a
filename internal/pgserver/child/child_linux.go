package child

import "syscall"

// maxrssUnit is what getrusage counts a resident set in, in bytes.
const maxrssUnit = 1 << 10

func setDeathSignal(attr *syscall.SysProcAttr, sig syscall.Signal) { attr.Pdeathsig = sig }
