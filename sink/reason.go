package sink

import "errors"

// Reason is why a chain broke.
type Reason string

const (
	Disconnected Reason = "disconnected"    // the connection was lost, or did not take a message
	Unanswered   Reason = "unanswered"      // an answer is overdue, or there is no JetStream to give one
	OutOfOrder   Reason = "out_of_sequence" // another message, of others or a late copy, had taken the place in the stream
	Duplicate    Reason = "duplicate"       // the stream has a message with the id, at another sequence
	Refused      Reason = "refused"         // the stream refused a message for another cause
	Misrouted    Reason = "misrouted"       // an answer came that is not of our stream
)

// Reasons are all of them.
var Reasons = []Reason{Disconnected, Unanswered, OutOfOrder, Duplicate, Refused, Misrouted}

// breakage is an error that broke the chain.
type breakage struct {
	Reason
	error
}

func (b *breakage) Unwrap() error { return b.error }

// reasonOf returns the reason of a chain that is broken by err. What is sent again
// and does not fit any more is refused before it leaves.
func reasonOf(err error) Reason {
	var b *breakage
	if errors.As(err, &b) {
		return b.Reason
	}
	return Refused
}
