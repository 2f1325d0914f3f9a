package chaos

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

func clustered(p plan) bool   { return p.nodes > 1 }
func notConsumed(p plan) bool { return p.retention != consumed }

var brokerFaults = []fault{
	{name: "NATS kill -9", on: broker, strike: func(s *season) injury {
		return s.downNodes(s.between(0, 2000), (*testenv.NATSProcess).Kill, s.leader())
	}},
	{name: "NATS SIGTERM", on: broker, strike: func(s *season) injury {
		return s.downNodes(s.between(0, 2000), (*testenv.NATSProcess).Terminate, s.leader())
	}},
	{name: "NATS down", on: broker, strike: func(s *season) injury {
		return s.downNodes(s.between(3000, 6000), (*testenv.NATSProcess).Kill, s.nats...)
	}},
	{name: "NATS frozen", on: broker, strike: func(s *season) injury {
		node := s.leader()
		node.Freeze()
		return injury{s.between(1000, 6000), node.Thaw}
	}},
	{name: "two NATS nodes killed", on: broker, fits: clustered, strike: func(s *season) injury {
		i := s.random.IntN(len(s.nats))
		return s.downNodes(s.between(1000, 5000), (*testenv.NATSProcess).Kill, s.nats[i], s.nats[(i+1)%len(s.nats)])
	}},
	{name: "a follower killed", on: broker, fits: clustered, strike: func(s *season) injury {
		leader := s.leader()
		for _, node := range s.nats {
			if node != leader {
				return s.downNodes(s.between(1000, 5000), (*testenv.NATSProcess).Kill, node)
			}
		}
		return injury{}
	}},
	{name: "stream leader steps down", on: broker, fits: clustered, strike: stepDown},
}

func (s *season) downNodes(hold time.Duration, end func(*testenv.NATSProcess), nodes ...*testenv.NATSProcess) injury {
	for _, node := range nodes {
		end(node)
	}
	return injury{hold, func() {
		for _, node := range nodes {
			node.Start()
		}
	}}
}

// leader is the node that leads the stream, or any where none does for now.
func (s *season) leader() *testenv.NATSProcess {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	stream, err := s.js.Stream(ctx, streamName)
	if err == nil && stream.CachedInfo().Cluster != nil {
		for i, node := range s.nats {
			if stream.CachedInfo().Cluster.Leader == fmt.Sprintf("node%d", i+1) {
				return node
			}
		}
	}
	return s.nats[s.random.IntN(len(s.nats))]
}

func stepDown(s *season) injury {
	s.Helper()
	s.jetStream("let the stream's leader step down", func(ctx context.Context) error {
		answer, err := s.nc.RequestWithContext(ctx, "$JS.API.STREAM.LEADER.STEPDOWN."+streamName, nil)
		if err == nil && strings.Contains(string(answer.Data), `"error"`) {
			return fmt.Errorf("the server says %s", answer.Data)
		}
		return err
	})
	return injury{}
}

var streamFaults = []fault{
	{name: "stream purged", on: stream | slot, fits: notConsumed, strike: func(s *season) injury {
		s.purge()
		return injury{}
	}},
	{name: "stream purged with the relay killed", on: relay | stream | slot, fits: notConsumed, strike: func(s *season) injury {
		back := s.killRelays()
		s.purge()
		return injury{0, back}
	}},
	{name: "messages expired with the relay killed", on: relay | stream | slot, fits: notConsumed, strike: expireAll},
	{name: "stream full", on: stream, strike: fillUp},
}

// killRelays kills all relays and returns what starts them again.
func (s *season) killRelays() (start func()) {
	for _, st := range s.seats {
		st.relay.Kill()
	}
	return func() {
		for _, st := range s.seats {
			st.start()
		}
	}
}

// purge takes away what the witness has seen.
func (s *season) purge() {
	s.Helper()
	seen, _ := s.witness.progress()
	s.jetStream("purge the stream", func(ctx context.Context) error {
		stream, err := s.js.Stream(ctx, streamName)
		if err != nil {
			return err
		}
		return stream.Purge(ctx, jetstream.WithPurgeSequence(seen+1))
	})
}

// expireAll lets everything expire while no relay runs, once the witness has
// seen it.
func expireAll(s *season) injury {
	s.Helper()
	back := s.killRelays()
	s.awaitWitness()
	old := s.stream().Config.MaxAge
	s.configure(func(c *jetstream.StreamConfig) { c.MaxAge = duplicateWindow })
	testenv.Eventually(s.T, "all messages expired", func() bool { return s.stream().State.Msgs == 0 })
	s.configure(func(c *jetstream.StreamConfig) { c.MaxAge = old })
	return injury{0, back}
}

// headroom is what a stream still takes before it is full, in bytes: more than
// arrives while its limit is set.
const headroom = 512 << 10

// fillUp gives the stream a limit just above its size and waits until it takes
// no more, or for some seconds where messages leave it.
func fillUp(s *season) injury {
	s.Helper()
	size := int64(s.stream().State.Bytes)
	s.configure(func(c *jetstream.StreamConfig) { c.MaxBytes, c.Discard = size+headroom, jetstream.DiscardNew })
	last, still := uint64(0), 0
	for until := time.Now().Add(10 * time.Second); still < 5 && time.Now().Before(until); time.Sleep(200 * time.Millisecond) {
		now := s.stream().State.LastSeq
		if still++; now != last {
			last, still = now, 0
		}
	}
	return injury{s.between(0, 2000), func() {
		s.configure(func(c *jetstream.StreamConfig) { c.MaxBytes, c.Discard = -1, jetstream.DiscardOld })
	}}
}

func (s *season) configure(change func(*jetstream.StreamConfig)) {
	s.Helper()
	config := s.stream().Config
	change(&config)
	s.jetStream("change the stream's configuration", func(ctx context.Context) error {
		_, err := s.js.UpdateStream(ctx, config)
		return err
	})
}
