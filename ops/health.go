package ops

import (
	"fmt"
	"net/http"

	"outbox-relay/relay"
)

// healthz says whether a restart is worth trying: no for a relay that gets on,
// has nothing to do, or waits for what a restart does not mend, such as a stream
// that can't be reached; yes for one that is stalled, unless it was restarted for that
// in vain, or has halted.
func (s *Server) healthz(w http.ResponseWriter, _ *http.Request) {
	at := s.Relay.Present()
	switch {
	case at.Stalled != "" && at.Restart:
		answer(w, false, "stalled: "+at.Stalled)
	case at.Stalled != "":
		answer(w, true, "ok, and no restart would help: stalled since the last one: "+at.Stalled)
	case at.State == relay.Halted:
		answer(w, false, described(at))
	case at.Trouble != "":
		answer(w, true, "ok, and no restart would help: "+described(at))
	default:
		answer(w, true, "ok")
	}
}

// readyz says whether the relay does its part: events flow, or it stands ready
// for the one that makes them flow. Otherwise it says what is in the way.
func (s *Server) readyz(w http.ResponseWriter, _ *http.Request) {
	at := s.Relay.Present()
	ready := at.State == relay.Streaming || at.State == relay.Backfilling || at.State == relay.Standby
	if at.Stalled != "" {
		at.Trouble = "stalled: " + at.Stalled
	}
	answer(w, ready && at.Trouble == "", described(at))
}

// described names the state, and what is in its way.
func described(at relay.Present) string {
	if at.Trouble == "" {
		return string(at.State)
	}
	return string(at.State) + ": " + at.Trouble
}

func answer(w http.ResponseWriter, ok bool, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if !ok {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = fmt.Fprintln(w, text)
}
