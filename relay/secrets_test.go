package relay_test

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nkeys"

	"outbox-relay/internal/testenv"
)

// canary is a password with all that URLs, DSNs and log formats treat in a way
// of their own: whatever they cut it into, each part is seen.
const canary = `canary/canary@canary:canary canary'canary%canary`

// watched is a bundle whose secrets must show nowhere.
type watched struct {
	*bundle
	address string
	seen    []string // what shows a secret
}

func setupWatched(t *testing.T) *watched {
	b := setupOn(t, passwordPostgres(t, canary), testenv.NATSOptions{Edit: func(o *server.Options) {
		user := testenv.RelayUser(t)
		user.Password = canary
		o.Users = []*server.User{user, {Username: "anybody"}}
		o.NoAuthUser = "anybody"
	}})
	w := &watched{bundle: b, address: fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t)), seen: []string{"canary"}}
	b.env["OUTBOX_NATS_PASSWORD"] = canary
	b.env["OUTBOX_HTTP_ADDR"] = w.address
	b.env["OUTBOX_HTTP_TOKEN"] = "canary-0123456789abcdef"
	b.env["OUTBOX_POSTGRES_URL"] = testenv.AsRelay(b, b.url)
	return w
}

func (w *watched) requireHidden(where, text string) {
	w.Helper()
	for _, secret := range w.seen {
		for line := range strings.Lines(text) {
			if strings.Contains(line, secret) {
				w.Errorf("%s shows a secret: %s", where, line)
			}
		}
	}
}

// seed is a new user's, which is a secret too, by any twelve of its characters.
func (w *watched) seed() string {
	w.Helper()
	pair, err := nkeys.CreateUser()
	w.must(err)
	seed, err := pair.Seed()
	w.must(err)
	for i := 2; i+12 <= len(seed); i += 6 {
		w.seen = append(w.seen, string(seed[i:i+12]))
	}
	return string(seed)
}

// file writes a file, and returns its path.
func (w *watched) file(text string) string {
	w.Helper()
	path := filepath.Join(w.TempDir(), "secret")
	w.must(os.WriteFile(path, []byte(text), 0o600))
	return path
}

// requireServesNone looks at all that the relay serves, and at how it was called.
func (w *watched) requireServesNone(r *testenv.Relay) {
	w.Helper()
	for _, path := range []string{"/", "/api/status", "/api/parked", "/metrics", "/healthz", "/readyz", "/debug/pprof/cmdline", "/debug/vars"} {
		response, err := http.Get("http://" + w.address + path)
		w.must(err)
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		w.must(err)
		w.requireHidden(path, fmt.Sprint(response.Header)+"\n"+string(body))
	}
	http.DefaultClient.CloseIdleConnections()
	if line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", r.Pid())); err == nil { // Linux
		w.requireHidden("the command line", string(line))
	}
}

// Secrets are in no log line at debug level, in no answer of the HTTP server, in
// no output of a command, and not on the command line.
func TestSecretsAreHidden(t *testing.T) {
	t.Parallel()
	w := setupWatched(t)
	r := testenv.StartRelay(t, w.with())
	r.WaitLog("msg=streaming")
	w.requireStatus("published", w.insert(3))
	w.requireServesNone(r)
	for _, command := range []string{"status", "status --json", "doctor", "doctor --json", "retry --all", "replay --all --dry-run", "migrate",
		"drop none", "healthcheck", "help", "version", "none"} {
		c := testenv.StartRelay(t, w.with(), strings.Fields(command)...)
		c.Wait(time.Minute)
		w.requireHidden(command, c.Logs())
	}

	// Both passwords are changed under its feet.
	w.exec(`alter role relay password 'another'`)
	w.exec(`select pg_terminate_backend(pid) from pg_stat_activity where usename = 'relay'`)
	r.WaitLog("28P01")
	w.requireServesNone(r)
	requireLeaves(t, r)
	w.requireHidden("the log", r.Logs())
	w.grant()
}

