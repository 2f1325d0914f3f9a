package ops_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"outbox-relay/internal/config"
	"outbox-relay/ops"
	"outbox-relay/relay"
)

const token = "a-token-that-nobody-guesses"

func withToken(what *ops.Serving) { what.Token = func() (string, error) { return token, nil } }

// post asks for a retry with these headers.
func (s *served) post(body string, headers ...string) (status int, text string) {
	s.Helper()
	request, err := http.NewRequest(http.MethodPost, "http://"+s.addr+"/api/retry", strings.NewReader(body))
	if err != nil {
		s.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/json")
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		request.Header.Set(name, value)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		s.Fatal(err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		s.Fatal(err)
	}
	return response.StatusCode, string(answer)
}

// Only the token, in the one header that no browser sends by itself, lets
// anybody change anything; what is let in is judged before Postgres is asked.
func TestWhoMayRetry(t *testing.T) {
	s := serve(t, relay.Config{Postgres: func() (string, error) { return "", errors.New("there is no Postgres") }}, withToken)
	const one, bearer = `{"ids": ["a"]}`, "Authorization: Bearer " + token
	for _, c := range []struct {
		name, body string
		headers    []string
		status     int
		text       string
	}{
		{"no token", one, nil, http.StatusUnauthorized, "not the token"},
		{"another token", one, []string{"Authorization: Bearer " + token + "x"}, http.StatusUnauthorized, "not the token"},
		{"empty token", one, []string{"Authorization: Bearer "}, http.StatusUnauthorized, "not the token"},
		{"a cookie", one, []string{"Cookie: token=" + token}, http.StatusUnauthorized, "not the token"},
		{"without Bearer", one, []string{"Authorization: " + token}, http.StatusUnauthorized, "not the token"},
		{"another scheme", one, []string{"Authorization: Token " + token}, http.StatusUnauthorized, "not the token"},
		{"basic", one, []string{"Authorization: Basic " + token}, http.StatusUnauthorized, "not the token"},
		{"a form", one, []string{bearer, "Content-Type: application/x-www-form-urlencoded"}, http.StatusUnsupportedMediaType, "application/json"},
		{"no JSON", `ids`, []string{bearer}, http.StatusBadRequest, "read the body"},
		{"another member", `{"ids": ["a"], "sql": "x"}`, []string{bearer}, http.StatusBadRequest, "sql"},
		{"nothing", `{}`, []string{bearer}, http.StatusBadRequest, "ids"},
		{"both", `{"ids": ["a"], "all": true}`, []string{bearer}, http.StatusBadRequest, "ids"},
		{"too many", `{"ids": [` + strings.Repeat(`"a",`, 1000) + `"a"]}`, []string{bearer}, http.StatusBadRequest, "1000"},
		{"too much", `{"ids": ["` + strings.Repeat("a", 1<<17) + `"]}`, []string{bearer}, http.StatusRequestEntityTooLarge, "bytes"},
		{"scheme in lower case", one, []string{"Authorization: bearer " + token}, http.StatusServiceUnavailable, "there is no Postgres"},
		{"let in", one, []string{bearer}, http.StatusServiceUnavailable, "there is no Postgres"},
	} {
		if status, text := s.post(c.body, c.headers...); status != c.status || !strings.Contains(text, c.text) {
			t.Errorf("%s: got %d %s, want %d and %q", c.name, status, text, c.status, c.text)
		} else if strings.Contains(text, token) {
			t.Errorf("%s: the token is shown: %s", c.name, text)
		}
	}
	readOnly := serve(t, relay.Config{})
	if status, text := readOnly.post(one, bearer); status != http.StatusForbidden || !strings.Contains(text, "OUTBOX_HTTP_TOKEN is not set") {
		t.Errorf("without a token: %d %s", status, text)
	}
}

// A token that is replaced in its file counts from the next request on, if it is long
// enough; one that is not is refused, and not shown.
func TestTokenIsRotated(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	rotate := func(token string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rotate(token)
	t.Setenv("OUTBOX_POSTGRES_URL", "postgres://h/db")
	t.Setenv("OUTBOX_HTTP_TOKEN_FILE", path)
	cfg, err := config.Load()
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, relay.Config{Postgres: func() (string, error) { return "", errors.New("there is no Postgres") }},
		func(what *ops.Serving) { what.Token = cfg.HTTP.Token.Value })
	const another, short = "another-token-that-nobody-guesses", "tooshort"
	for _, c := range []struct {
		file, given string
		status      int
		text        string
	}{
		{token, token, http.StatusServiceUnavailable, "there is no Postgres"},
		{another + "\n", token, http.StatusUnauthorized, "not the token"},
		{another + "\n", another, http.StatusServiceUnavailable, "there is no Postgres"},
		{short, short, http.StatusServiceUnavailable, "has 8 characters"},
		{"\n", "", http.StatusServiceUnavailable, "OUTBOX_HTTP_TOKEN_FILE"},
	} {
		rotate(c.file)
		status, text := s.post(`{"all": true}`, "Authorization: Bearer "+c.given)
		if status != c.status || !strings.Contains(text, c.text) || strings.Contains(text, short) {
			t.Errorf("the file has %q, given is %q: got %d %s, want %d and %q", c.file, c.given, status, text, c.status, c.text)
		}
	}
}

// A site whose name leads to the relay's address (DNS rebinding) makes browsers take the
// relay for a part of that site. Such a name is refused; probes and Prometheus may use any.
func TestPageRefusesNamesOfOthers(t *testing.T) {
	s := serve(t, relay.Config{Postgres: func() (string, error) { return "", errors.New("there is no Postgres") }}, withToken, func(what *ops.Serving) {
		what.Admin.HTTP = "relay.example.com:8080"
		what.Debug = true
	})
	ask := func(method, host, path string) (int, string) {
		t.Helper()
		request, err := http.NewRequest(method, "http://"+s.addr+path, strings.NewReader(`{"all": true}`))
		if err != nil {
			t.Fatal(err)
		}
		request.Host = host
		request.Header.Set("Authorization", "Bearer "+token)
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		return response.StatusCode, string(text)
	}
	guarded := []string{"/", "/page.js", "/api/status", "/api/parked", "/debug/pprof/", "/nothing"}
	for _, host := range []string{"evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example:8080", "evil.",
		"localhost.", "example.com", "elsewhere.relay.example.com", "evil.example:localhost", "[evil.example]", "[::1].evil.example"} {
		for _, path := range guarded {
			if status, text := ask(http.MethodGet, host, path); status != http.StatusMisdirectedRequest || !strings.Contains(text, "OUTBOX_HTTP_ADDR") {
				t.Errorf("%s of %q answers %d %.80s", path, host, status, text)
			}
		}
		if status, text := ask(http.MethodPost, host, "/api/retry"); status != http.StatusMisdirectedRequest {
			t.Errorf("a retry by %q answers %d %s", host, status, text)
		}
		for _, path := range []string{"/metrics", "/healthz", "/readyz"} {
			if status, _ := ask(http.MethodGet, host, path); status == http.StatusMisdirectedRequest {
				t.Errorf("%s of %q answers %d", path, host, status)
			}
		}
	}
	for _, host := range []string{"127.0.0.1", "127.0.0.1:8080", "10.1.2.3:80", "[::1]", "[::1]:8080", "localhost", "LOCALHOST:8080",
		"outbox-relay:8080", "relay.example.com", "Relay.Example.COM:443"} {
		for _, path := range guarded {
			if status, text := ask(http.MethodGet, host, path); status == http.StatusMisdirectedRequest || status == http.StatusBadRequest {
				t.Errorf("%s of %q answers %d %.80s", path, host, status, text)
			}
		}
		if status, text := ask(http.MethodPost, host, "/api/retry"); status != http.StatusUnsupportedMediaType {
			t.Errorf("a retry by %q answers %d %s", host, status, text)
		}
	}
}

// Every answer tells browsers to keep it to themselves.
func TestSecurityHeaders(t *testing.T) {
	s := serve(t, relay.Config{})
	for _, path := range []string{"/", "/page.js", "/page.css", "/icon.svg", "/api/status", "/metrics", "/healthz", "/nothing"} {
		response, err := http.Get("http://" + s.addr + path)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		for name, want := range map[string]string{
			"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';", "X-Content-Type-Options": "nosniff",
			"Referrer-Policy": "no-referrer", "Cache-Control": "no-store", "X-Frame-Options": "DENY",
		} {
			if path == "/nothing" && name == "Cache-Control" {
				continue // http.Error takes it away: what is not there may be cached
			}
			if got := response.Header.Get(name); !strings.HasPrefix(got, want) {
				t.Errorf("%s: %s is %q", path, name, got)
			}
		}
		policy := response.Header.Get("Content-Security-Policy")
		if strings.Contains(policy, "unsafe") || !strings.Contains(policy, "frame-ancestors 'none'") {
			t.Errorf("%s: policy %s", path, policy)
		}
		if path == "/nothing" && response.StatusCode != http.StatusNotFound {
			t.Errorf("%s answers %d", path, response.StatusCode)
		}
	}
}

// Profiles are there only for who asks for them.
func TestDebugIsOffUnlessAskedFor(t *testing.T) {
	off, on := serve(t, relay.Config{}), serve(t, relay.Config{}, func(what *ops.Serving) { what.Debug = true })
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/goroutine", "/debug/pprof/symbol"} {
		if status, _ := off.get(path); status != http.StatusNotFound {
			t.Errorf("%s answers %d", path, status)
		}
		if status, _ := on.get(path); status != http.StatusOK {
			t.Errorf("%s answers %d with OUTBOX_HTTP_DEBUG", path, status)
		}
	}
}

