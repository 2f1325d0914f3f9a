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
		{"0/68", `message: transactional: 1 prefix: outbox_relay:16400, sz: 48 content:5ig7 {"retry": [{"id": "a", "attempt": 1}]}`},
		{"0/70", `table public.events: INSERT: id[text]:'d' payload[jsonb]:'1' headers[jsonb]:'{"content-type": "no"}'`},
		{"0/78", `message: transactional: 1 prefix: outbox_relay:16400, sz: 38 content:5ig7 {"replay": "x", "ids": ["b", "c"]}`},
		{"0/80", "COMMIT"},
	} {
		if err := decoded.line(line[0], line[1]); err != nil {
			t.Fatal(err)
		}
	}
	want := []event{
		{id: "a", body: digestOf([]byte(`{}`)), end: 0x40, inserted: 0x20},
		{id: "b", body: digestOf([]byte(`""`)), end: 0x40, inserted: 0x30, order: 1},
		{id: "c", body: digestOf([]byte(`1`)), end: 0x60, inserted: 0x18, order: 2},
		{id: "d", body: digestOf([]byte(`1`)), end: 0x80, inserted: 0x70, order: 4, rejected: true},
	}
	if !slices.Equal(decoded.events, want) {
		t.Errorf("%v, want %v", decoded.events, want)
	}
	wishes := []wish{{id: "a", end: 0x80, order: 3}, {id: "b", run: "x", end: 0x80, order: 5}, {id: "c", run: "x", end: 0x80, order: 6}}
	if !slices.Equal(decoded.wishes, wishes) {
		t.Errorf("%v, want %v", decoded.wishes, wishes)
	}
}
