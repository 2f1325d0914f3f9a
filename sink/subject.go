package sink

import (
	"outbox-relay/outbox/event"
)

// Subject returns the subject of the event's message; empty where there can be none.
func Subject(config MessageConfig, e *event.Event) string {
	b := newBuilder(config)
	b.reset(e)
	if b.makeSubject() != nil {
		return ""
	}
	return string(b.subject)
}
