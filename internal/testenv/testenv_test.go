package testenv

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) { Main(m) }

// failure runs f with a testing.TB on which Fatalf does not fail the test, and
// returns what it said.
func failure(tb testing.TB, f func(testing.TB)) string {
	tb.Helper()
	fake := &fakeTB{TB: tb}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		f(fake)
	}()
	<-ended
	if fake.said == "" {
		tb.Error("did not fail")
	}
	return fake.said
}

type fakeTB struct {
	testing.TB
	said string
}

func (f *fakeTB) Fatalf(format string, args ...any) {
	f.said = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

func TestEventually(t *testing.T) {
	calls := 0
	Eventually(t, "the third call", func() bool { calls++; return calls == 3 })
	said := failure(t, func(tb testing.TB) {
		EventuallyWithin(tb, 20*time.Millisecond, "the impossible", func() bool { return false })
	})
	if !strings.Contains(said, "the impossible") {
		t.Errorf("said %q", said)
	}
}
