package relay

import (
	"log/slog"

	"outbox-relay/internal/repeat"
)

// causes are what can go wrong again and again. They outlive the sessions, since
// most of them end one.
type causes struct {
	session    *repeat.Cause // no session runs
	standby    *repeat.Cause // the relay stands by, and could not take over
	refused    *repeat.Cause // Postgres refuses to record outcomes
	unwritten  *repeat.Cause // it refuses to write some of them to their rows
	stall      *repeat.Cause // the pipeline does not move
	notice     *repeat.Cause // Postgres says something about the slot
	open       *repeat.Cause // an open transaction holds the slot's creation up
	ignored    *repeat.Cause // inserts that are no events
	foreign    *repeat.Cause // messages of others in the stream
	housework  *repeat.Cause // the housekeeper can't connect
	retention  *repeat.Cause // it can't remove what is old
	retries    *repeat.Cause // it can't retry
	unremoved  *repeat.Cause // Postgres keeps rows from being removed
	unretried  *repeat.Cause // or from being retried
	attached   *repeat.Cause // rows of a new partition come through no slot
	partitions *repeat.Cause // Postgres says something about its work
}

func newCauses(log *slog.Logger) *causes {
	cause := func() *repeat.Cause { return repeat.New(log) }
	return &causes{session: cause(), standby: cause(), refused: cause(), unwritten: cause(), stall: repeat.First(log), notice: cause(), open: cause(), ignored: cause(), foreign: cause(),
		housework: repeat.First(log), retention: cause(), retries: cause(), unremoved: cause(), unretried: cause(), attached: cause(), partitions: cause()}
}
