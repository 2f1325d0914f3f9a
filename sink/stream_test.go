package sink

import (
	"errors"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

var owner = StreamConfig{Name: "EVENTS", Subjects: "events.*.*", SystemID: "7001", Slot: "shop", Replicas: 1}

// admin is the owner of a server's streams.
func admin(t *testing.T, server *testenv.NATSServer) jetstream.JetStream {
	t.Helper()
	return connectTo(t, Config{Servers: []string{server.URL()}}).js
}

// Streams that cannot keep the promise are refused by name, with the reason; the
// server makes each of them, so each can be met.
func TestRefusedStreams(t *testing.T) {
	server := testenv.NATS(t, testenv.NATSOptions{})
	js := admin(t, server)
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "ORIGIN", Subjects: []string{"origin.>"}}); err != nil {
		t.Fatal(err)
	}
	mine := map[string]string{metaSystem: owner.SystemID, metaSlot: owner.Slot}
	for name, c := range map[string]struct {
		change func(*jetstream.StreamConfig)
		want   string // empty: taken
	}{
		"as it comes":         {func(*jetstream.StreamConfig) {}, ""},
		"work queue":          {func(c *jetstream.StreamConfig) { c.Retention = jetstream.WorkQueuePolicy }, ""},
		"made by us":          {func(c *jetstream.StreamConfig) { c.Metadata = mine }, ""},
		"wider subjects":      {func(c *jetstream.StreamConfig) { c.Subjects = []string{"other", "events.>"} }, ""},
		"a wildcard for each": {func(c *jetstream.StreamConfig) { c.Subjects = []string{"events.*.>"} }, ""},
		"limits":              {func(c *jetstream.StreamConfig) { c.MaxAge, c.MaxMsgs, c.MaxMsgSize = time.Hour, 1000, 1000 }, ""},
		"discard new":         {func(c *jetstream.StreamConfig) { c.Discard, c.MaxMsgs = jetstream.DiscardNew, 1000 }, ""},
		"per-message TTL":     {func(c *jetstream.StreamConfig) { c.AllowMsgTTL = true }, ""},
		"denied to delete":    {func(c *jetstream.StreamConfig) { c.DenyDelete, c.DenyPurge = true, true }, ""},
		"compressed":          {func(c *jetstream.StreamConfig) { c.Compression = jetstream.S2Compression }, ""},
		"with metadata":       {func(c *jetstream.StreamConfig) { c.Metadata = map[string]string{"team": "shop"} }, ""},
		"interest":            {func(c *jetstream.StreamConfig) { c.Retention = jetstream.InterestPolicy }, "interest retention"},
		"memory":              {func(c *jetstream.StreamConfig) { c.Storage = jetstream.MemoryStorage }, "in memory"},
		"no ack":              {func(c *jetstream.StreamConfig) { c.NoAck = true }, "no_ack"},
		"sources":             {func(c *jetstream.StreamConfig) { c.Sources = []*jetstream.StreamSource{{Name: "ORIGIN"}} }, "has sources"},
		"mirror":              {func(c *jetstream.StreamConfig) { c.Subjects, c.Mirror = nil, &jetstream.StreamSource{Name: "ORIGIN"} }, "mirror"},
		"counters":            {func(c *jetstream.StreamConfig) { c.AllowMsgCounter = true }, "counters"},
		"schedules":           {func(c *jetstream.StreamConfig) { c.AllowMsgSchedules = true }, "schedules"},
		"delete markers":      {func(c *jetstream.StreamConfig) { c.AllowMsgTTL, c.SubjectDeleteMarkerTTL = true, time.Minute }, "delete markers"},
		"async persistence":   {func(c *jetstream.StreamConfig) { c.PersistMode = jetstream.AsyncPersistMode }, "asynchronously"},
		"discard new per subject": {func(c *jetstream.StreamConfig) {
			c.Discard, c.DiscardNewPerSubject, c.MaxMsgsPerSubject = jetstream.DiscardNew, true, 10
		}, "discard_new_per_subject"},
		"sealed":                     {func(c *jetstream.StreamConfig) { c.Sealed = true }, "sealed"},
		"other subjects":             {func(c *jetstream.StreamConfig) { c.Subjects = []string{"orders.>"} }, "do not cover events.*.*"},
		"one subject of many":        {func(c *jetstream.StreamConfig) { c.Subjects = []string{"events.order.*"} }, "do not cover events.*.*"},
		"a token too few":            {func(c *jetstream.StreamConfig) { c.Subjects = []string{"events.*"} }, "do not cover events.*.*"},
		"a token too many":           {func(c *jetstream.StreamConfig) { c.Subjects = []string{"events.*.*.>"} }, "do not cover events.*.*"},
		"another slot's":             {func(c *jetstream.StreamConfig) { c.Metadata = with(mine, metaSlot, "billing") }, "slot billing"},
		"another cluster's":          {func(c *jetstream.StreamConfig) { c.Metadata = with(mine, metaSystem, "7002") }, "cluster 7002"},
		"sources of another account": {func(c *jetstream.StreamConfig) { c.Sources = external() }, "has sources"},
	} {
		t.Run(name, func(t *testing.T) {
			config := jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.*.*"}, Storage: jetstream.FileStorage}
			c.change(&config)
			create(t, js, config)
			client := connectTo(t, Config{Servers: []string{server.URL()}})
			got, err := client.OpenStream(t.Context(), owner)
			switch {
			case c.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.want == "" && got.Name != "EVENTS":
				t.Errorf("opened %+v", got)
			case c.want != "" && (!errors.Is(err, ErrStream) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "EVENTS")):
				t.Errorf("got %v, want ErrStream with %q", err, c.want)
			}
		})
	}
}

