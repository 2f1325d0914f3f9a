package relay

import (
	"cmp"
	"context"
	"errors"
	"strings"
	"time"

	"outbox-relay/checkpoint"
	"outbox-relay/internal/fault"
	"outbox-relay/outbox"
	"outbox-relay/sink"
)

const (
	rehearsalLimit = 30 * time.Second // for both ends together
	rehearsalNATS  = 5 * time.Second  // to connect to NATS
	// recheck is the pause behind a rehearsal that failed: what is put right is soon seen.
	recheck = 10 * time.Second
)

// takeover is what the last rehearsal found; nil: none was made since the relay stands by.
type takeover struct{ why string } // empty: it could take over

// couldNot says what keeps a relay that stands by from being ready.
func (t *takeover) couldNot() string {
	switch {
	case t == nil:
		return "it looks whether it could take over"
	case t.why != "":
		return "could not take over: " + t.why
	}
	return ""
}

// rehearse looks again and again whether the relay could take over, while it stands
// by, until ctx ends. It has connections of its own: the wait for the slot knows
// nothing of it.
func (r *Relay) rehearse(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.stands:
		}
		for r.State() == Standby && ctx.Err() == nil {
			err := r.rehearseOnce(ctx)
			if r.State() == Standby && ctx.Err() == nil {
				r.tellRehearsal(err)
			}
			pause := r.config.CheckEvery
			if err != nil {
				pause = min(pause, recheck)
			}
			r.awaitRehearsal(ctx, pause)
		}
		r.causes.standby.Forget()
	}
}

// awaitRehearsal waits so long, or until the relay stands by anew.
func (r *Relay) awaitRehearsal(ctx context.Context, pause time.Duration) {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-r.stands:
	}
}

func (r *Relay) tellRehearsal(err error) {
	if err == nil {
		r.rehearsed.Store(true)
		r.takeover.Store(&takeover{})
		r.causes.standby.Over("could take over again")
		return
	}
	r.takeover.Store(&takeover{why: err.Error()})
	r.causes.standby.Again("could not take over", "error", err)
}

// rehearseOnce tries all that a takeover needs but the slot itself, with the checks of a
// start, and makes and claims nothing.
func (r *Relay) rehearseOnce(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, rehearsalLimit)
	defer cancel()
	e := Examine(r.config)
	defer e.Close()
	standing, err := e.rehearsePostgres(ctx)
	if err != nil {
		return withGrants(err)
	}
	return e.rehearseNATS(ctx, standing, r.config.Sink(e.s.system).Stream.Create)
}

func (e *Examination) rehearsePostgres(ctx context.Context) (st Standing, err error) {
	if _, err := e.Postgres(ctx); err != nil {
		return st, err
	}
	if err := e.s.checkServer(ctx); err != nil {
		return st, err
	}
	if err := e.s.checkTable(ctx); err != nil {
		return st, err
	}
	if err := e.s.connectReplication(ctx); err != nil {
		return st, err
	}
	e.s.conn.Close() // a walsender that others may need
	if err := e.checkGrants(ctx); err != nil {
		return st, err
	}
	if err := e.s.checkSlot(ctx); err != nil {
		return st, err
	}
	if st, err = e.Standing(ctx); err != nil {
		return st, err
	}
	if _, err := e.CheckSlot(st); err != nil {
		return st, err
	}
	if st.Checkpoint != nil && st.Checkpoint.Phase != checkpoint.Creating {
		_, err = e.CheckPublication(ctx, *st.Checkpoint)
	}
	return st, err
}

func (e *Examination) checkGrants(ctx context.Context) error {
	keeping := e.s.relay.config.Housekeeping
	missing, _, err := e.s.table.MissingGrants(ctx, e.s.sql, outbox.Uses{Retention: keeping.Retention > 0, Retries: keeping.Retries.Attempts > 0})
	if err != nil || len(missing) == 0 {
		return err
	}
	sql := strings.Join(missing, "; ")
	return &fault.Error{What: "the role lacks rights on the relay's tables", Remedy: sql, SQL: sql}
}

func (e *Examination) rehearseNATS(ctx context.Context, st Standing, create bool) error {
	connecting, cancel := context.WithTimeout(ctx, rehearsalNATS)
	defer cancel()
	client, err := e.NATS(connecting)
	if err != nil {
		return err
	}
	owner := e.s.relay.config.Sink(e.s.system).Stream
	if st.Checkpoint != nil && st.Checkpoint.Stream != owner.Name {
		e.s.stream.Name = owner.Name
		return e.s.otherStream(*st.Checkpoint)
	}
	known := st.Checkpoint != nil && st.Checkpoint.Phase == checkpoint.Streaming
	described, err := client.Describe(ctx, owner)
	switch {
	case errors.Is(err, sink.ErrNoStream) && create && !known:
		return client.TryCreate(ctx, owner.Name)
	case err != nil:
		return e.ExplainMissing(err, known)
	}
	faults := described.Faults
	if err := cmp.Or(faults.Kind, faults.Subjects, faults.Owner); err != nil {
		return err
	}
	subject := strings.ReplaceAll(owner.Subjects, "*", "outbox_relay_doctor")
	if err := cmp.Or(client.TryPublish(ctx, owner.Name, subject), client.TryRead(ctx, described.Stream)); err != nil {
		return err
	}
	if st.Checkpoint == nil {
		return nil
	}
	_, err = e.CheckStream(ctx, st, described.Stream)
	return err
}
