package dsn

import (
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

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
