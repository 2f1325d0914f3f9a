package testenv

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
)

// Network is a network namespace, and with it another host: what runs there reaches
// this machine over a link of Ethernet, with segments of its size.
type Network struct {
	Host string // this machine's address, as that host sees it
	name string
}

var networks atomic.Int64

// NewNetwork makes one, which ends with the test. Of what a connection has received
// and nobody has read, its kernel keeps at most so many bytes (tcp_rmem), with what they
// take besides. Only root may do this, and it needs ip, of Debian's package iproute2.
func NewNetwork(tb testing.TB, unread int) *Network {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Fatal("a network of its own is for root to make: run this test as root")
	}
	number := networks.Add(1)
	id := fmt.Sprintf("%d-%d", os.Getpid()%100_000, number)
	subnet := fmt.Sprintf("10.%d.%d", 100+number%100, os.Getpid()%250)
	n := &Network{Host: subnet + ".1", name: "relay-" + id}
	n.ip(tb, "netns add %s", n.name)
	tb.Cleanup(func() { n.ip(tb, "netns delete %s", n.name) }) // and the link with it
	n.ip(tb, "link add r%s type veth peer name eth0 netns %s", id, n.name)
	n.ip(tb, "address add %s/24 dev r%s", n.Host, id)
	n.ip(tb, "link set r%s up", id)
	n.ip(tb, "-netns %s address add %s.2/24 dev eth0", n.name, subnet)
	n.ip(tb, "-netns %s link set eth0 up", n.name)
	n.ip(tb, "-netns %s link set lo up", n.name)
	n.ip(tb, "netns exec %s sysctl -qw net.ipv4.tcp_rmem=4096,%d,%d", n.name, min(unread, 128<<10), unread)
	return n
}

// Wrap is the command that runs a program there.
func (n *Network) Wrap(program string, args ...string) (path string, wrapped []string) {
	return "ip", append([]string{"netns", "exec", n.name, program}, args...)
}

func (n *Network) ip(tb testing.TB, format string, args ...any) {
	tb.Helper()
	words := strings.Fields(fmt.Sprintf(format, args...))
	for i := range words {
		words[i] = strings.ReplaceAll(words[i], ",", " ")
	}
	if out, err := exec.Command("ip", words...).CombinedOutput(); err != nil {
		tb.Fatalf("ip %s: %v\n%s", strings.Join(words, " "), err, out)
	}
}
