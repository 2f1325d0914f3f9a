package relay_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

// Each kind of stream that can't keep the promise ends the relay by name, with
// what to do, and before it has made a slot or published anything.
func TestStreamsThatCannotKeepThePromise(t *testing.T) {
	t.Parallel()
	b := setup(t)
	early := b.insert(1)
	_, err := b.js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "ORIGIN", Subjects: []string{"origin.>"}})
	b.must(err)
	for _, c := range []struct {
		name   string
		change func(*jetstream.StreamConfig)
		words  []string
	}{
		{"sources", func(c *jetstream.StreamConfig) { c.Sources = []*jetstream.StreamSource{{Name: "ORIGIN"}} }, []string{"has sources"}},
		{"mirror", func(c *jetstream.StreamConfig) { c.Subjects, c.Mirror = nil, &jetstream.StreamSource{Name: "ORIGIN"} }, []string{"is a mirror"}},
		{"delete markers", func(c *jetstream.StreamConfig) { c.AllowMsgTTL, c.SubjectDeleteMarkerTTL = true, time.Minute }, []string{"subject delete markers"}},
		{"counters", func(c *jetstream.StreamConfig) { c.AllowMsgCounter = true }, []string{"counters"}},
		{"schedules", func(c *jetstream.StreamConfig) { c.AllowMsgSchedules = true }, []string{"schedules"}},
		{"interest retention", func(c *jetstream.StreamConfig) { c.Retention = jetstream.InterestPolicy }, []string{"interest retention", "use limits or workqueue"}},
		{"memory storage", func(c *jetstream.StreamConfig) { c.Storage = jetstream.MemoryStorage }, []string{"in memory", "use file storage"}},
		{"discard_new_per_subject", func(c *jetstream.StreamConfig) {
			c.Discard, c.DiscardNewPerSubject, c.MaxMsgsPerSubject = jetstream.DiscardNew, true, 10
		}, []string{"discard_new_per_subject"}},
		{"no_ack", func(c *jetstream.StreamConfig) { c.NoAck = true }, []string{"no_ack"}},
		{"sealed", func(c *jetstream.StreamConfig) { c.Sealed = true }, []string{"is sealed"}},
		{"async persist", func(c *jetstream.StreamConfig) { c.PersistMode = jetstream.AsyncPersistMode }, []string{"persists asynchronously"}},
		{"other subjects", func(c *jetstream.StreamConfig) { c.Subjects = []string{"events.order.*", "orders.>"} },
			[]string{"has subjects events.order.*, orders.>", "do not cover events.*.*", "OUTBOX_SUBJECT"}},
		{"another slot's", func(c *jetstream.StreamConfig) {
			c.Metadata = map[string]string{"outbox-relay.system": "7001", "outbox-relay.slot": "billing"}
		}, []string{"belongs to another relay", "slot billing", "cluster 7001"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.*.*"}, Storage: jetstream.FileStorage}
			c.change(&config)
			b.makeStream(config)
			defer func() { b.must(b.js.DeleteStream(b.Context(), "EVENTS")) }()
			requireEnd(t, b.start(), 1, append(c.words, "stream EVENTS", "OUTBOX_STREAM")...)
			if n := b.count(`select count(*) from pg_replication_slots where slot_name = $1`, b.slot()); n != 0 {
				t.Fatal("it has made its slot")
			}
		})
	}
	requireEnd(t, b.start("STREAM_CREATE=false"), 1, "stream EVENTS does not exist", "OUTBOX_STREAM_CREATE=true")
	b.requireWorks()
	b.requireStatus("published", early)
}

// makeStream makes the stream; one can be sealed only later.
func (b *bundle) makeStream(config jetstream.StreamConfig) {
	b.Helper()
	sealed := config.Sealed
	config.Sealed = false
	_, err := b.js.CreateStream(b.Context(), config)
	b.must(err)
	if config.Sealed = sealed; sealed {
		_, err := b.js.UpdateStream(b.Context(), config)
		b.must(err)
	}
}

// Subjects that overlap another stream's cannot be had.
func TestStreamCannotBeMade(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.makeStream(jetstream.StreamConfig{Name: "OTHER", Subjects: []string{"events.>"}})
	requireEnd(t, b.start(), 1, "create stream EVENTS with subjects events.*.*", "overlap", "OUTBOX_SUBJECT", "OUTBOX_STREAM")
	requireEnd(t, b.start("SUBJECT=shop.{event_type}", "STREAM_REPLICAS=3"), 1, "create stream EVENTS", "replicas", "OUTBOX_STREAM_REPLICAS")
	r := b.streaming("SUBJECT=shop.{event_type}")
	ids := b.insert(2)
	b.requireStatus("published", ids)
	b.requireStream(ids)
	requireLeaves(t, r)
}

