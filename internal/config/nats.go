package config

import (
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/nats-io/nkeys"
)

// maxStreamName is the server's limit in bytes.
const maxStreamName = 255

// Servers are the NATS servers to connect to. They may hold passwords, so they
// print without.
type Servers struct {
	list func() []*url.URL // a func, so that no fmt verb reaches the passwords
}

// URLs are the servers as nats.go wants them, credentials and all.
func (s Servers) URLs() []string {
	return s.each((*url.URL).String)
}

func (s Servers) String() string {
	return strings.Join(s.each(func(u *url.URL) string {
		if u.User != nil {
			return u.Scheme + "://" + redacted + "@" + u.Host
		}
		return u.Scheme + "://" + u.Host
	}), ",")
}

func (s Servers) GoString() string             { return "config.Servers(" + s.String() + ")" }
func (s Servers) LogValue() slog.Value         { return slog.StringValue(s.String()) }
func (s Servers) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

func (s Servers) each(show func(*url.URL) string) []string {
	if s.list == nil {
		return nil
	}
	var shown []string
	for _, u := range s.list() {
		shown = append(shown, show(u))
	}
	return shown
}

// authenticate reports whether a server comes with user information.
func (s Servers) authenticate() bool {
	return s.list != nil && slices.ContainsFunc(s.list(), func(u *url.URL) bool { return u.User != nil })
}

// parseServers names a bad server by its place, never by its text.
func parseServers(s string) (Servers, error) {
	var urls []*url.URL
	var problems []string
	for i, part := range strings.Split(s, ",") {
		u, err := parseServer(strings.TrimSpace(part))
		if err != nil {
			problems = append(problems, fmt.Sprintf("server %d %s", i+1, err))
			continue
		}
		urls = append(urls, u)
	}
	if len(problems) > 0 {
		return Servers{}, errors.New("is not a list of servers: " + strings.Join(problems, "; "))
	}
	return Servers{func() []*url.URL { return urls }}, nil
}

func parseServer(s string) (*url.URL, error) {
	if s == "" {
		return nil, errors.New("is empty: remove the extra comma")
	}
	if !strings.Contains(s, "://") {
		return nil, errors.New("has no scheme: write nats://host:4222")
	}
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("cannot be parsed: write nats://host:4222, special characters of a password as %XX")
	}
	switch u.Scheme {
	case "nats", "tls":
	default:
		return nil, errors.New("has another scheme than nats or tls")
	}
	if u.Hostname() == "" {
		return nil, errors.New("has no host: write nats://host:4222")
	}
	if port := u.Port(); port != "" && !isPort(port, 1) {
		return nil, errors.New("has a port that is not 1 to 65535")
	}
	if strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, errors.New("goes on after the port: remove that, and write special characters of a password as %XX")
	}
	return u, nil
}

func isPort(s string, lowest int) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && int(n) >= lowest
}

func checkSeed(seed string) error {
	problem := errors.New("is not the seed of a user nkey: it begins with SU")
	pair, err := nkeys.FromSeed([]byte(seed))
	if err != nil {
		return problem
	}
	defer pair.Wipe()
	public, err := pair.PublicKey()
	if err != nil || !nkeys.IsValidPublicUserKey(public) {
		return problem
	}
	return nil
}

func parseStream(s string) (string, error) {
	if len(s) > maxStreamName {
		return "", fmt.Errorf("has %d bytes: a stream's name has at most %d", len(s), maxStreamName)
	}
	if !isName(s, `.*>/\`) {
		return "", fmt.Errorf(`is %q: a stream's name has no white space, no . * > / \ and nothing unprintable`, s)
	}
	return s, nil
}

func parseDomain(s string) (string, error) {
	if !isName(s, ".*>") {
		return "", fmt.Errorf("is %q: a domain is one token, without white space and . * >", s)
	}
	return s, nil
}

func parseInboxPrefix(s string) (string, error) {
	for token := range strings.SplitSeq(s, ".") {
		if !isName(token, "*>") {
			return "", fmt.Errorf("is %q: write tokens separated by single dots, without white space and * >", s)
		}
	}
	return s, nil
}

// isName reports whether s is not empty, printable, without space and without
// these characters.
func isName(s, without string) bool {
	return s != "" && !strings.ContainsAny(s, without) && !strings.ContainsFunc(s, func(r rune) bool {
		return unicode.IsSpace(r) || !unicode.IsPrint(r)
	})
}
