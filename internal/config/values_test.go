package config

import (
	"math"
	"strings"
	"testing"
)

func TestTable(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("a", 63)
	for _, test := range []struct {
		in     string
		want   Table
		string string
	}{
		{"events", Table{"public", "events"}, "public.events"},
		{"Shop.Events", Table{"shop", "events"}, "shop.events"},
		{`"Shop".events`, Table{"Shop", "events"}, `"Shop".events`},
		{`"a.b"."c""d"`, Table{"a.b", `c"d`}, `"a.b"."c""d"`},
		{"_x.e$1", Table{"_x", "e$1"}, "_x.e$1"},
		{"Ä.É", Table{"Ä", "É"}, `"Ä"."É"`},
		{long + "." + long, Table{long, long}, long + "." + long},
	} {
		got, err := parseTable(test.in)
		if err != nil || got != test.want || got.String() != test.string {
			t.Errorf("%s: got %+v, %s, %v", test.in, got, got.String(), err)
		}
	}
	for _, in := range []string{
		"a.b.c", "a.", ".a", ".", "a b", "a;b", "1a", "$a", `"a`, `"a"b`, `""`, `a."`, "a-b", "a'b", `a"b"`, "\xff",
		long + "a", `"` + long + `ü"`,
	} {
		if got, err := parseTable(in); err == nil {
			t.Errorf("%q: got %+v, want a fault", in, got)
		}
	}
}

func TestSubject(t *testing.T) {
	t.Parallel()
	s, err := ParseSubject("shop-1.{b}.x_Y.{a}")
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "tokens", s.Tokens, []Token{{Literal: "shop-1"}, {Column: "b"}, {Literal: "x_Y"}, {Column: "a"}})
	equal(t, "string", s.String(), "shop-1.{b}.x_Y.{a}")
	equal(t, "wildcard", s.Wildcard(), "shop-1.*.x_Y.*")
	equal(t, "columns", s.Columns(), []string{"b", "a"})

	for in, want := range map[string]string{
		"":                                    "token 1 is empty",
		"a..b":                                "token 2 is empty",
		"a.":                                  "token 2 is empty",
		"{a}":                                 "first token is a column",
		"a.*":                                 "wildcard",
		"a.>":                                 "wildcard",
		"a.{b":                                "token 2 is not {column}",
		"a.{}":                                "token 2 is not {column}",
		"a.{b}c":                              "token 2 is not {column}",
		"a.{b}{c}":                            "token 2 is not {column}",
		"a.c{b}":                              "token 2 is neither",
		"a.b c":                               "token 2 is neither",
		"$JS.x":                               "token 1 is neither",
		"a.é":                                 "token 2 is neither",
		"a.{b c}":                             "token 2 is not {column}",
		"a.{b:c}":                             "token 2 is not {column}",
		"a.{é}":                               "token 2 is not {column}",
		"a.{b}.c.{b}":                         "token 4 is a column that it has already",
		"a.{Position}":                        "Outbox-Position",
		"a.{" + strings.Repeat("c", 64) + "}": "token 2 is not {column}",
	} {
		if got, err := ParseSubject(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, %v, want %q", in, got, err, want)
		}
	}
}

func TestSize(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]int64{
		"0": 0, "1048576": 1 << 20, "512B": 512, "1KB": 1000, "1KiB": 1024, "64MiB": 64 << 20, "64 mib": 64 << 20,
		"1GB": 1e9, "2GiB": 2 << 30, "1TB": 1e12, "1TiB": 1 << 40, "9223372036854775807": math.MaxInt64,
	} {
		if got, err := parseSize(in); err != nil || got != want {
			t.Errorf("%q: got %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "B", "MiB", "-1", "+1", "1.5GiB", "1M", "1Mi", "1e6", "9223372036854775808", "8388608TiB", "1 2B", "0x10"} {
		if got, err := parseSize(in); err == nil {
			t.Errorf("%q: got %d, want a fault", in, got)
		}
	}
}

func TestHTTPAddr(t *testing.T) {
	t.Parallel()
	for _, in := range []string{":8080", "127.0.0.1:0", "[::1]:8080", "host:65535"} {
		if _, err := parseHTTPAddr(in); err != nil {
			t.Errorf("%q: %v", in, err)
		}
	}
	for _, in := range []string{"host", "host:", "host:http", "host:65536", "::1:80", "http://host:80", "host:-1"} {
		if _, err := parseHTTPAddr(in); err == nil {
			t.Errorf("%q: want a fault", in)
		}
	}
}

func TestHTTPToken(t *testing.T) {
	t.Parallel()
	for _, in := range []string{"0123456789abcdef", "a.b-c_d~e+f/g=h1"} {
		if err := checkHTTPToken(in); err != nil {
			t.Errorf("%q: %v", in, err)
		}
	}
	for _, in := range []string{"0123456789abcde", "0123456789 abcdef", "0123456789abcdé0", "0123456789abcdef\r\nX: y"} {
		if err := checkHTTPToken(in); err == nil || strings.Contains(err.Error(), in) {
			t.Errorf("%q: got %v, want a fault that does not show it", in, err)
		}
	}
}

func TestStreamName(t *testing.T) {
	t.Parallel()
	for _, in := range []string{"EVENTS", "a-b_c$", "Ünïcode"} {
		if _, err := parseStream(in); err != nil {
			t.Errorf("%q: %v", in, err)
		}
	}
	for _, in := range []string{"a.b", "a*", ">", "a/b", `a\b`, "a b", "a\tb", "a\u00a0b", "a\u200bb", "a\x7f"} {
		if _, err := parseStream(in); err == nil {
			t.Errorf("%q: want a fault", in)
		}
	}
}

func TestSourceExpand(t *testing.T) {
	t.Parallel()
	equal(t, "plain", Source("/{database}/{slot}").Expand("shop", "outbox_relay"), "/shop/outbox_relay")
	equal(t, "escaped", Source("urn:{database}").Expand("a b/{slot}", "s"), "urn:a%20b%2F%7Bslot%7D")
}
