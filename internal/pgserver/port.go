package pgserver

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
)

// Ports below those that the OS gives to outgoing connections (Linux: from
// 32768 on), so that a server that is down finds its port still free.
const firstPort, endPort = 15000, 32000

var ports struct {
	sync.Mutex
	given map[int]bool
}

// FreePort returns a TCP port that is free on 127.0.0.1. It never gives one
// twice, and nothing but another server that asks for it by number takes it.
func FreePort() (int, error) {
	ports.Lock()
	defer ports.Unlock()
	if ports.given == nil {
		ports.given = map[int]bool{}
	}
	for range 1000 {
		port := firstPort + rand.IntN(endPort-firstPort)
		if !ports.given[port] && isFree(port) {
			ports.given[port] = true
			return port, nil
		}
	}
	return 0, errors.New("no free TCP port on 127.0.0.1")
}

func isFree(port int) bool {
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return false
	}
	l.Close()
	return true
}
