// Package ops is what an operator sees of a running relay: metrics, health and
// readiness.
package ops

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"outbox-relay/relay"
)

// Server serves /metrics, /healthz and /readyz.
type Server struct {
	relay    *relay.Relay
	gatherer prometheus.Gatherer
}

// NewServer returns a server for the relay; nothing runs before Run.
func NewServer(r *relay.Relay, gatherer prometheus.Gatherer) *Server {
	return &Server{relay: r, gatherer: gatherer}
}

// Run serves on the listener until ctx ends, and returns when all requests
// have.
func (s *Server) Run(ctx context.Context, listener net.Listener) error {
	server := &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		closing, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		stopped <- server.Shutdown(closing)
	})
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		stop()
		return fmt.Errorf("serve on %s: %w", listener.Addr(), err)
	}
	return <-stopped
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.gatherer, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", s.healthz)
	mux.HandleFunc("GET /readyz", s.readyz)
	return mux
}

// healthz says that the relay runs; waiting for a server is no illness, since
// a restart would not mend it.
func (s *Server) healthz(w http.ResponseWriter, _ *http.Request) {
	answer(w, s.relay.State() != relay.Halted, "ok")
}

// readyz says whether events flow, and otherwise names the state, or what is in
// their way.
func (s *Server) readyz(w http.ResponseWriter, _ *http.Request) {
	state, trouble := s.relay.State(), s.relay.Trouble()
	text := string(state)
	if trouble != "" {
		text += ": " + trouble
	}
	answer(w, state == relay.Streaming && trouble == "", text)
}

func answer(w http.ResponseWriter, ok bool, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if !ok {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = fmt.Fprintln(w, text)
}
