package relay

import (
	"bytes"
	"time"

	"outbox-relay/outbox/event"
	"outbox-relay/sink"
)

// Tracer is told of each event that is done and whose row has a traceparent. It
// must not block: it is called where acks are taken.
type Tracer interface {
	Done(Done)
}

// Done is an event that the stream has acknowledged, or that was parked. What is
// of the event is valid during the call.
type Done struct {
	Event    *event.Event
	Subject  string
	Stream   string
	Sequence uint64    // in the stream; 0: it was parked
	Reason   string    // why it was parked
	Sent     time.Time // zero where it was not sent
	At       time.Time // of the ack, or of the parking
}

var traceparent = []byte(`"traceparent"`)

// trace tells the tracer, if there is one.
func (p *pipeline) trace(e *event.Event, sequence uint64, sent, at time.Time, reason string) {
	tracer := p.relay.config.Tracer
	if tracer == nil || !bytes.Contains(e.Headers, traceparent) {
		return
	}
	tracer.Done(Done{Event: e, Subject: sink.Subject(p.message, e), Stream: p.stream.Name, Sequence: sequence,
		Reason: reason, Sent: sent, At: at})
}
