package config

import (
	"strings"
	"testing"
)

func TestColumns(t *testing.T) {
	equal(t, "unset", load(t, nil).Columns, map[string]string(nil))
	cfg := load(t, map[string]string{"COLUMN_AGGREGATE_TYPE": "AggregateType", "COLUMN_EVENT_TYPE": ` "event Type" `, "COLUMN_ID": "id", "COLUMN_HEADERS": ""})
	equal(t, "columns", cfg.Columns, map[string]string{"aggregate_type": "aggregatetype", "event_type": "event Type", "id": "id"})
}

func TestColumnsFaults(t *testing.T) {
	for _, test := range []struct {
		vars map[string]string
		want string
	}{
		{map[string]string{"COLUMN_PAYLOAD": "a.b"}, `OUTBOX_COLUMN_PAYLOAD is "a.b": write the name of one column, other characters in double quotes`},
		{map[string]string{"COLUMN_PAYLOAD": `"a`}, `OUTBOX_COLUMN_PAYLOAD is "\"a", which has no closing double quote`},
		{map[string]string{"COLUMN_PAYLOAD": "Status"}, `OUTBOX_COLUMN_PAYLOAD is status, which the relay keeps for itself: give it another name in the table`},
		{map[string]string{"COLUMN_PAYLOAD": "x", "COLUMN_HEADERS": "x"}, `OUTBOX_COLUMN_HEADERS is the column x, which is the payload already: name another`},
		{map[string]string{"COLUMN_EVENT_TYPE": "id"}, `OUTBOX_COLUMN_EVENT_TYPE is the column id, which is the id already: name another`},
	} {
		equal(t, test.want, strings.Join(faultsOf(t, with(test.vars)), "\n"), test.want)
	}
}
