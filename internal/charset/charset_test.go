package charset_test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/charset"
	"outbox-relay/internal/testenv"
)

var update = flag.Bool("update", false, "write tables.go from what Postgres converts")

func TestMain(m *testing.M) { testenv.Main(m) }

// names are the encodings of one byte that a database can have.
// Source: https://www.postgresql.org/docs/current/multibyte.html.
var names = strings.Fields(`ISO_8859_5 ISO_8859_6 ISO_8859_7 ISO_8859_8 KOI8R KOI8U LATIN1 LATIN2 LATIN3 LATIN4 LATIN5 LATIN6
	LATIN7 LATIN8 LATIN9 LATIN10 WIN866 WIN874 WIN1250 WIN1251 WIN1252 WIN1253 WIN1254 WIN1255 WIN1256 WIN1257 WIN1258`)

// postgresTable asks Postgres for the characters of an encoding's upper half.
func postgresTable(t *testing.T, conn *pgx.Conn, name string) string {
	t.Helper()
	var table strings.Builder
	for b := 0x80; b <= 0xff; b++ {
		var char []byte
		if err := conn.QueryRow(t.Context(), `select pg_temp.to_utf8($1, $2)`, []byte{byte(b)}, name).Scan(&char); err != nil {
			t.Fatal(err)
		}
		if char == nil {
			char = []byte(string(utf8.RuneError))
		}
		table.Write(char)
	}
	return table.String()
}

// The tables are those of Postgres, byte for byte.
func TestTablesArePostgres(t *testing.T) {
	conn, err := pgx.Connect(t.Context(), testenv.Database(t, testenv.Postgres(t))) // conversions need no table
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), `create function pg_temp.to_utf8(text bytea, encoding name) returns bytea as $$
		begin return convert(text, encoding, 'UTF8'); exception when others then return null; end $$ language plpgsql`); err != nil {
		t.Fatal(err)
	}
	tables := map[string]string{}
	for _, name := range names {
		tables[name] = postgresTable(t, conn, name)
	}
	if *update {
		write(t, tables)
	}
	for _, name := range names {
		c := charset.Of(name)
		for i, want := range []rune(tables[name]) {
			text := []byte{'a', byte(0x80 + i), 'b'}
			got, defect := c.AppendUTF8(nil, text)
			if want == utf8.RuneError {
				if defect != fmt.Sprintf("the byte 0x%02x at 1, which is no character of %s", 0x80+i, name) || string(got) != fmt.Sprintf(`a\x%02xb`, 0x80+i) {
					t.Errorf("%s: byte 0x%02x is %q, and none for Postgres: %s", name, 0x80+i, got, defect)
				}
				continue
			}
			if defect != "" || string(got) != "a"+string(want)+"b" {
				t.Errorf("%s: byte 0x%02x is %q, and %q for Postgres", name, 0x80+i, got, want)
			}
		}
	}
}

// write writes the tables as Go.
func write(t *testing.T, tables map[string]string) {
	var b strings.Builder
	b.WriteString("package charset\n\n// Written by `go test ./internal/charset -update` from what Postgres converts.\n\n" +
		"// singleByte has, by the names of encodings, the characters of the bytes from 0x80 on;\n// U+FFFD: the byte is none.\n" +
		"var singleByte = map[string]*[128]rune{\n")
	for _, name := range names {
		fmt.Fprintf(&b, "\t%q: table(", name)
		runes := []rune(tables[name])
		for i := 0; i < len(runes); i += 32 {
			fmt.Fprintf(&b, "%+q", string(runes[i:i+32]))
			if i+32 < len(runes) {
				b.WriteString(" +\n\t\t")
			}
		}
		b.WriteString("),\n")
	}
	b.WriteString("}\n\nfunc table(characters string) *[128]rune { return (*[128]rune)([]rune(characters)) }\n")
	if err := os.WriteFile("tables.go", []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestSQLASCII(t *testing.T) {
	c := charset.Of("SQL_ASCII")
	for text, want := range map[string]string{"Grüße": "Grüße", "a\x81b": `a\x81b`, "\xc3": `\xc3`, "�": "�"} {
		got, defect := c.AppendUTF8(nil, []byte(text))
		if string(got) != want || (defect == "") != (text == want) {
			t.Errorf("%q is %q, %s; want %q", text, got, defect, want)
		}
	}
}

func TestUTF8IsLeftAlone(t *testing.T) {
	for _, c := range []charset.Charset{{}, charset.Of("UTF8"), charset.Of("EUC_JP")} {
		if c.Raw() || c.Text("Grüße") != "Grüße" {
			t.Errorf("%s is converted", c.Name)
		}
	}
}
