package testenv

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// Direction of bytes through a Proxy, seen from the client. Both is a set.
type Direction int

const (
	Upstream   Direction = 1 << iota // client to server
	Downstream                       // server to client
	Both       = Upstream | Downstream
)

// Proxy is a TCP proxy that can break connections in many ways. Its methods are
// safe for concurrent use. A fault set by one lasts until it is taken back.
type Proxy struct {
	target   string // host:port
	listener *net.TCPListener
	wg       sync.WaitGroup

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when a stall begins or ends
	stalled Direction
	budget  map[Direction]int // bytes until the cut; no entry: no cut
	delay   time.Duration
	refuse  bool
	links   map[*link]bool
}

// NewProxy listens on a port of its own on 127.0.0.1 and forwards to target,
// host:port, until Cleanup.
func NewProxy(tb testing.TB, target string) *Proxy {
	tb.Helper()
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: FreePort(tb)})
	if err != nil {
		tb.Fatalf("proxy to %s: %v", target, err)
	}
	p := &Proxy{
		target:   target,
		listener: listener,
		changed:  make(chan struct{}),
		budget:   map[Direction]int{},
		links:    map[*link]bool{},
	}
	p.wg.Go(p.accept)
	tb.Cleanup(p.close)
	return p
}

// close leaves no connection and no goroutine behind.
func (p *Proxy) close() {
	p.Refuse(true) // what is being accepted is not added any more
	p.listener.Close()
	p.Cut()
	p.wg.Wait()
}

// Addr is where clients connect, host:port.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Connections is the number of clients connected now.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.links)
}

// Cut resets all connections, on both sides. Bytes under way may be lost.
func (p *Proxy) Cut() {
	for _, l := range p.current() {
		l.reset()
	}
}

// Refuse makes the proxy reset new connections at once. It leaves the others.
func (p *Proxy) Refuse(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = on
}

// Stall stops forwarding in both directions, on present and new connections,
// without closing any; at most what is being written to a socket still gets
// through. What was held back is forwarded when the stall ends.
func (p *Proxy) Stall(on bool) { p.StallDirection(Both, on) }

// StallDirection is Stall in one direction.
func (p *Proxy) StallDirection(d Direction, on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stalled &^= d
	if on {
		p.stalled |= d
	}
	close(p.changed)
	p.changed = make(chan struct{})
}

// Delay adds latency in each direction to what arrives from now on. It does not
// limit the throughput.
func (p *Proxy) Delay(latency time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = latency
}

// TruncateAfter forwards n more bytes in direction d, over all connections
// together, and then ends the connection that carried the last of them: the
// receiver gets exactly these bytes and end of file, the sender a reset, and
// what the receiver answers is lost. It works once.
func (p *Proxy) TruncateAfter(d Direction, n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.budget[d] = n
}

// HalfClose ends direction d of all connections: the receiver gets end of file,
// what the sender still sends is lost, the other direction goes on.
func (p *Proxy) HalfClose(d Direction) {
	for _, l := range p.current() {
		l.halfClose(d)
	}
}

func (p *Proxy) current() []*link {
	p.mu.Lock()
	defer p.mu.Unlock()
	var links []*link
	for l := range p.links {
		links = append(links, l)
	}
	return links
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.AcceptTCP()
		if err != nil {
			return // closed
		}
		l := newLink(client)
		if !p.add(l) {
			l.reset()
			continue
		}
		p.wg.Go(func() {
			defer p.remove(l)
			p.serve(l)
		})
	}
}

// add makes the link known to Cut, or tells that it is refused.
func (p *Proxy) add(l *link) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refuse {
		return false
	}
	p.links[l] = true
	return true
}

func (p *Proxy) remove(l *link) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.links, l)
}

// serve forwards until both directions have ended.
func (p *Proxy) serve(l *link) {
	defer l.close()
	if !l.dial(p.target) {
		l.reset()
		return
	}
	var wg sync.WaitGroup
	for _, d := range []Direction{Upstream, Downstream} {
		queue := make(chan chunk, 64)
		wg.Go(func() { defer close(queue); p.read(l, d, queue) })
		wg.Go(func() { p.write(l, d, queue) })
	}
	wg.Wait()
}

// chunk is a piece of a stream and when it may go on.
type chunk struct {
	data []byte
	due  time.Time
}

// read fills the queue until end of file, or the link's end.
func (p *Proxy) read(l *link, d Direction, queue chan<- chunk) {
	source, _ := l.ends(d)
	for p.pass(l, d) {
		buffer := make([]byte, 16<<10)
		n, err := source.Read(buffer)
		if n > 0 {
			select {
			case queue <- chunk{buffer[:n], time.Now().Add(p.latency())}:
			case <-l.ctx.Done():
				return
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) && !l.isBroken(d) {
				l.reset()
			}
			return
		}
	}
}

// write empties the queue, then passes the end of file on.
func (p *Proxy) write(l *link, d Direction, queue <-chan chunk) {
	source, target := l.ends(d)
	for c := range queue {
		if !l.sleepUntil(c.due) || !p.pass(l, d) {
			return
		}
		n, last := p.spend(d, len(c.data))
		_, err := target.Write(c.data[:n])
		switch {
		case last:
			l.broken.Or(int64(Both))
			target.CloseWrite() // fails if the link has ended
			abort(source)
			return
		case err != nil && !l.isBroken(d):
			l.reset()
			return
		}
	}
	target.CloseWrite() // fails if the link has ended
}

// pass waits while direction d is stalled. false: the link has ended.
func (p *Proxy) pass(l *link, d Direction) bool {
	for {
		p.mu.Lock()
		stalled, changed := p.stalled&d != 0, p.changed
		p.mu.Unlock()
		if !stalled {
			return l.ctx.Err() == nil
		}
		select {
		case <-changed:
		case <-l.ctx.Done():
			return false
		}
	}
}

func (p *Proxy) latency() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.delay
}

// spend tells how many of n bytes may go on, and whether the link ends then.
func (p *Proxy) spend(d Direction, n int) (allowed int, last bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	budget, limited := p.budget[d]
	if !limited {
		return n, false
	}
	if n < budget {
		p.budget[d] = budget - n
		return n, false
	}
	delete(p.budget, d)
	return budget, true
}
