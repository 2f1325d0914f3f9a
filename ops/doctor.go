package ops

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/internal/fault"
	"outbox-relay/migrations"
	"outbox-relay/outbox"
	"outbox-relay/relay"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// Doctor examines both ends of a relay, with the checks that the relay itself
// makes and more, and changes nothing. A relay may run meanwhile.
type Doctor struct {
	Config  relay.Config
	Migrate migrations.Target // what `migrate` would bring about
	Out     io.Writer
}

// Check is one line of what the doctor says. Names and meanings of its members,
// and the names of checks, are stable; a later release may add some.
type Check struct {
	Group  string `json:"group"`  // postgres or nats
	Name   string `json:"name"`   // such as wal_level
	State  string `json:"state"`  // ok, warning, fault, or skipped: not looked at
	Found  string `json:"found"`  // what it is, or what is wrong, or why it was not looked at
	Remedy string `json:"remedy"` // what to do, in words; empty where there is nothing to do
	SQL    string `json:"sql"`    // the remedy as statements; empty where it is not of SQL
	Shell  string `json:"shell"`  // the remedy as a command; empty where it is none
}

// States of a Check.
const (
	stateOK      = "ok"
	stateWarning = "warning"
	stateFault   = "fault"
	stateSkipped = "skipped"
)

// Diagnosis is what `doctor --json` prints.
type Diagnosis struct {
	At       time.Time `json:"at"`
	Faults   int       `json:"faults"`
	Warnings int       `json:"warnings"`
	Skipped  int       `json:"skipped"`
	Checks   []Check   `json:"checks"`
}

// examination is one of the doctor, under way. What could not be had is nil, and
// what depends on it is skipped.
type examination struct {
	Doctor
	*relay.Examination
	group  string
	checks []Check

	sql      *pgx.Conn
	server   relay.Server
	system   replication.System // its ID is empty where replication can't be had
	slot     *outbox.SlotDetails
	standing *relay.Standing
	table    bool // it is there, with its columns and what migrate makes
	publish  bool // the publication has no fault
	client   *sink.Client
	stream   *sink.Description
}

// patience is how long either end may take to answer.
const patience = 20 * time.Second

// Run prints what it finds, for people or as JSON, and returns an error where
// anything is at fault.
func (d Doctor) Run(ctx context.Context, asJSON bool) error {
	diagnosis := d.examine(ctx)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := diagnosis.print(d.Out, asJSON); err != nil {
		return err
	}
	if diagnosis.Faults > 0 {
		return fmt.Errorf("doctor: %d checks are at fault", diagnosis.Faults)
	}
	return nil
}

func (d Doctor) examine(ctx context.Context) Diagnosis {
	e := &examination{Doctor: d, Examination: relay.Examine(d.Config)}
	defer e.Close()
	for _, end := range []struct {
		group   string
		examine func(context.Context)
	}{{"postgres", e.postgres}, {"nats", e.nats}} {
		e.group = end.group
		limited, cancel := context.WithTimeout(ctx, patience)
		end.examine(limited)
		cancel()
	}
	diagnosis := Diagnosis{At: time.Now().UTC().Truncate(time.Second), Checks: e.checks}
	for _, c := range e.checks {
		switch c.State {
		case stateFault:
			diagnosis.Faults++
		case stateWarning:
			diagnosis.Warnings++
		case stateSkipped:
			diagnosis.Skipped++
		}
	}
	return diagnosis
}

func (d Diagnosis) print(w io.Writer, asJSON bool) error {
	if !asJSON {
		_, err := io.WriteString(w, d.text())
		return err
	}
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	return encoder.Encode(d)
}

func (e *examination) add(name, state string, f *fault.Error) {
	found := strings.Join(strings.Fields(f.What), " ") // errors of several hosts come in lines
	e.checks = append(e.checks, Check{Group: e.group, Name: name, State: state, Found: found, Remedy: f.Remedy, SQL: f.SQL, Shell: f.Shell})
}

func (e *examination) ok(name, found string, args ...any) {
	e.add(name, stateOK, &fault.Error{What: fmt.Sprintf(found, args...)})
}

func (e *examination) warn(name string, f *fault.Error) { e.add(name, stateWarning, f) }

func (e *examination) skip(why string, names ...string) {
	for _, name := range names {
		e.add(name, stateSkipped, &fault.Error{What: why})
	}
}

// judge adds a fault where there is one, and reports whether there is none. What
// the role may not look at is left to the line that names its rights.
func (e *examination) judge(name string, err error) bool {
	var pgErr *pgconn.PgError
	var connect *pgconn.ConnectError
	switch {
	case err == nil:
		return true
	case errors.As(err, &pgErr) && pgErr.Code == "42501" && !errors.As(err, &connect):
		e.skip("the role lacks a right for it: see privileges", name)
	default:
		e.add(name, stateFault, fault.Of(err))
	}
	return false
}

// judgeMending is judge of a fault that the relay mends by itself when it starts:
// that is a warning.
func (e *examination) judgeMending(name, mends string, err error) bool {
	if err == nil && mends != "" {
		e.warn(name, &fault.Error{What: mends, Remedy: "start the relay: it publishes what was missed from the table, or again from the slot"})
		return false
	}
	return e.judge(name, err)
}
