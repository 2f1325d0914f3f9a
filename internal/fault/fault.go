// Package fault is what is wrong at a server, and what to do about it: one
// sentence for the log of a relay that stops, and its parts for the doctor.
package fault

import "errors"

// Error is a fault that somebody can mend.
type Error struct {
	What   string // what is wrong
	Remedy string // what to do about it, in words
	SQL    string // the remedy as statements to run; empty: it is not of SQL
	Shell  string // the remedy as a command; empty: it is none
	Cause  error  // what was told by others; What has it
}

func (e *Error) Error() string {
	if e.Remedy == "" {
		return e.What
	}
	return e.What + ": " + e.Remedy
}

func (e *Error) Unwrap() error { return e.Cause }

// Of returns the fault in err's tree. An error that is none is one without a
// remedy.
func Of(err error) *Error {
	var fault *Error
	if errors.As(err, &fault) {
		return fault
	}
	return &Error{What: err.Error(), Cause: err}
}
