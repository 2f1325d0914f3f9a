package config

import (
	"fmt"
	"slices"
)

// ownColumns are the relay's own, in whatever outbox.
var ownColumns = []string{"version", "status", "published_at", "failed_at", "failed_reasons", "failed_attempts",
	"retried_at", "retried_attempts"}

// columns reads the outbox's own names of columns. No two may be the same, nor any
// one of the relay's own.
func (e *environment) columns(f *faults) map[string]string {
	variables := []struct {
		usual string
		text  text
	}{
		{"id", e.ColumnID}, {"aggregate_type", e.ColumnAggregateType}, {"aggregate_id", e.ColumnAggregateID},
		{"event_type", e.ColumnEventType}, {"payload", e.ColumnPayload}, {"headers", e.ColumnHeaders},
		{"created_at", e.ColumnCreatedAt},
	}
	var names map[string]string
	meant := map[string]string{} // by the table's name
	for _, v := range variables {
		name := v.usual
		if v.text.given() {
			name = read(f, v.text, parseColumn)
			if names == nil {
				names = map[string]string{}
			}
			names[v.usual] = name
		}
		switch other, taken := meant[name]; {
		case name == "": // a fault already
		case slices.Contains(ownColumns, name):
			f.add(v.text.name, "is %s, which the relay keeps for itself: give it another name in the table", name)
		case taken:
			f.add(v.text.name, "is the column %s, which is the %s already: name another", name, other)
		}
		meant[name] = v.usual
	}
	return names
}

// parseColumn reads a name as Postgres would.
func parseColumn(s string) (string, error) {
	name, rest, err := cutIdentifier(s)
	switch {
	case err != nil:
		return "", fmt.Errorf("is %q, which %w", s, err)
	case rest != "":
		return "", fmt.Errorf("is %q: write the name of one column, other characters in double quotes", s)
	}
	return name, nil
}
