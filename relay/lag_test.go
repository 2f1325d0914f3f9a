package relay

import (
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
)

func TestLagClock(t *testing.T) {
	began := time.Now()
	at := func(second float64) time.Time { return began.Add(time.Duration(second * float64(time.Second))) }
	var c lagClock
	require := func(second float64, done pglogrepl.LSN, want float64) {
		t.Helper()
		if got := c.age(at(second), done).Seconds(); got != want {
			t.Errorf("at %v with %d done: %v, want %v", second, done, got, want)
		}
	}
	require(0, 0, 0) // nothing is known
	c.note(at(0), 100)
	require(1, 100, 0)
	require(9, 50, 9) // since it began to look at least
	c.note(at(10), 200)
	c.note(at(20), 300)
	require(30, 100, 30)
	require(30, 199, 30)
	require(30, 200, 20) // written behind the note at 10
	require(30, 299, 20)
	require(30, 300, 0)
	require(30, 400, 0)
	c.note(at(40), 300) // nothing was written for 20 seconds
	c.note(at(41), 400)
	require(42, 300, 2)
	c.note(at(50), 60) // a promoted server, whose WAL ends before
	require(53, 10, 3)
	require(53, 60, 0)
}

// Of however long a lag, the oldest note stays, and so many are kept.
func TestLagClockIsBounded(t *testing.T) {
	began := time.Now()
	var c lagClock
	for i := range 20 * maxNotes {
		c.note(began.Add(time.Duration(i)*time.Second/2), pglogrepl.LSN(i))
	}
	if len(c.notes) > maxNotes {
		t.Errorf("%d notes", len(c.notes))
	}
	if got := c.age(began.Add(24*time.Hour), 0); got != 24*time.Hour {
		t.Errorf("the oldest WAL is %s old", got)
	}
}
