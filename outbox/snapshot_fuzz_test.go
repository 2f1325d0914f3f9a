package outbox_test

import (
	"regexp"
	"strconv"
	"strings"
	"testing"

	"outbox-relay/outbox"
)

var snapshotForm = regexp.MustCompile(`^([0-9]+):([0-9]+):([0-9,]*)$`)

// FuzzSnapshot: a snapshot's text is read whole or not at all, and what it says
// of a transaction is what its three parts say.
func FuzzSnapshot(f *testing.F) {
	for _, text := range []string{"730:730:", "730:735:731,733", "4294967290:4294967400:4294967300", "1:2", "1:2:x", "1:2:1,,2", "18446744073709551616:2:"} {
		f.Add(text, uint32(731))
	}
	f.Fuzz(func(t *testing.T, text string, xid uint32) {
		s, err := outbox.ParseSnapshot(text)
		m := snapshotForm.FindStringSubmatch(text)
		if m == nil {
			if err == nil {
				t.Fatalf("%q: taken for %+v", text, s)
			}
			return
		}
		xmin, err1 := strconv.ParseUint(m[1], 10, 64)
		xmax, err2 := strconv.ParseUint(m[2], 10, 64)
		if err1 != nil || err2 != nil || err != nil {
			if err == nil {
				t.Fatalf("%q: taken for %+v", text, s)
			}
			return
		}
		full := xmax + uint64(int64(int32(xid-uint32(xmax)))) // the nearest to xmax
		running := false
		for _, xip := range strings.Split(m[3], ",") {
			n, err := strconv.ParseUint(xip, 10, 64)
			running = running || err == nil && n == full
		}
		if want := full < xmin || full < xmax && !running; s.Visible(xid) != want {
			t.Fatalf("%q: transaction %d visible %v, want %v", text, xid, !want, want)
		}
	})
}
