package config

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/dsn"
)

// maxIdentifier is Postgres' limit in bytes; what is longer it would cut.
const maxIdentifier = 63

// Table is a table as the catalogs name it: unquoted and in its own case.
type Table struct {
	Schema string
	Name   string
}

var plainIdentifier = regexp.MustCompile(`^[a-z_][a-z0-9_$]*$`)

// String is the name for people: quoted where it must be, key words aside. In
// SQL write pgx.Identifier{t.Schema, t.Name}.Sanitize().
func (t Table) String() string { return quote(t.Schema) + "." + quote(t.Name) }

func quote(identifier string) string {
	if plainIdentifier.MatchString(identifier) {
		return identifier
	}
	return pgx.Identifier{identifier}.Sanitize()
}

// parseTable reads table or schema.table as Postgres would: what is not quoted
// is folded to lower case.
func parseTable(s string) (Table, error) {
	if !utf8.ValidString(s) {
		return Table{}, fmt.Errorf("is %q: write it in UTF-8", s)
	}
	var parts []string
	for rest := s; ; {
		identifier, after, err := cutIdentifier(rest)
		if err != nil {
			return Table{}, fmt.Errorf("is %q, which %w", s, err)
		}
		parts = append(parts, identifier)
		if after == "" {
			break
		}
		var dot bool
		if rest, dot = strings.CutPrefix(after, "."); !dot {
			return Table{}, fmt.Errorf("is %q, which goes on after a name: write schema.table, other characters in double quotes", s)
		}
	}
	switch len(parts) {
	case 1:
		return Table{Schema: "public", Name: parts[0]}, nil
	case 2:
		return Table{Schema: parts[0], Name: parts[1]}, nil
	}
	return Table{}, fmt.Errorf("is %q, which has more than two names: write schema.table", s)
}

func cutIdentifier(s string) (identifier, rest string, err error) {
	if quoted, ok := strings.CutPrefix(s, `"`); ok {
		identifier, rest, err = cutQuoted(quoted)
	} else {
		identifier, rest, err = cutPlain(s)
	}
	switch {
	case err != nil:
	case identifier == "":
		err = errors.New("holds an empty name: write one")
	case len(identifier) > maxIdentifier:
		err = fmt.Errorf("holds a name of %d bytes: Postgres keeps %d", len(identifier), maxIdentifier)
	}
	return identifier, rest, err
}

func cutQuoted(s string) (identifier, rest string, err error) {
	for i := 0; i < len(s); i++ {
		if s[i] != '"' {
			continue
		}
		if i+1 < len(s) && s[i+1] == '"' {
			i++
			continue
		}
		return strings.ReplaceAll(s[:i], `""`, `"`), s[i+1:], nil
	}
	return "", "", errors.New("has no closing double quote")
}

func cutPlain(s string) (identifier, rest string, err error) {
	end := strings.IndexFunc(s, func(r rune) bool {
		return !(r == '_' || r == '$' || '0' <= r && r <= '9' || isIdentifierStart(r))
	})
	if end < 0 {
		end = len(s)
	}
	identifier = s[:end]
	if identifier != "" && !isIdentifierStart([]rune(identifier)[0]) {
		return "", "", errors.New("holds a name that begins with a digit or $: put it in double quotes")
	}
	return foldASCII(identifier), s[end:], nil
}

func isIdentifierStart(r rune) bool {
	return r == '_' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || r >= 0x80
}

// foldASCII is how Postgres folds an identifier in a UTF8 database.
func foldASCII(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, s)
}

var slotName = regexp.MustCompile(`^[a-z0-9_]{1,63}$`)

func parseSlot(s string) (string, error) {
	if !slotName.MatchString(s) {
		return "", fmt.Errorf("is %q: a slot's name is 1 to 63 of a-z 0-9 _", s)
	}
	return s, nil
}

func parsePublication(s string) (string, error) {
	if len(s) > maxIdentifier {
		return "", fmt.Errorf("has %d bytes: Postgres keeps %d", len(s), maxIdentifier)
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
		return "", fmt.Errorf("is %q: write it in UTF-8, without control characters", s)
	}
	return s, nil
}

func checkPostgresURL(s string) error {
	_, err := dsn.Parse(s)
	return err
}