// Nor are they in an error.
func TestErrorsHideSecrets(t *testing.T) {
	t.Parallel()
	w := setupWatched(t)
	right := w.env["OUTBOX_POSTGRES_URL"]
	nowhere := fmt.Sprintf("127.0.0.1:%d", testenv.FreePort(t))
	escaped := url.UserPassword("relay", canary).String()
	seed, stranger := w.seed(), w.seed()
	gone := filepath.Join(t.TempDir(), "gone")
	const noUser = "NATS_USER= NATS_PASSWORD= "
	for name, c := range map[string]struct {
		changes string // separated by spaces; one with tabs for spaces stands alone
		code    int
		says    string // and waits, where the code is 0
	}{
		"wrong password at Postgres":     {"POSTGRES_URL=" + strings.Replace(right, "canary", "canarywrong", 1), 1, "28P01"},
		"Postgres away":                  {"POSTGRES_URL=postgres://" + escaped + "@" + nowhere + "/app", 0, "waiting to start again"},
		"no such host":                   {"POSTGRES_URL=postgres://" + escaped + "@none.invalid/app", 0, "waiting to start again"},
		"URL with a bad port":            {"POSTGRES_URL=postgres://" + escaped + "@localhost:port/app", 2, "OUTBOX_POSTGRES_URL"},
		"URL with nothing escaped":       {"POSTGRES_URL=postgres://relay:" + strings.ReplaceAll(canary, " ", "@") + "@localhost/app", 2, "OUTBOX_POSTGRES_URL"},
		"URL with a bad parameter":       {"POSTGRES_URL=postgres://" + escaped + "@localhost/app?sslmode=canary", 2, "OUTBOX_POSTGRES_URL"},
		"URL with the password there":    {"POSTGRES_URL=postgres://localhost/app?sslmode=none&password=canary", 2, "OUTBOX_POSTGRES_URL"},
		"DSN without an end":             {"POSTGRES_URL=host=localhost\tpassword='canary", 2, "OUTBOX_POSTGRES_URL"},
		"URL in a file that is gone":     {"POSTGRES_URL= POSTGRES_URL_FILE=" + gone, 2, "OUTBOX_POSTGRES_URL_FILE"},
		"URL in a file, unusable":        {"POSTGRES_URL= POSTGRES_URL_FILE=" + w.file("postgres://"+canary), 2, "OUTBOX_POSTGRES_URL_FILE"},
		"URL given twice":                {"POSTGRES_URL_FILE=" + w.file(right), 2, "both set"},
		"misspelt variable":              {"NATS_PASSWROD=canary", 2, "OUTBOX_NATS_PASSWROD"},
		"wrong password at NATS":         {"NATS_PASSWORD=canarywrong", 1, "Authorization Violation"},
		"password at NATS, file gone":    {"NATS_PASSWORD= NATS_PASSWORD_FILE=" + gone, 2, "OUTBOX_NATS_PASSWORD_FILE"},
		"wrong token":                    {noUser + "NATS_TOKEN=canary", 1, "_TOKEN"},
		"NATS away":                      {"NATS_URL=nats://" + nowhere, 0, "waiting for NATS"},
		"NATS away, password in its URL": {noUser + "NATS_URL=nats://" + escaped + "@" + nowhere, 0, "waiting for NATS"},
		"wrong password in NATS' URL":    {noUser + "NATS_URL=" + strings.Replace(w.nats.URL(), "nats://", "nats://relay:canary@", 1), 1, "Authorization Violation"},
		"bad URL of NATS":                {noUser + "NATS_URL=nats://relay:canary/canary@localhost:4222", 2, "OUTBOX_NATS_URL"},
		"wrong nkey":                     {noUser + "NATS_NKEY=" + stranger, 1, "_NKEY"},
		"no nkey":                        {noUser + "NATS_NKEY=" + seed[:len(seed)-2], 2, "OUTBOX_NATS_NKEY"},
		"nkey of an account, in a file":  {noUser + "NATS_NKEY_FILE=" + w.file("SA"+seed[2:]), 2, "OUTBOX_NATS_NKEY_FILE"},
		"credentials without a JWT":      {noUser + "NATS_CREDS=" + w.file("-----BEGIN USER NKEY SEED-----\n"+seed+"\n------END USER NKEY SEED------\n"), 1, "OUTBOX_NATS_CREDS"},
		"credentials that are a seed":    {noUser + "NATS_CREDS=" + w.file(seed), 1, "OUTBOX_NATS_CREDS"},
		"too many ways":                  {"NATS_TOKEN=canary NATS_NKEY=" + seed, 2, "one way too many"},
	} {
		t.Run(name, func(t *testing.T) {
			changes := append(strings.Fields(c.changes), "HTTP_ADDR=")
			if strings.Contains(c.changes, "\t") {
				changes = []string{strings.ReplaceAll(c.changes, "\t", " ")}
			}
			r := testenv.StartRelay(t, w.with(changes...))
			if c.code > 0 {
				requireEnd(t, r, c.code, c.says)
			} else {
				r.WaitLog(c.says)
				requireLeaves(t, r)
			}
			w.requireHidden(name, r.Logs())
		})
	}
}

// A password that is rotated is read from its file when the relay connects again.
func TestNATSPasswordIsRotated(t *testing.T) {
	t.Parallel()
	user := testenv.RelayUser(t)
	b := setupOn(t, testenv.Postgres(t), testenv.NATSOptions{Edit: func(o *server.Options) {
		o.Users = []*server.User{user, {Username: "anybody"}}
		o.NoAuthUser = "anybody"
	}})
	file := filepath.Join(t.TempDir(), "password")
	b.must(os.WriteFile(file, []byte(user.Password+"\n"), 0o600))
	r := b.streaming("NATS_PASSWORD=", "NATS_PASSWORD_FILE="+file)
	user.Password = "second"
	b.nats.Restart()
	ids := b.insert(3)
	r.WaitLog("authorization violation")
	b.must(os.WriteFile(file, []byte("second\n"), 0o600))
	b.requireStatus("published", ids)
	b.requireStream(ids)
	requireLeaves(t, r)
}