func with(m map[string]string, key, value string) map[string]string {
	m = maps.Clone(m)
	m[key] = value
	return m
}

func external() []*jetstream.StreamSource {
	return []*jetstream.StreamSource{{Name: "FAR", External: &jetstream.ExternalStream{APIPrefix: "far.api"}}}
}

// create makes the stream anew. One can be sealed only later.
func create(t *testing.T, js jetstream.JetStream, config jetstream.StreamConfig) {
	t.Helper()
	if err := js.DeleteStream(t.Context(), config.Name); err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Fatal(err)
	}
	sealed := config.Sealed
	config.Sealed = false
	if _, err := js.CreateStream(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	if config.Sealed = sealed; sealed {
		if _, err := js.UpdateStream(t.Context(), config); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMissingStream(t *testing.T) {
	server := testenv.NATS(t, testenv.NATSOptions{})
	client := connectTo(t, Config{Servers: []string{server.URL()}})
	_, err := client.OpenStream(t.Context(), owner)
	if !errors.Is(err, ErrStream) || !errors.Is(err, ErrNoStream) {
		t.Fatalf("got %v, want %v", err, ErrNoStream)
	}
	want := owner
	want.Create, want.MaxAge, want.DuplicateWindow = true, time.Hour, time.Minute
	made, err := client.OpenStream(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	s, err := client.js.Stream(t.Context(), "EVENTS")
	if err != nil {
		t.Fatal(err)
	}
	c := s.CachedInfo().Config
	if c.Storage != jetstream.FileStorage || c.Retention != jetstream.LimitsPolicy || c.MaxAge != time.Hour || c.Duplicates != time.Minute ||
		len(c.Subjects) != 1 || c.Subjects[0] != "events.*.*" || c.Metadata[metaSystem] != "7001" || c.Metadata[metaSlot] != "shop" || made.MaxMsgSize != -1 {
		t.Errorf("made %+v", c)
	}
	again, err := client.OpenStream(t.Context(), owner)
	if err != nil || again != made {
		t.Errorf("opened again: %+v, %v; want %+v", again, err, made)
	}
}

// A server without JetStream will not have it by waiting; one that does not
// answer for now may.
func TestJetStreamNotEnabled(t *testing.T) {
	server := testenv.NATS(t, testenv.NATSOptions{NoJetStream: true})
	client := connectTo(t, Config{Servers: []string{server.URL()}})
	_, err := client.OpenStream(t.Context(), owner)
	if !errors.Is(err, ErrStream) || !strings.Contains(err.Error(), "JetStream is not enabled") {
		t.Errorf("got %v, want ErrStream that says so", err)
	}
	far := connectTo(t, Config{Servers: []string{server.URL()}, Domain: "hub"})
	if _, err := far.OpenStream(t.Context(), owner); err == nil || errors.Is(err, ErrStream) {
		t.Errorf("got %v, want an error that can pass: the domain may be out of reach", err)
	}
}

// tail lists sequence by sequence what the leader has; a purged run at the start
// only as far as it can matter.
func TestTail(t *testing.T) {
	server := testenv.NATS(t, testenv.NATSOptions{})
	client := connectTo(t, Config{Servers: []string{server.URL()}})
	js := client.js
	create(t, js, jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.*.*"}, Storage: jetstream.FileStorage})
	for _, id := range []string{"a", "b", "", "d", "e"} {
		var options []jetstream.PublishOpt
		if id != "" {
			options = append(options, jetstream.WithMsgID(id))
		}
		if _, err := js.Publish(t.Context(), "events.x.y", nil, options...); err != nil {
			t.Fatal(err)
		}
	}
	s, err := js.Stream(t.Context(), "EVENTS")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteMsg(t.Context(), 4); err != nil {
		t.Fatal(err)
	}
	require := func(after uint64, limit int, want string) {
		t.Helper()
		stream, err := client.OpenStream(t.Context(), owner)
		if err != nil {
			t.Fatal(err)
		}
		tail, err := client.tail(t.Context(), stream, after, limit)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for i, m := range tail {
			if m.sequence != tail[0].sequence+uint64(i) || tail[len(tail)-1].sequence != stream.Last {
				t.Errorf("sequence %d is out of line", m.sequence)
			}
			if m.gone {
				m.id = "-"
			}
			got = append(got, m.id)
		}
		if text := strings.Join(got, ","); text != want {
			t.Errorf("after %d: %s, want %s", after, text, want)
		}
	}
	require(0, 10, "a,b,,-,e")
	require(2, 10, ",-,e")
	require(5, 10, "")
	require(9, 10, "") // the stream ends before what we know
	if err := s.Purge(t.Context(), jetstream.WithPurgeSequence(1000)); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), "events.x.y", nil, jetstream.WithMsgID("z")); err != nil {
		t.Fatal(err)
	}
	require(5, 3, "-,-,-,-,z")
}
