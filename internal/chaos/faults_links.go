package chaos

import (
	"time"

	"outbox-relay/internal/testenv"
)

// linkFault is a fault of the network between the relay that works and one side.
type linkFault struct {
	name   string
	slow   bool
	strike func(*season, []*testenv.Proxy) injury
}

var ofLinks = []linkFault{
	{name: "cut", strike: func(s *season, proxies []*testenv.Proxy) injury {
		each(proxies, (*testenv.Proxy).Cut)
		return injury{}
	}},
	{name: "cut for seconds", strike: func(s *season, proxies []*testenv.Proxy) injury {
		each(proxies, func(p *testenv.Proxy) { p.Refuse(true); p.Cut() })
		return injury{s.between(500, 4000), func() { each(proxies, func(p *testenv.Proxy) { p.Refuse(false) }) }}
	}},
	{name: "stalled", strike: func(s *season, proxies []*testenv.Proxy) injury {
		return stall(proxies, testenv.Both, s.between(500, 6000))
	}},
	{name: "stalled in one direction", strike: func(s *season, proxies []*testenv.Proxy) injury {
		return stall(proxies, s.direction(), s.between(500, 6000))
	}},
	{name: "stalled for long", slow: true, strike: func(s *season, proxies []*testenv.Proxy) injury {
		return stall(proxies, testenv.Both, s.between(12_000, 17_000))
	}},
	{name: "stalled, then cut", strike: func(s *season, proxies []*testenv.Proxy) injury {
		one := stall(proxies, s.direction(), s.between(500, 2000))
		return injury{one.hold, func() { each(proxies, (*testenv.Proxy).Cut); one.mend() }}
	}},
	{name: "slow", strike: func(s *season, proxies []*testenv.Proxy) injury {
		latency := s.between(20, 300)
		each(proxies, func(p *testenv.Proxy) { p.Delay(latency) })
		return injury{s.between(1000, 3000), func() { each(proxies, func(p *testenv.Proxy) { p.Delay(0) }) }}
	}},
	{name: "half closed", strike: func(s *season, proxies []*testenv.Proxy) injury {
		d := s.direction()
		each(proxies, func(p *testenv.Proxy) { p.HalfClose(d) })
		return injury{}
	}},
	{name: "truncated", strike: func(s *season, proxies []*testenv.Proxy) injury {
		d, n := s.direction(), s.random.IntN(64<<10)
		each(proxies, func(p *testenv.Proxy) { p.TruncateAfter(d, n) })
		return injury{s.between(200, 1000), nil}
	}},
}

func each(proxies []*testenv.Proxy, do func(*testenv.Proxy)) {
	for _, p := range proxies {
		do(p)
	}
}

func (s *season) direction() testenv.Direction {
	return []testenv.Direction{testenv.Upstream, testenv.Downstream}[s.random.IntN(2)]
}

func stall(proxies []*testenv.Proxy, d testenv.Direction, hold time.Duration) injury {
	each(proxies, func(p *testenv.Proxy) { p.StallDirection(d, true) })
	return injury{hold, func() { each(proxies, func(p *testenv.Proxy) { p.StallDirection(d, false) }) }}
}

// linkFaults lists the faults of both sides.
func linkFaults() []fault {
	sides := map[string]func(*seat) []*testenv.Proxy{
		"link to Postgres ": func(st *seat) []*testenv.Proxy { return []*testenv.Proxy{st.postgres} },
		"link to NATS ":     func(st *seat) []*testenv.Proxy { return st.nats },
	}
	var all []fault
	for _, side := range []string{"link to Postgres ", "link to NATS "} {
		for _, kind := range ofLinks {
			all = append(all, fault{name: side + kind.name, on: links, slow: kind.slow, strike: func(s *season) injury {
				return kind.strike(s, sides[side](s.worker()))
			}})
		}
	}
	return all
}
