package testenv

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"outbox-relay/internal/wait"
)

// link is a client's connection and the one to the server that belongs to it.
type link struct {
	ctx    context.Context // ends with the link
	cancel context.CancelFunc
	broken atomic.Int64 // the Directions that we ended: what still comes is dropped

	mu     sync.Mutex
	client *net.TCPConn
	server *net.TCPConn // nil until dialled
}

func newLink(client *net.TCPConn) *link {
	ctx, cancel := context.WithCancel(context.Background())
	return &link{ctx: ctx, cancel: cancel, client: client}
}

// dial connects to the server. false: it cannot, or the link has ended.
func (l *link) dial(target string) bool {
	var dialer net.Dialer
	conn, err := dialer.DialContext(l.ctx, "tcp", target)
	if err != nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.server = conn.(*net.TCPConn)
	return l.ctx.Err() == nil
}

// ends returns where direction d comes from and goes to.
func (l *link) ends(d Direction) (source, target *net.TCPConn) {
	if d == Upstream {
		return l.client, l.server
	}
	return l.server, l.client
}

// reset ends the link by RST: what was written may be lost. Without effect on a
// link that has ended.
func (l *link) reset() { l.end(abort) }

// close ends the link in order: what was written arrives.
func (l *link) close() { l.end(func(conn *net.TCPConn) { conn.Close() }) }

func (l *link) end(each func(*net.TCPConn)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cancel()
	for _, conn := range []*net.TCPConn{l.client, l.server} {
		if conn != nil {
			each(conn)
		}
	}
}

// abort closes conn by RST. A closed one stays as it is.
func abort(conn *net.TCPConn) {
	conn.SetLinger(0)
	conn.Close()
}

func (l *link) halfClose(d Direction) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.broken.Or(int64(d))
	for _, one := range []Direction{Upstream, Downstream} {
		if _, target := l.ends(one); d&one != 0 && target != nil {
			target.CloseWrite() // fails if the link has ended
		}
	}
}

func (l *link) isBroken(d Direction) bool { return l.broken.Load()&int64(d) != 0 }

// sleepUntil returns at time t. false: the link has ended.
func (l *link) sleepUntil(t time.Time) bool {
	left := time.Until(t)
	return left <= 0 || wait.For(l.ctx, left) == nil
}
