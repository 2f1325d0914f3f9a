package config

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
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

// checkPostgresURL says what is wrong, as far as that shows nothing of the
// password: pgx blanks it out of its errors, but at best effort (a password
// with an unescaped space, slash or quote partly stays).
func checkPostgresURL(s string) error {
	if strayCredentials(s) {
		return errors.New("has an @ outside the user information, so a part of the password may stand as host, database or parameter: write special characters as %XX (@ as %40, / as %2F)")
	}
	_, err := pgx.ParseConfig(s)
	if err == nil {
		return nil
	}
	problem := "is not a usable connection string"
	_, detail, found := strings.Cut(err.Error(), "`: ")
	if found && !strings.Contains(detail, "`") && !echoes(detail, s) {
		problem += ": " + detail
	}
	return errors.New(problem + "; write postgres://user:password@host:5432/database, special characters as %XX, or host=… dbname=…")
}

// strayCredentials reports whether a part of the password may be taken for
// something else, which errors of a dial and of the server would show.
func strayCredentials(s string) bool {
	rest, isURL := strings.CutPrefix(s, "postgres://")
	if !isURL {
		rest, isURL = strings.CutPrefix(s, "postgresql://")
	}
	if !isURL {
		return strayInKeywords(s)
	}
	// Like libpq, pgx ends the user information at the first @ before a slash.
	// Source: parseURLSettings of pgx's pgconn/parse_url.go.
	if i := strings.IndexAny(rest, "@/"); i >= 0 && rest[i] == '@' {
		if strings.Contains(strings.ToLower(rest[:i]), "password=") {
			return true
		}
		rest = rest[i+1:]
	}
	place, query, _ := strings.Cut(rest, "?")
	return strings.Contains(place, "@") || slices.ContainsFunc(strings.Split(query, "&"), func(parameter string) bool {
		key, value, _ := strings.Cut(parameter, "=")
		return strings.Contains(key, "@") || key != "user" && key != "password" && strings.Contains(value, "@")
	})
}

// strayInKeywords is strayCredentials of a keyword/value string. A host that
// begins with @ is a socket in the abstract namespace.
func strayInKeywords(s string) bool {
	config, err := pgx.ParseConfig(s)
	if err != nil {
		return false
	}
	stray := strings.LastIndexByte(config.Host, '@') > 0
	for _, fallback := range config.Fallbacks {
		stray = stray || strings.LastIndexByte(fallback.Host, '@') > 0
	}
	return stray
}

// echoes reports whether detail repeats four bytes or more of where the
// connection string may hold credentials.
func echoes(detail, connString string) bool {
	const run = 4
	for _, region := range credentialRegions(connString) {
		decoded, err := url.PathUnescape(region)
		if err != nil {
			decoded = region
		}
		for _, r := range []string{region, decoded} {
			if r != "" && len(r) < run && strings.Contains(detail, r) {
				return true
			}
			for i := 0; i+run <= len(r); i++ {
				if strings.Contains(detail, r[i:i+run]) {
					return true
				}
			}
		}
	}
	return false
}

var passwordWord = regexp.MustCompile(`(?i)password`)

// credentialRegions errs on the long side: all before the last @, and all after
// the first word password.
func credentialRegions(s string) []string {
	if _, rest, ok := strings.Cut(s, "://"); ok {
		s = rest
	}
	var regions []string
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		regions = append(regions, s[:i])
	}
	if at := passwordWord.FindStringIndex(s); at != nil {
		regions = append(regions, s[at[1]:])
	}
	return regions
}
