package main

import (
	"cmp"
	"context"
	"log"
	"os"
	"os/signal"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	nc, err := nats.Connect(cmp.Or(os.Getenv("NATS_URL"), nats.DefaultURL))
	must(err)
	js, err := jetstream.New(nc)
	must(err)
	consumer, err := js.CreateOrUpdateConsumer(ctx, "EVENTS", jetstream.ConsumerConfig{
		Durable: "email", FilterSubject: "events.order.>", MaxAckPending: 1, // one at a time: in order
	})
	must(err)
	consuming, err := consumer.Consume(func(msg jetstream.Msg) {
		// A consumer can get a message again: remember the id with what you do.
		log.Printf("%s %s %s", msg.Headers().Get("Nats-Msg-Id"), msg.Subject(), msg.Data())
		must(msg.DoubleAck(ctx))
	})
	must(err)
	<-ctx.Done()
	consuming.Stop()
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
