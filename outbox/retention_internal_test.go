package outbox

import (
	"testing"
	"time"
)

// A pass ends where ULIDs tell that no row behind is old; other ids never do.
func TestNoneOlder(t *testing.T) {
	t.Parallel()
	// The example of https://github.com/ulid/javascript.
	at := time.UnixMilli(1469918176385)
	const ulid = "01ARYZ6S41TSV4RRFFQ69G5FAV"
	young := at.Add(-time.Second) // a cutoff
	row := func(id string) made { return made{id, at} }
	for _, test := range []struct {
		name        string
		last, final made
		cutoff      time.Time
		want        bool
	}{
		{"young", row("event_" + ulid), row("event_" + ulid), young, true},
		{"no prefix", row(ulid), row(ulid), young, true},
		{"old", row("event_" + ulid), row("event_" + ulid), at, false},
		{"another prefix behind", row("event_" + ulid), row("order_" + ulid), young, false},
		{"a uuid behind", row("event_" + ulid), row("event_f47ac10b-58cc-4372-a567-0e02b2c3d479"), young, false},
		{"uuids", row("f47ac10b-58cc-4372-a567-0e02b2c3d479"), row("f47ac10b-58cc-4372-a567-0e02b2c3d479"), young, false},
		{"short", row("1"), row("2"), young, false},
		{"lower case", row("event_01aryz6s41tsv4rrffq69g5fav"), row("event_" + ulid), young, false},
		{"looks like a ULID, made at another time", made{"event_" + ulid, at.Add(25 * time.Hour)}, row("event_" + ulid), young, false},
		{"a transaction of hours", made{"event_" + ulid, at.Add(-5 * time.Hour)}, row("event_" + ulid), young, true},
		{"greater than any ULID", row("ZZZZZZZZZZZZZZZZZZZZZZZZZZ"), row("ZZZZZZZZZZZZZZZZZZZZZZZZZZ"), young, false},
	} {
		if got := noneOlder(test.last, test.final, test.cutoff); got != test.want {
			t.Errorf("%s: %t, want %t", test.name, got, test.want)
		}
	}
}
