package repeat

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// story runs a test in virtual time: what is logged comes with its second.
func story(t *testing.T, tell func(log *slog.Logger), want ...string) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		began := time.Now()
		log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.String("at", fmt.Sprint(time.Since(began).Round(time.Second)))
			}
			return a
		}}))
		tell(log)
		synctest.Wait() // for what is logged at this very moment
		got := strings.TrimSpace(out.String())
		if text := strings.Join(want, "\n"); got != text {
			t.Errorf("logged\n%s\nwant\n%s", got, text)
		}
	})
}

func every(d time.Duration, times int, do func()) {
	for range times {
		do()
		time.Sleep(d)
	}
}

func TestCauseThatLasts(t *testing.T) {
	story(t, func(log *slog.Logger) {
		c := New(log)
		c.Over("back") // there is none
		every(5*time.Second, 26, func() { c.Again("away", "error", "refused") })
		c.Over("back", "server", "s")
		c.Over("back", "server", "s")
	}, `at=0s level=WARN msg=away error=refused`,
		`at=1m0s level=WARN msg=away error=refused count=13 duration=1m0s`,
		`at=2m0s level=WARN msg=away error=refused count=25 duration=2m0s`,
		`at=2m10s level=INFO msg=back server=s count=26 duration=2m10s`)
}

// A cause that comes and goes is told as lasting, until it has stayed away.
func TestCauseThatComesAndGoes(t *testing.T) {
	story(t, func(log *slog.Logger) {
		c := New(log)
		every(10*time.Second, 15, func() {
			c.Again("away")
			time.Sleep(time.Second)
			c.Over("back")
		})
		if !c.Returning() {
			t.Error("it is not returning")
		}
		time.Sleep(2 * time.Minute)
		if c.Returning() {
			t.Error("it is returning")
		}
		c.Again("away")
	}, `at=0s level=WARN msg=away`,
		`at=1s level=INFO msg=back count=1 duration=1s`,
		`at=11s level=WARN msg=away count=2 duration=11s`,
		`at=1m17s level=WARN msg=away count=8 duration=1m17s`,
		`at=2m23s level=WARN msg=away count=14 duration=2m23s`,
		`at=3m35s level=INFO msg=back count=15 duration=2m35s`,
		`at=4m45s level=WARN msg=away`)
}

// One that was away for a minute is another.
func TestCauseThatComesAgain(t *testing.T) {
	story(t, func(log *slog.Logger) {
		c := New(log)
		every(2*time.Minute, 2, func() { c.Again("away"); time.Sleep(time.Second); c.Over("back") })
	}, `at=0s level=WARN msg=away`, `at=1s level=INFO msg=back count=1 duration=1s`,
		`at=2m1s level=WARN msg=away`, `at=2m2s level=INFO msg=back count=1 duration=1s`)
}

// Another text is told at once, unless each is another.
func TestTextsOfACause(t *testing.T) {
	story(t, func(log *slog.Logger) {
		c := New(log)
		for i := range 100 {
			c.Again("away", "error", i%2)
			time.Sleep(time.Second)
		}
		c.Forget()
		for i := range 70 {
			c.Mention("a word", "notice", i)
			time.Sleep(time.Second)
		}
		c.Forget()
	}, `at=0s level=WARN msg=away error=0`, `at=1s level=WARN msg=away error=1 count=2 duration=1s`,
		`at=1m1s level=WARN msg=away error=1 count=62 duration=1m1s`,
		`at=1m40s level=INFO msg="a word" notice=0`, `at=1m41s level=INFO msg="a word" notice=1 count=2 duration=1s`,
		`at=1m42s level=INFO msg="a word" notice=2 count=3 duration=2s`, `at=1m43s level=INFO msg="a word" notice=3 count=4 duration=3s`,
		`at=1m44s level=INFO msg="a word" notice=4 count=5 duration=4s`, `at=2m44s level=INFO msg="a word" notice=64 count=65 duration=1m4s`)
}

// What has no end that anybody sees ends when it does not come again.
func TestCauseThatLapses(t *testing.T) {
	story(t, func(log *slog.Logger) {
		c := New(log)
		every(30*time.Second, 4, func() { c.Again("a word"); c.Lapse("no word") })
		time.Sleep(time.Minute)
	}, `at=0s level=WARN msg="a word"`, `at=1m0s level=WARN msg="a word" count=3 duration=1m0s`,
		`at=2m30s level=INFO msg="no word" count=4 duration=1m30s`)
}

// While a cause returns, nobody says how well all begins.
func TestQuiet(t *testing.T) {
	story(t, func(log *slog.Logger) {
		c := New(log)
		quiet := slog.New(Quiet(log.Handler(), c)).With("a", 1)
		every(time.Second, 3, func() {
			c.Again("away")
			quiet.Info("streaming")
			c.Over("back")
		})
		quiet.Warn("bad")
		time.Sleep(Every)
		quiet.Info("well")
	}, `at=0s level=WARN msg=away`, `at=0s level=INFO msg=streaming a=1`, `at=0s level=INFO msg=back count=1 duration=0s`,
		`at=1s level=WARN msg=away count=2 duration=1s`, `at=3s level=WARN msg=bad a=1`,
		`at=1m2s level=INFO msg=back count=3 duration=2s`, `at=1m3s level=INFO msg=well a=1`)
}
