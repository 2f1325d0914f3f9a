package testenv

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"outbox-relay/internal/pgserver/child"
)

const natsServer = "github.com/nats-io/nats-server/v2"

// NATSBinary is the path of a nats-server of that version (v2.12.0), installed
// once into the user's cache; of the version in go.mod where version is empty.
func NATSBinary(tb testing.TB, version string) string {
	tb.Helper()
	if version == "" {
		return binary(tb, natsServer)
	}
	path, err := installNATS(version)
	if err != nil {
		tb.Fatalf("install nats-server %s: %v", version, err)
	}
	return path
}

func installNATS(version string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "outbox-relay", "nats-server-"+version)
	path := filepath.Join(dir, "nats-server")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	cmd := exec.Command("go", "install", natsServer+"@"+version)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath", "GOBIN="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go install: %w\n%s", err, bytes.TrimSpace(out))
	}
	return path, nil
}

// NATSProcess is a nats-server with JetStream as a child process, with ports and
// a store that outlive it. Its methods are for one goroutine, that of the test.
type NATSProcess struct {
	tb      testing.TB
	binary  string
	args    []string
	port    int
	process *child.Process
	logs    logBuffer
}

// NATSProcesses starts n servers of that binary; more than one form a cluster
// that tells its clients of no other addresses than they know. It does not wait
// for JetStream. Cleanup kills them, and shows their logs if the test failed.
func NATSProcesses(tb testing.TB, binary string, n int) []*NATSProcess {
	tb.Helper()
	var clusterPorts []int
	var routes []string
	for range n {
		port := FreePort(tb)
		clusterPorts = append(clusterPorts, port)
		routes = append(routes, fmt.Sprintf("nats://127.0.0.1:%d", port))
	}
	var nodes []*NATSProcess
	for i := range n {
		port := FreePort(tb)
		node := &NATSProcess{tb: tb, binary: binary, port: port, logs: logBuffer{changed: make(chan struct{})}}
		node.args = []string{"-n", fmt.Sprintf("node%d", i+1), "-a", "127.0.0.1", "-p", fmt.Sprint(port),
			"-js", "-sd", filepath.Join(tb.TempDir(), "nats")}
		if n > 1 {
			node.args = append(node.args, "--cluster_name", "test", "--no_advertise",
				"--cluster", fmt.Sprintf("nats://127.0.0.1:%d", clusterPorts[i]), "--routes", strings.Join(routes, ","))
		}
		tb.Cleanup(node.cleanup)
		nodes = append(nodes, node)
	}
	for _, node := range nodes {
		node.launch()
	}
	for _, node := range nodes {
		node.awaitListening()
	}
	return nodes
}

func (n *NATSProcess) cleanup() {
	n.Kill()
	if n.tb.Failed() {
		text, _ := n.logs.read()
		n.tb.Logf("end of the log of nats-server %s:\n%s", n.Addr(), text[max(0, len(text)-8<<10):])
	}
}

// Addr is where clients connect, host:port, the same after a restart.
func (n *NATSProcess) Addr() string { return fmt.Sprintf("127.0.0.1:%d", n.port) }

// URL is Addr as a URL.
func (n *NATSProcess) URL() string { return "nats://" + n.Addr() }

// Start starts the server again on the same store, if it does not run, and
// returns when it accepts connections.
func (n *NATSProcess) Start() {
	n.tb.Helper()
	if n.Running() {
		return
	}
	n.launch()
	n.awaitListening()
}

func (n *NATSProcess) launch() {
	n.tb.Helper()
	cmd := exec.Command(n.binary, n.args...)
	cmd.Stdout, cmd.Stderr = &n.logs, &n.logs
	var err error
	if n.process, err = child.Start(cmd, syscall.SIGKILL); err != nil {
		n.tb.Fatal(err)
	}
}

func (n *NATSProcess) awaitListening() {
	n.tb.Helper()
	Eventually(n.tb, "nats-server at "+n.Addr(), func() bool {
		conn, err := net.Dial("tcp", n.Addr())
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

// Running tells whether the server has not ended.
func (n *NATSProcess) Running() bool {
	if n.process == nil {
		return false
	}
	select {
	case <-n.process.Done():
		return false
	default:
		return true
	}
}

// Kill ends the server by SIGKILL and waits for its end. One that does not run
// is left in peace.
func (n *NATSProcess) Kill() { n.end(syscall.SIGKILL) }

// Terminate ends the server by SIGTERM and waits for its end.
func (n *NATSProcess) Terminate() { n.end(syscall.SIGTERM) }

func (n *NATSProcess) end(sig syscall.Signal) {
	if n.process == nil {
		return
	}
	_ = n.process.Signal(sig) // fails only if it has ended
	<-n.process.Done()
}

// Freeze stops the server in its tracks (SIGSTOP): its connections stay open.
func (n *NATSProcess) Freeze() {
	n.tb.Helper()
	n.signal(syscall.SIGSTOP)
	awaitFrozen(n.tb, n.process.Pid())
}

// Thaw lets a frozen server go on.
func (n *NATSProcess) Thaw() { n.signal(syscall.SIGCONT) }

func (n *NATSProcess) signal(sig os.Signal) {
	n.tb.Helper()
	if err := n.process.Signal(sig); err != nil {
		n.tb.Fatalf("signal %v to nats-server %s: %v", sig, n.Addr(), err)
	}
}