// The journal keeps the newest warnings, whatever the log's own level, and hands
// on what that lets through.
func TestJournal(t *testing.T) {
	var written bytes.Buffer
	journal := ops.NewJournal(slog.NewTextHandler(&written, &slog.HandlerOptions{Level: slog.LevelError}))
	s := serve(t, relay.Config{}, func(what *ops.Serving) { what.Journal = journal })
	log := slog.New(journal).With("slot", "a").WithGroup("g")
	for i := range 31 {
		log.Warn("careful", "n", i)
	}
	log.Info("not this")
	log.Error("broken", "error", errors.New(strings.Repeat("long ", 1000)))
	_, body := s.get("/api/status")
	for want, times := range map[string]int{`"careful\nslot: a\ng.n: 1"`: 0, `"careful\nslot: a\ng.n: 2"`: 1, `"careful\nslot: a\ng.n: 30"`: 1,
		"not this": 0, `"level":"error","text":"broken`: 1, "…": 1} {
		if got := strings.Count(body, want); got != times {
			t.Errorf("%q is there %d times, want %d:\n%s", want, got, times, body)
		}
	}
	if len(body) > 8<<10 {
		t.Errorf("the answer has %d bytes", len(body))
	}
	if got := fmt.Sprint(strings.Count(written.String(), "careful"), strings.Count(written.String(), "broken")); got != "0 1" {
		t.Errorf("handed on: %s", written.String())
	}
	if _, body := s.get("/api/status?log=32"); strings.Contains(body, "broken") {
		t.Errorf("what was seen comes again: %s", body)
	}
}
