package sink

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

// A link is cut with 60 events under way, which land when half of them were sent again
// and stored. So each of two lots of copies, which have no name and a name, holds
// refusals, and all messages are gone: the stream is a work queue with a quick worker.
// Nobody else publishes, so the answers that come tell all.
func TestLateCopiesOnAWorkQueue(t *testing.T) {
	const events = 61
	server := testenv.NATS(t, testenv.NATSOptions{})
	stream := startWorker(t, admin(t, server))
	gates := openGates(t, server.URL(), 1, 30)
	client := connectTo(t, chainConfig(gates.url, 1))
	outcomes := &settled{}
	chain, stop := runChain(t, client, Heritage{}, outcomes)
	publish := func(from, to uint64) {
		for i := from; i < to; i++ {
			e := sample()
			e.ID = fmt.Appendf(nil, "event_%d", i)
			if err := chain.Publish(t.Context(), i, e); err != nil {
				t.Fatal(err)
			}
		}
		chain.Flush()
	}
	publish(0, 1)
	if err := chain.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	chain.mu.Lock()
	chain.heard = chain.heard.Add(probeAfter * 1000) // the next event is not sent alone
	chain.mu.Unlock()

	publish(1, events)
	first := <-gates.made
	testenv.Eventually(t, "all publishes", func() bool { return first.count() == events })
	first.client.Close()
	second := <-gates.made
	testenv.Eventually(t, "all sent again", func() bool { return second.count() == events-1 })
	testenv.Eventually(t, "half of them stored", func() bool { return state(t, stream).LastSeq == 1+30 })
	first.open()
	testenv.Eventually(t, "the rest of the first copies stored, and all consumed", func() bool {
		s := state(t, stream)
		return s.LastSeq == events && s.Msgs == 0
	})
	second.open()
	testenv.Eventually(t, "all settled", func() bool { return chain.Settled() == events })
	if err := stop(); err != nil && err != context.Canceled {
		t.Error(err)
	}
	if last := state(t, stream).LastSeq; last != events || len(outcomes.stored) != events {
		t.Errorf("%d messages, and %d events count as stored; want %d", last, len(outcomes.stored), events)
	}
}

// startWorker makes the stream a work queue, from which all is taken at once.
func startWorker(t *testing.T, js jetstream.JetStream) jetstream.Stream {
	t.Helper()
	stream, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: owner.Name, Subjects: []string{owner.Subjects}, Retention: jetstream.WorkQueuePolicy})
	if err != nil {
		t.Fatal(err)
	}
	consumer, err := stream.CreateConsumer(t.Context(), jetstream.ConsumerConfig{Durable: "worker", AckPolicy: jetstream.AckExplicitPolicy})
	if err != nil {
		t.Fatal(err)
	}
	consuming, err := consumer.Consume(func(m jetstream.Msg) { _ = m.Ack() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(consuming.Stop)
	return stream
}

func state(t *testing.T, stream jetstream.Stream) jetstream.StreamState {
	t.Helper()
	info, err := stream.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return info.State
}

// gates is a proxy to a server; each connection has a gate.
type gates struct {
	url  string
	made chan *gate
}

// gate lets what a client writes pass, but of publishes only so many, until it is opened.
// Where the client has gone, what it wrote still passes.
type gate struct {
	client, server net.Conn

	mu        sync.Mutex
	publishes int    // that came
	limit     int    // of those that pass
	rest      []byte // of a message that did not come whole
	held      []byte
}

// openGates returns a proxy whose first connections let so many publishes pass.
func openGates(t *testing.T, server string, limits ...int) *gates {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gates{url: "nats://" + listener.Addr().String(), made: make(chan *gate, len(limits))}
	var serving sync.WaitGroup
	t.Cleanup(func() { listener.Close(); serving.Wait() })
	serving.Go(func() {
		for _, limit := range limits {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", strings.TrimPrefix(server, "nats://"))
			if err != nil {
				client.Close()
				return
			}
			t.Cleanup(func() { client.Close(); server.Close() })
			gate := &gate{client: client, server: server, limit: limit}
			go gate.copy(client, gate.pass)
			go gate.copy(server, func(p []byte) { _, _ = client.Write(p) })
			g.made <- gate
		}
	})
	return g
}

func (g *gate) copy(from net.Conn, pass func([]byte)) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		pass(buf[:n])
		if err != nil {
			return
		}
	}
}

// pass takes what the client has written.
func (g *gate) pass(p []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.rest = append(g.rest, p...)
	for {
		line, _, whole := bytes.Cut(g.rest, []byte("\r\n"))
		if !whole {
			return
		}
		size, event := len(line)+2, bytes.HasPrefix(line, []byte("HPUB events."))
		if words := strings.Fields(string(line)); event || words[0] == "PUB" || words[0] == "HPUB" {
			body, _ := strconv.Atoi(words[len(words)-1])
			size += body + 2
		}
		if len(g.rest) < size {
			return
		}
		if event {
			g.publishes++
		}
		if event && g.publishes > g.limit {
			g.held = append(g.held, g.rest[:size]...)
		} else {
			_, _ = g.server.Write(g.rest[:size])
		}
		g.rest = g.rest[size:]
	}
}

// open lets pass what was held, and all that comes.
func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.limit = 1 << 30
	_, _ = g.server.Write(g.held)
	g.held = nil
}

func (g *gate) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.publishes
}
