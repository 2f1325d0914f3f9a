package config

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"
)

func oneOf[T ~string](values ...T) func(string) (T, error) {
	return func(s string) (T, error) {
		var names []string
		for _, v := range values {
			if strings.EqualFold(s, string(v)) {
				return v, nil
			}
			names = append(names, string(v))
		}
		return "", fmt.Errorf("is %q: it can be %s", s, list(names))
	}
}

func parseLevel(s string) (slog.Level, error) {
	name, err := oneOf("debug", "info", "warn", "error")(s)
	if err != nil {
		return 0, err
	}
	var level slog.Level
	return level, level.UnmarshalText([]byte(name))
}

func parseBool(s string) (bool, error) {
	b, err := strconv.ParseBool(s)
	if err != nil {
		return false, fmt.Errorf("is %q: it can be true or false", s)
	}
	return b, nil
}

func between(low, high int) func(string) (int, error) {
	return func(s string) (int, error) {
		n, err := strconv.Atoi(s)
		if err != nil || n < low || n > high {
			return 0, fmt.Errorf("is %q: write a whole number from %d to %d", s, low, high)
		}
		return n, nil
	}
}

func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, fmt.Errorf("is %q: write a duration with its unit, like 10s, 2m or 24h", s)
	}
	if d < 0 {
		return 0, fmt.Errorf("is %q: a duration is not negative", s)
	}
	return d, nil
}

// parseServerDuration knows that a NATS server takes nothing below 100 ms but 0.
func parseServerDuration(s string) (time.Duration, error) {
	d, err := parseDuration(s)
	if err == nil && d > 0 && d < 100*time.Millisecond {
		return 0, fmt.Errorf("is %q: the server takes 0, or 100ms and more", s)
	}
	return d, err
}

func parseBackoff(s string) (time.Duration, error) {
	d, err := parseDuration(s)
	if err == nil && d < time.Second {
		return 0, fmt.Errorf("is %q: it must be at least 1s", s)
	}
	return d, err
}

// units of a size, the longer names first.
var units = []struct {
	name  string
	bytes int64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"B", 1},
}

func parseSize(s string) (int64, error) {
	number, unit := s, int64(1)
	for _, u := range units {
		if len(s) > len(u.name) && strings.EqualFold(s[len(s)-len(u.name):], u.name) {
			number, unit = strings.TrimSpace(s[:len(s)-len(u.name)]), u.bytes
			break
		}
	}
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil || int64(n) > math.MaxInt64/unit {
		return 0, fmt.Errorf("is %q: write a size like 64MiB, 1GB or a number of bytes", s)
	}
	return int64(n) * unit, nil
}

func parseInflightBytes(s string) (int64, error) {
	n, err := parseSize(s)
	if err == nil && n < 1<<20 {
		return 0, fmt.Errorf("is %q: it must be at least 1MiB", s)
	}
	return n, err
}

func parseHTTPAddr(s string) (string, error) {
	_, port, err := net.SplitHostPort(s)
	if err != nil || !isPort(port, 0) {
		return "", fmt.Errorf("is %q: write host:port such as 127.0.0.1:8080, or leave it empty for no HTTP", s)
	}
	return s, nil
}

// checkHTTPToken wants what nobody guesses and a header can carry.
func checkHTTPToken(token string) error {
	if len(token) < 16 {
		return fmt.Errorf("has %d characters: it must have at least 16, such as from `openssl rand -hex 32`", len(token))
	}
	if !isURIText(token) {
		return errors.New("has characters that a header can't carry: take letters and digits, such as from `openssl rand -hex 32`")
	}
	return nil
}

// Source is the CloudEvents source, with {database} and {slot} to be filled in.
type Source string

func parseSource(s string) (Source, error) {
	expanded := Source(s).Expand("database", "slot")
	if strings.ContainsAny(expanded, "{}") {
		return "", fmt.Errorf("is %q: its placeholders are {database} and {slot}", s)
	}
	if _, err := url.Parse(expanded); err != nil || !isURIText(expanded) {
		return "", fmt.Errorf("is %q: a CloudEvents source is a URI or its path, other characters as %%XX", s)
	}
	return Source(s), nil
}

func isURIText(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r >= 0x7f || strings.ContainsRune("\"<>\\^`|", r)
	})
}

// Expand fills in the placeholders, escaped as URI segments.
func (s Source) Expand(database, slot string) string {
	return strings.NewReplacer(
		"{database}", url.PathEscape(database),
		"{slot}", url.PathEscape(slot),
	).Replace(string(s))
}
