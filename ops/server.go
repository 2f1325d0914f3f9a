// Package ops is what an operator sees of a running relay: metrics, health, the
// status page and the commands.
package ops

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"outbox-relay/relay"
)

// Serving is what a Server shows, and to whom.
type Serving struct {
	Relay    *relay.Relay
	Gatherer prometheus.Gatherer
	Journal  *Journal // the last warnings
	Log      *slog.Logger
	Admin    Admin                  // asks Postgres for parked events, while somebody looks
	Token    func() (string, error) // for what changes anything, asked at each use; nil: nothing can be changed
	Debug    bool                   // profiles
	Version  string
	Stream   string
}

// Server serves the status page, /metrics, /healthz and /readyz.
type Server struct {
	Serving
	started string // names this process, for a page that outlives it
	history history
	parked  parked
}

// NewServer returns a server for the relay; nothing runs before Run.
func NewServer(what Serving) *Server {
	return &Server{Serving: what, started: time.Now().UTC().Format(time.RFC3339Nano), parked: parked{admin: what.Admin}}
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
	keeping, end := context.WithCancel(ctx)
	kept := make(chan struct{})
	go func() { defer close(kept); s.history.keep(keeping, s.Relay) }()
	defer func() { end(); <-kept }()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		stop()
		return fmt.Errorf("serve on %s: %w", listener.Addr(), err)
	}
	return <-stopped
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.Gatherer, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", s.healthz)
	mux.HandleFunc("GET /readyz", s.readyz)
	mux.Handle("/", ownHost(s.Admin.HTTP, s.pageRoutes()))
	return guarded(mux)
}

// pageRoutes is what browsers ask for.
func (s *Server) pageRoutes() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /", pageFiles())
	mux.HandleFunc("GET /api/status", s.status)
	mux.HandleFunc("GET /api/parked", s.listParked)
	mux.HandleFunc("POST /api/retry", s.retry)
	if s.Debug {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// ownHost refuses requests whose Host may be the name of another site. Such a site can let
// its name lead to this address after its page was loaded (DNS rebinding); the browser
// then lets that page read what is here. addr is OUTBOX_HTTP_ADDR.
func ownHost(addr string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !isOwnHost(r.Host, addr) {
			refuse(w, http.StatusMisdirectedRequest, fmt.Sprintf("the status page does not answer to the name %q: ask for it by an IP address, "+
				"a name without a dot, or the name in OUTBOX_HTTP_ADDR; a proxy in front of it has to send Host: localhost", r.Host))
			return
		}
		next.ServeHTTP(w, r)
	})
}

// isOwnHost reports whether host is an IP address, a name without a dot, or the name in
// addr. The first is no name, nobody can have the second in the public DNS, and the third
// is configured.
func isOwnHost(host, addr string) bool {
	name := hostname(host)
	_, err := netip.ParseAddr(name)
	return err == nil || !strings.Contains(name, ".") || strings.EqualFold(name, hostname(addr))
}

// hostname returns host or host:port without the port, and an IPv6 address without brackets.
func hostname(hostport string) string {
	if host, _, err := net.SplitHostPort(hostport); err == nil {
		return host
	}
	return strings.Trim(hostport, "[]")
}

// contentPolicy lets the page load its own files and ask its own server, and
// nothing else; no text becomes code or markup.
const contentPolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// guarded gives every answer the headers that keep a browser from doing more with
// it than show it.
func guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", contentPolicy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		next.ServeHTTP(w, r)
	})
}
