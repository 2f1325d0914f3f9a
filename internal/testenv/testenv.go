// Package testenv gives tests real parts: a Postgres cluster and databases in
// it, embedded NATS servers, a proxy that breaks connections between them, and
// the relay's binary as a child process. What a test asks for, Cleanup takes
// away; what the tests of a binary share, Main does.
package testenv

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// leakTimeout is how long goroutines that are about to end may take.
const leakTimeout = 10 * time.Second

// Main is the TestMain of a package that uses testenv. It runs the tests, takes
// away what they shared, fails if a goroutine is left, and exits.
func Main(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	code := m.Run()
	err := errors.Join(shared.close(), built.remove())
	if code == 0 {
		err = errors.Join(err, findLeaks())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "testenv:", err)
		return max(code, 1)
	}
	return code
}

func findLeaks() error {
	deadline := time.Now().Add(leakTimeout)
	for {
		err := goleak.Find() // itself waits half a second
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}
