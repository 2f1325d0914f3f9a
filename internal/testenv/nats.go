package testenv

import (
	"fmt"
	"net/url"
	"path/filepath"
	"testing"

	"outbox-relay/internal/pgserver"

	"github.com/nats-io/nats-server/v2/server"
)

// NATSOptions of an embedded server. The zero value is a server with JetStream, at
// which RelayName may do what deploy/nats/permissions.conf allows, and who gives no
// name everything.
type NATSOptions struct {
	MaxPayload  int32 // in bytes; 0: the server's default, 1 MiB
	NoJetStream bool
	Edit        func(*server.Options) // has the last word on the server's options
}

// NATSServer is an embedded server with a port and a store that outlive its
// stops. Its methods are for one goroutine, that of the test.
type NATSServer struct {
	tb      testing.TB
	options server.Options
	server  *server.Server
}

// NATS starts a server with JetStream on file storage, stopped by Cleanup.
func NATS(tb testing.TB, o NATSOptions) *NATSServer {
	tb.Helper()
	n := newNATS(tb, o)
	n.Restart()
	return n
}

// newNATS makes a server that does not run yet.
func newNATS(tb testing.TB, o NATSOptions) *NATSServer {
	tb.Helper()
	options := server.Options{
		ServerName: "test",
		Host:       "127.0.0.1",
		Port:       FreePort(tb),
		MaxPayload: o.MaxPayload,
		JetStream:  !o.NoJetStream,
		StoreDir:   filepath.Join(tb.TempDir(), "nats"),
		NoSigs:     true,
		NoLog:      true,
	}
	if o.Edit != nil {
		o.Edit(&options)
	}
	if open(options) {
		options.Users = []*server.User{RelayUser(tb), {Username: "anybody", Password: "anybody"}}
		options.NoAuthUser = "anybody"
	}
	n := &NATSServer{tb: tb, options: options}
	tb.Cleanup(n.Stop)
	return n
}

// open tells whether Edit has left it open who may connect.
func open(o server.Options) bool {
	return o.Users == nil && o.Nkeys == nil && o.Authorization == "" && o.Username == "" && o.Accounts == nil && o.TrustedOperators == nil
}

// FreePort is a TCP port on 127.0.0.1 that nobody uses.
func FreePort(tb testing.TB) int {
	tb.Helper()
	port, err := pgserver.FreePort()
	if err != nil {
		tb.Fatal(err)
	}
	return port
}

// URL is where clients connect, the same after a restart.
func (n *NATSServer) URL() string { return fmt.Sprintf("nats://127.0.0.1:%d", n.options.Port) }

// StoreDir is where JetStream keeps its files.
func (n *NATSServer) StoreDir() string { return n.options.StoreDir }

// Server is the running server: another one after each restart.
func (n *NATSServer) Server() *server.Server { return n.server }

// Stop shuts the server down and waits until it has ended. Again: does nothing.
func (n *NATSServer) Stop() {
	if n.server != nil {
		n.server.Shutdown()
		n.server.WaitForShutdown()
	}
}

// Reload changes options of the running server, as a reload of its configuration does.
func (n *NATSServer) Reload(edit func(*server.Options)) {
	n.tb.Helper()
	edit(&n.options)
	if err := n.server.ReloadOptions(n.options.Clone()); err != nil {
		n.tb.Fatalf("reload NATS server %s: %v", n.options.ServerName, err)
	}
}

// Restart starts the server on the same port and store, having stopped it if it
// ran, and returns when it accepts connections.
func (n *NATSServer) Restart() {
	n.tb.Helper()
	n.Stop()
	n.launch()
	n.awaitReady()
}

// RestartWith is Restart with other options.
func (n *NATSServer) RestartWith(edit func(*server.Options)) {
	n.tb.Helper()
	edit(&n.options)
	n.Restart()
}

func (n *NATSServer) launch() {
	n.tb.Helper()
	s, err := server.NewServer(n.options.Clone())
	if err != nil {
		n.tb.Fatalf("make NATS server %s: %v", n.options.ServerName, err)
	}
	n.server = s
	s.Start()
}

func (n *NATSServer) awaitReady() {
	n.tb.Helper()
	if !n.server.ReadyForConnections(patience) {
		n.tb.Fatalf("NATS server %s accepts no connections", n.options.ServerName)
	}
}

// Cluster3 starts three servers with JetStream that form a cluster, for streams
// with three replicas. It returns when they have a leader and know its state.
func Cluster3(tb testing.TB) []*NATSServer {
	tb.Helper()
	var routes []*url.URL
	for range 3 {
		routes = append(routes, &url.URL{Scheme: "nats", Host: fmt.Sprintf("127.0.0.1:%d", FreePort(tb))})
	}
	var nodes []*NATSServer
	for i, route := range routes {
		nodes = append(nodes, newNATS(tb, NATSOptions{Edit: func(o *server.Options) {
			o.ServerName = fmt.Sprintf("node%d", i+1)
			o.Routes = routes
			o.Cluster.Name = "test"
			o.Cluster.Host = route.Hostname()
			fmt.Sscan(route.Port(), &o.Cluster.Port)
		}}))
	}
	for _, n := range nodes {
		n.launch()
	}
	for _, n := range nodes {
		n.awaitReady()
	}
	Eventually(tb, "a JetStream leader that all three nodes follow", func() bool { return agreed(nodes) })
	return nodes
}

func agreed(nodes []*NATSServer) bool {
	leaders := 0
	for _, n := range nodes {
		if !n.server.JetStreamIsCurrent() {
			return false
		}
		if n.server.JetStreamIsLeader() {
			leaders++
		}
	}
	return leaders == 1
}