// Another relay's stream is refused also where both run, and both databases are
// of one cluster.
func TestStreamOfAnotherRelay(t *testing.T) {
	t.Parallel()
	b, other := setup(t), setup(t)
	r := b.streaming()
	requireEnd(t, other.start("NATS_URL="+b.nats.URL()), 1, "stream EVENTS belongs to another relay", "slot "+b.slot(), "choose another OUTBOX_STREAM")
	ids := b.insert(3)
	b.requireStatus("published", ids)
	b.requireStream(ids)
	requireLeaves(t, r)
	other.requireWorks()
}

// What becomes of the stream under a running relay is seen at the next trouble,
// and publishing stops before anything is lost.
func TestStreamChangedWhileRunning(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	ids := b.insert(3)
	b.requireStatus("published", ids)
	config := b.stream().CachedInfo().Config
	config.Sealed = true
	_, err := b.js.UpdateStream(t.Context(), config)
	b.must(err)
	missed := b.insert(3)
	requireEnd(t, r, 1, "stream EVENTS is sealed", "OUTBOX_STREAM")
	b.requireStatus("pending", missed)
	b.requireStream(ids)
}

// Subjects that are taken away for a while cost time, and no event.
func TestSubjectsTakenAwayWhileRunning(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	ids := b.insert(3)
	b.requireStatus("published", ids)
	config := b.stream().CachedInfo().Config
	config.Subjects = []string{"else.>"}
	_, err := b.js.UpdateStream(t.Context(), config)
	b.must(err)
	missed := b.insert(3)
	requireEnd(t, r, 1, "stream EVENTS has subjects else.>, which do not cover events.*.*", "OUTBOX_SUBJECT")
	b.requireStatus("pending", missed)
	config.Subjects = []string{"events.>"}
	_, err = b.js.UpdateStream(t.Context(), config)
	b.must(err)
	b.streaming()
	b.requireStatus("published", missed)
	b.requireStream(append(ids, missed...))
}

// Messages of others in the stream are passed over with a warning that says what
// to do; the events stay in their order.
func TestForeignMessageIsNamed(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	before := b.insert(2)
	b.requireStatus("published", before)
	b.publish(nil)
	after := b.insert(2)
	b.requireStatus("published", after)
	r.WaitLog("the stream has messages that are not this relay's")
	r.WaitLog("deny others to publish on the relay's subjects")
	b.requireIDs(append(append(before, ""), after...))
	testenv.Eventually(t, "the flag", func() bool {
		return b.count(`select count(*) from outbox_relay_checkpoints where foreign_seen`) == 1
	})
	requireLeaves(t, r)
}

// A stream that the checkpoint knows is not made anew: what it held is lost, or
// stands elsewhere.
func TestStreamIsGone(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	b.requireStatus("published", b.insert(3))
	b.must(b.js.DeleteStream(t.Context(), "EVENTS"))
	b.insert(1)
	requireEnd(t, r, 1, "stream EVENTS does not exist", "the checkpoint knows it", "OUTBOX_NATS_URL", "DELETE FROM")
	requireEnd(t, b.start(), 1, "stream EVENTS does not exist", "the checkpoint knows it")
	if _, err := b.js.Stream(t.Context(), "EVENTS"); !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Fatalf("the stream was made anew: %v", err)
	}
}

// A stream that was made again lacks what the checkpoint stands on, also when it
// was told to count on from there.
func TestStreamIsMadeAgain(t *testing.T) {
	t.Parallel()
	for name, first := range map[string]uint64{"from the start": 0, "counting on": 100} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			requireLeaves(b, b.streaming())
			r := b.streaming()
			b.requireStatus("published", b.insert(3))
			b.must(b.js.DeleteStream(t.Context(), "EVENTS"))
			_, err := b.js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.*.*"}, FirstSeq: first})
			b.must(err)
			late := b.insert(1)
			requireEnd(t, r, 1, "it was deleted and made again", "pg_drop_replication_slot", "DELETE FROM")
			requireEnd(t, b.start(), 1, "it was deleted and made again")
			b.requireStatus("pending", late)
		})
	}
}

// nats-server before August 2026 changes a stream's creation time; here the
// checkpoint's is changed, which comes to the same.
func TestStreamSaysAnotherCreationTime(t *testing.T) {
	t.Parallel()
	for _, emptied := range []bool{false, true} {
		t.Run(fmt.Sprintf("emptied=%t", emptied), func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			r := b.streaming()
			ids := b.insert(3)
			b.requireStatus("published", ids)
			requireLeaves(b, r)
			if emptied {
				stream, err := b.js.Stream(t.Context(), "EVENTS")
				b.must(err)
				b.must(stream.Purge(t.Context()))
				ids = nil
			}
			b.exec(`update outbox_relay_checkpoints set stream_created_at = stream_created_at - interval '1 day'`)
			r = b.streaming()
			r.WaitLog("another creation time")
			more := b.insert(2)
			b.requireStatus("published", more)
			b.requireIDs(append(ids, more...))
			requireLeaves(b, r)
			r = b.streaming()
			requireLeaves(b, r)
			if strings.Contains(r.Logs(), "another creation time") {
				t.Fatalf("the creation time was not recorded:\n%s", r.Logs())
			}
		})
	}
}
