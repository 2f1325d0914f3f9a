package testenv

import (
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func connectNATS(t *testing.T, url string) (*nats.Conn, jetstream.JetStream) {
	t.Helper()
	conn, err := nats.Connect(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	return conn, js
}

func TestNATSRestartKeepsURLAndStore(t *testing.T) {
	n := NATS(t, NATSOptions{})
	_, js := connectNATS(t, n.URL())
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), "s.1", nil); err != nil {
		t.Fatal(err)
	}
	n.Stop()
	if n.Server().Running() {
		t.Error("runs after Stop")
	}
	n.Restart()
	_, js = connectNATS(t, n.URL())
	stream, err := js.Stream(t.Context(), "S")
	if err != nil {
		t.Fatal(err)
	}
	if got := stream.CachedInfo().State.Msgs; got != 1 {
		t.Errorf("%d messages after the restart, want 1", got)
	}
}

func TestNATSOptions(t *testing.T) {
	n := NATS(t, NATSOptions{MaxPayload: 1000, NoJetStream: true, Edit: func(o *server.Options) { o.ServerName = "edited" }})
	conn, js := connectNATS(t, n.URL())
	if conn.MaxPayload() != 1000 || conn.ConnectedServerName() != "edited" {
		t.Errorf("max payload %d, name %s", conn.MaxPayload(), conn.ConnectedServerName())
	}
	if _, err := js.AccountInfo(t.Context()); err == nil {
		t.Error("JetStream is there")
	}
}

func TestCluster3SurvivesANode(t *testing.T) {
	nodes := Cluster3(t)
	_, js := connectNATS(t, nodes[0].URL())
	config := jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}, Replicas: 3}
	if _, err := js.CreateStream(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	nodes[2].Stop()
	Eventually(t, "a publish without node 3", func() bool {
		_, err := js.Publish(t.Context(), "s.1", nil)
		return err == nil
	})
	nodes[2].Restart()
	Eventually(t, "node 3 to catch up", func() bool {
		return nodes[2].Server().JetStreamIsStreamCurrent("$G", "S")
	})
}
