package chaos

import (
	"maps"
	"slices"
	"testing"
)

func TestColumnsOfTestDecoding(t *testing.T) {
	for tuple, want := range map[string]map[string]string{
		` id[text]:'a' n[integer]:-1 b[boolean]:true x[text]:null`: {"id": "a", "n": "-1", "b": "true", "x": "null"},
		` p[jsonb]:'{"a": "it''s", "b": "''", "c": "x]:y["}' z[text[]]:'{a,b}' t[timestamp with time zone]:'2026-01-01 00:00:00+00'`: {
			"p": `{"a": "it's", "b": "'", "c": "x]:y["}`, "z": "{a,b}", "t": "2026-01-01 00:00:00+00"},
		` e[text]:''`: {"e": ""},
	} {
		got, err := columnsOf(tuple)
		if err != nil || !maps.Equal(got, want) {
			t.Errorf("%s: %q, %v", tuple, got, err)
		}
	}
	for _, bad := range []string{" id", " id[text]", " id[text]:'a"} {
		if got, err := columnsOf(bad); err == nil {
			t.Errorf("%s: %q without an error", bad, got)
		}
	}
}

func TestTransactionsOfTestDecoding(t *testing.T) {
	var decoded transactions
	for _, line := range [][2]string{
		{"0/10", "BEGIN"},
		{"0/20", `table public.events: INSERT: id[text]:'a' payload[jsonb]:'{}'`},
		{"0/28", ""},
		{"0/30", `table public.events: INSERT: id[text]:'b' payload[jsonb]:'""'`},
		{"0/40", "COMMIT"},
		{"0/50", "COMMIT"},
		{"0/18", `table public.events: INSERT: id[text]:'c' payload[jsonb]:'1'`},
		{"0/60", "COMMIT"},
	} {
		if err := decoded.line(line[0], line[1]); err != nil {
			t.Fatal(err)
		}
	}
	want := []event{{"a", digestOf([]byte(`{}`)), 0x40}, {"b", digestOf([]byte(`""`)), 0x40}, {"c", digestOf([]byte(`1`)), 0x60}}
	if !slices.Equal(decoded.events, want) {
		t.Errorf("%v, want %v", decoded.events, want)
	}
}
