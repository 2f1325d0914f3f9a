package testenv

import (
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A server keeps its address and what it stored, whatever way it ended.
func TestNATSProcess(t *testing.T) {
	node := NATSProcesses(t, NATSBinary(t, ""), 1)[0]
	publish := func() uint64 {
		nc, err := nats.Connect(node.URL())
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		var ack *jetstream.PubAck
		Eventually(t, "a message stored", func() bool {
			_, err := js.CreateOrUpdateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}})
			if err == nil {
				ack, err = js.Publish(t.Context(), "s", nil)
			}
			return err == nil
		})
		return ack.Sequence
	}
	if n := publish(); n != 1 {
		t.Errorf("first message at %d", n)
	}
	for i, end := range []func(){node.Kill, node.Terminate, func() { node.Freeze(); node.Kill() }} {
		end()
		if node.Running() {
			t.Error("still runs")
		}
		node.Start()
		if n := publish(); n != uint64(i+2) {
			t.Errorf("message %d is at %d", i+2, n)
		}
	}
}

// Three servers form a cluster that takes a stream with three replicas.
func TestNATSProcessesFormACluster(t *testing.T) {
	nodes := NATSProcesses(t, NATSBinary(t, ""), 3)
	nc, err := nats.Connect(nodes[0].URL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	Eventually(t, "a stream with three replicas", func() bool {
		_, err := js.CreateOrUpdateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}, Replicas: 3})
		return err == nil
	})
	if servers := nc.Servers(); len(servers) != 1 {
		t.Errorf("the client was told of %v", servers)
	}
}
