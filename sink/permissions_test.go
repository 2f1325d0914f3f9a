package sink

import (
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
)

// Who has the permissions of deploy/nats/others.conf consumes events, and can
// neither make one, nor take one away, nor answer the relay in the server's place.
func TestOthersOnlyConsume(t *testing.T) {
	broker := testenv.NATS(t, testenv.NATSOptions{Edit: func(o *server.Options) {
		o.Users = []*server.User{testenv.RelayUser(t), testenv.OtherUser(t)}
	}})
	name := func() (string, error) { return testenv.RelayName, nil }
	relay := connectTo(t, Config{Servers: []string{broker.URL()}, Auth: Auth{User: testenv.RelayName, Password: name}})
	if _, err := relay.OpenStream(t.Context(), StreamConfig{Name: "EVENTS", Create: true, Subjects: "events.*.*"}); err != nil {
		t.Fatal(err)
	}
	if _, err := relay.js.Publish(t.Context(), "events.order.placed", []byte("1")); err != nil {
		t.Fatal(err)
	}

	log := &lines{}
	other, err := nats.Connect(broker.URL(), nats.UserInfo("other", "other"),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { log.Write([]byte(err.Error() + "\n")) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(other.Close)
	js, err := jetstream.New(other)
	if err != nil {
		t.Fatal(err)
	}
	consumer, err := js.CreateOrUpdateConsumer(t.Context(), "EVENTS", jetstream.ConsumerConfig{Durable: "email", AckPolicy: jetstream.AckExplicitPolicy})
	if err != nil {
		t.Fatal(err)
	}
	message, err := consumer.Next()
	if err != nil {
		t.Fatal(err)
	}
	if err := message.DoubleAck(t.Context()); err != nil {
		t.Fatal(err)
	}
	requireDenied(t, other, log)
}

func requireDenied(t *testing.T, other *nats.Conn, log *lines) {
	t.Helper()
	for _, subject := range []string{"events.order.placed", "_INBOX_outbox.x", "$JS.API.STREAM.DELETE.EVENTS", "$JS.API.STREAM.PURGE.EVENTS",
		"$JS.API.STREAM.UPDATE.EVENTS", "$JS.API.STREAM.RESTORE.EVENTS", "$JS.API.STREAM.MSG.DELETE.EVENTS", "$JS.API.STREAM.CREATE.OTHER"} {
		if err := other.Publish(subject, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		testenv.Eventually(t, "a refusal of "+subject, func() bool { return log.has(`Publish to "` + subject + `"`) })
	}
	if _, err := other.SubscribeSync("_INBOX_outbox.>"); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, "a refusal of the inbox", func() bool { return log.has(`Subscription to "_INBOX_outbox.>"`) })
}
