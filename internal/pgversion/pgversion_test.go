package pgversion

import "testing"

func TestDecodes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		version int
		level   string
		want    bool
	}{{150018, "logical", true}, {180003, "replica", false}, {190000, "replica", true}, {190000, "minimal", false}, {190000, "logical", true}} {
		if got := Decodes(c.version, c.level); got != c.want {
			t.Errorf("%d with wal_level %s: %v", c.version, c.level, got)
		}
	}
}
