package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nkeys"
)

const (
	canary   = "s3cr3t-canary"
	validURL = "postgres://relay:" + canary + "@db:5432/shop?sslmode=disable"
)

// environ makes the OUTBOX_ variables exactly these. envconfig reads the
// process's environment, so no test that uses it runs in parallel.
func environ(t *testing.T, vars map[string]string) {
	t.Helper()
	for _, entry := range os.Environ() {
		if name, value, _ := strings.Cut(entry, "="); strings.HasPrefix(name, prefix+"_") {
			t.Setenv(name, value) // so that it comes back
			os.Unsetenv(name)
		}
	}
	for name, value := range vars {
		t.Setenv(prefix+"_"+name, value)
	}
}

// with adds to the least that is valid.
func with(vars map[string]string) map[string]string {
	all := map[string]string{"POSTGRES_URL": validURL}
	maps.Copy(all, vars)
	return all
}

func load(t *testing.T, vars map[string]string) Config {
	t.Helper()
	environ(t, with(vars))
	cfg, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// faultsOf returns what Load finds wrong, one text a fault.
func faultsOf(t *testing.T, vars map[string]string) []string {
	t.Helper()
	environ(t, vars)
	cfg, err := Load()
	if err == nil {
		t.Fatalf("no fault found: %v", cfg)
	}
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		t.Fatalf("%T is not a join of faults: %v", err, err)
	}
	var texts []string
	for _, err := range joined.Unwrap() {
		fault, ok := errors.AsType[*Fault](err)
		if !ok || !strings.HasPrefix(fault.Variable, "OUTBOX_") {
			t.Errorf("%#v does not name its variable", err)
		}
		texts = append(texts, err.Error())
	}
	if strings.Contains(err.Error(), "s3cr3t") || strings.Contains(err.Error(), "canary") {
		t.Errorf("the error shows a secret: %v", err)
	}
	return texts
}

// write makes a file and returns its path.
func write(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func seed(t *testing.T, create func() (nkeys.KeyPair, error)) string {
	t.Helper()
	pair, err := create()
	if err != nil {
		t.Fatal(err)
	}
	s, err := pair.Seed()
	if err != nil {
		t.Fatal(err)
	}
	return string(s)
}

func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func value(t *testing.T, s Secret) string {
	t.Helper()
	v, err := s.Value()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestDefaults(t *testing.T) {
	// What has our names without our prefix is somebody else's.
	t.Setenv("NATS_URL", "nats://elsewhere:4222")
	t.Setenv("LOG_LEVEL", "nonsense")
	t.Setenv("TABLE", "a.b.c")
	cfg := load(t, nil)

	equal(t, "servers", cfg.NATS.Servers.URLs(), []string{"nats://127.0.0.1:4222"})
	equal(t, "url", value(t, cfg.Postgres.URL), validURL)
	equal(t, "subject", cfg.Subject.String(), "events.{aggregate_type}.{event_type}")
	cfg.NATS.Servers, cfg.Postgres.URL, cfg.Subject = Servers{}, Secret{}, Subject{}
	equal(t, "the rest", cfg, Config{
		Postgres:         Postgres{Table: Table{"public", "events"}, Slot: "outbox_relay", Publication: "outbox_relay"},
		NATS:             NATS{InboxPrefix: "_INBOX_outbox"},
		Stream:           Stream{Name: "EVENTS", Create: true, Replicas: 1, DuplicateWindow: 2 * time.Minute},
		Headers:          HeadersCloudEvents,
		Source:           "/{database}/{slot}",
		AfterPublish:     AfterPublishMark,
		OnReject:         OnRejectPark,
		Retry:            Retry{Backoff: time.Minute},
		Backfill:         true,
		MaxInflight:      8192,
		MaxInflightBytes: 64 << 20,
		HTTP:             HTTP{Addr: "127.0.0.1:8080"},
		Log:              Log{slog.LevelInfo, LogText},
		ShutdownGrace:    10 * time.Second,
	})
}

func TestEverythingSet(t *testing.T) {
	file := write(t, "content")
	dsn := "host=a,b user=relay password='" + canary + "' dbname=shop"
	cfg := load(t, map[string]string{
		"POSTGRES_URL": " " + dsn + "\n", "TABLE": ` Shop."Out""Box" `, "SLOT": " s_1 ", "PUBLICATION": " Pub ",
		"NATS_URL": "tls://a, nats://b:4333/", "NATS_CA": file, "NATS_CERT": file, "NATS_KEY": file,
		"NATS_USER": " u ", "NATS_PASSWORD": " p ", "NATS_TLS_FIRST": "true", "NATS_DOMAIN": "hub", "NATS_INBOX_PREFIX": "_IN.relay",
		"STREAM": "Orders-1", "STREAM_CREATE": "false", "STREAM_REPLICAS": "3", "STREAM_MAX_AGE": "24h", "STREAM_DUPLICATE_WINDOW": "0",
		"SUBJECT": "shop.eu.{aggregate_type}", "HEADERS": "Minimal", "SOURCE": "urn:shop:{slot}",
		"AFTER_PUBLISH": "delete", "RETENTION": "168h", "ON_REJECT": "halt", "RETRY_ATTEMPTS": "5", "RETRY_BACKOFF": "90s", "BACKFILL": "false", "MAX_INFLIGHT": "1", "MAX_INFLIGHT_BYTES": "1GB", "CONFIRM_DELAY": "5m",
		"HTTP_ADDR": "", "LOG_LEVEL": "DEBUG", "LOG_FORMAT": "json", "SHUTDOWN_GRACE": "0",
	})
	equal(t, "url", value(t, cfg.Postgres.URL), dsn)
	equal(t, "servers", cfg.NATS.Servers.URLs(), []string{"tls://a", "nats://b:4333/"})
	equal(t, "password", value(t, cfg.NATS.Password), " p ")
	equal(t, "subject", cfg.Subject.Wildcard(), "shop.eu.*")
	cfg.NATS.Servers, cfg.Postgres.URL, cfg.NATS.Password, cfg.Subject = Servers{}, Secret{}, Secret{}, Subject{}
	equal(t, "the rest", cfg, Config{
		Postgres: Postgres{Table: Table{"shop", `Out"Box`}, Slot: "s_1", Publication: "Pub"},
		NATS: NATS{CA: file, Cert: file, Key: file, User: " u ", TLSFirst: true, Domain: "hub",
			InboxPrefix: "_IN.relay"},
		Stream:           Stream{Name: "Orders-1", Replicas: 3, MaxAge: 24 * time.Hour},
		Headers:          HeadersMinimal,
		Source:           "urn:shop:{slot}",
		AfterPublish:     AfterPublishDelete,
		Retention:        7 * 24 * time.Hour,
		OnReject:         OnRejectHalt,
		Retry:            Retry{Attempts: 5, Backoff: 90 * time.Second},
		MaxInflight:      1,
		MaxInflightBytes: 1e9,
		ConfirmDelay:     5 * time.Minute,
		Log:              Log{slog.LevelDebug, LogJSON},
	})
}

func TestFaults(t *testing.T) {
	file, empty := write(t, "content"), write(t, "")
	type vars = map[string]string
	for _, test := range []struct {
		name string
		vars vars
		want []string
	}{
		{"required, empty", vars{"POSTGRES_URL": ""}, []string{"OUTBOX_POSTGRES_URL is not set: set it, or OUTBOX_POSTGRES_URL_FILE"}},
		{"required, blank", vars{"POSTGRES_URL": " "}, []string{"OUTBOX_POSTGRES_URL is nothing but white space"}},
		{"not a url", vars{"POSTGRES_URL": "mysql://u:" + canary + "@db/x"}, []string{"OUTBOX_POSTGRES_URL is not a usable connection string"}},
		{"detail kept", vars{"POSTGRES_URL": "postgres://u:" + canary + "@db/x?sslmode=sometimes"}, []string{"OUTBOX_POSTGRES_URL is not a usable connection string: failed to configure TLS (sslmode is invalid); write postgres://"}},
		{"value and file", vars{"POSTGRES_URL_FILE": file}, []string{"OUTBOX_POSTGRES_URL and OUTBOX_POSTGRES_URL_FILE are both set"}},
		{"file missing", vars{"POSTGRES_URL": "", "POSTGRES_URL_FILE": "/nowhere/" + canary}, []string{"OUTBOX_POSTGRES_URL_FILE names a file that cannot be read: no such file"}},
		{"file empty", vars{"POSTGRES_URL": "", "POSTGRES_URL_FILE": empty}, []string{"OUTBOX_POSTGRES_URL_FILE names a file that is empty"}},
		{"file a directory", vars{"NATS_TOKEN_FILE": t.TempDir()}, []string{"OUTBOX_NATS_TOKEN_FILE names a file that cannot be read: is a directory"}},
		{"file holds only a newline", vars{"NATS_TOKEN_FILE": write(t, "\n")}, []string{"OUTBOX_NATS_TOKEN_FILE names a file that is empty"}},
		{"file holds no url", vars{"POSTGRES_URL": "", "POSTGRES_URL_FILE": write(t, canary)}, []string{"OUTBOX_POSTGRES_URL_FILE names a file whose value is not a usable connection string"}},
		{"table, empty", vars{"TABLE": ""}, []string{"OUTBOX_TABLE is empty: set it, or unset it for the default public.events"}},
		{"table", vars{"TABLE": "a.b.c"}, []string{`OUTBOX_TABLE is "a.b.c", which has more than two names`}},
		{"slot", vars{"SLOT": "Slot-1"}, []string{`OUTBOX_SLOT is "Slot-1": a slot's name`}},
		{"slot too long", vars{"SLOT": strings.Repeat("s", 64)}, []string{"OUTBOX_SLOT is"}},
		{"slot, blank", vars{"SLOT": "  "}, []string{"OUTBOX_SLOT is empty"}},
		{"publication", vars{"PUBLICATION": strings.Repeat("ü", 32)}, []string{"OUTBOX_PUBLICATION has 64 bytes"}},
		{"publication, control", vars{"PUBLICATION": "a\tb"}, []string{`OUTBOX_PUBLICATION is "a\tb"`}},
		{"servers, all reported", vars{"NATS_URL": "nats://a,,b:1,http://c,nats://,nats://d:0,nats://e/x,nats://u:" + canary + "%zz@f"}, []string{
			"server 2 is empty: remove the extra comma; server 3 has no scheme: write nats://host:4222; server 4 has another scheme than nats or tls; " +
				"server 5 has no host: write nats://host:4222; server 6 has a port that is not 1 to 65535; server 7 goes on after the port"}},
		{"servers, websocket", vars{"NATS_URL": "nats://a,wss://b"}, []string{"server 2 has another scheme than nats or tls"}},
		{"servers, stranded password", vars{"NATS_URL": "nats://u:12/" + canary + "@b"}, []string{"server 1 goes on after the port"}},
		{"creds missing", vars{"NATS_CREDS": "/nowhere/" + canary}, []string{"OUTBOX_NATS_CREDS names a file that cannot be read"}},
		{"ca empty", vars{"NATS_CA": empty}, []string{"OUTBOX_NATS_CA names an empty file"}},
		{"cert alone", vars{"NATS_CERT": file}, []string{"OUTBOX_NATS_CERT is set without OUTBOX_NATS_KEY"}},
		{"key alone", vars{"NATS_KEY": file}, []string{"OUTBOX_NATS_KEY is set without OUTBOX_NATS_CERT"}},
		{"seed", vars{"NATS_NKEY": canary}, []string{"OUTBOX_NATS_NKEY is not the seed of a user nkey"}},
		{"seed of an account", vars{"NATS_NKEY": seed(t, nkeys.CreateAccount)}, []string{"OUTBOX_NATS_NKEY is not the seed of a user nkey"}},
		{"seed in a file", vars{"NATS_NKEY_FILE": write(t, canary)}, []string{"OUTBOX_NATS_NKEY_FILE names a file whose value is not the seed"}},
		{"password alone", vars{"NATS_PASSWORD": canary}, []string{"OUTBOX_NATS_PASSWORD is set without OUTBOX_NATS_USER"}},
		{"password file alone", vars{"NATS_PASSWORD_FILE": write(t, canary)}, []string{"OUTBOX_NATS_PASSWORD_FILE is set without OUTBOX_NATS_USER"}},
		{"password twice", vars{"NATS_USER": "u", "NATS_PASSWORD": canary, "NATS_PASSWORD_FILE": file}, []string{"OUTBOX_NATS_PASSWORD and OUTBOX_NATS_PASSWORD_FILE are both set"}},
		{"two methods", vars{"NATS_CREDS": file, "NATS_TOKEN": canary}, []string{"keep one of OUTBOX_NATS_CREDS or OUTBOX_NATS_TOKEN"}},
		{"all methods", vars{"NATS_URL": "nats://u:" + canary + "@a", "NATS_CREDS": file, "NATS_NKEY": seed(t, nkeys.CreateUser), "NATS_USER": "u", "NATS_PASSWORD": canary, "NATS_TOKEN": canary},
			[]string{"keep one of user information in OUTBOX_NATS_URL, OUTBOX_NATS_CREDS, OUTBOX_NATS_NKEY, OUTBOX_NATS_USER or OUTBOX_NATS_TOKEN"}},
		{"bool", vars{"NATS_TLS_FIRST": "yes"}, []string{`OUTBOX_NATS_TLS_FIRST is "yes": it can be true or false`}},
		{"domain", vars{"NATS_DOMAIN": "a.b"}, []string{`OUTBOX_NATS_DOMAIN is "a.b"`}},
		{"inbox prefix", vars{"NATS_INBOX_PREFIX": "a..b"}, []string{`OUTBOX_NATS_INBOX_PREFIX is "a..b"`}},
		{"inbox prefix, wildcard", vars{"NATS_INBOX_PREFIX": "a.>"}, []string{`OUTBOX_NATS_INBOX_PREFIX is "a.>"`}},
		{"inbox prefix, empty", vars{"NATS_INBOX_PREFIX": ""}, []string{"OUTBOX_NATS_INBOX_PREFIX is empty"}},
		{"stream", vars{"STREAM": "a b"}, []string{`OUTBOX_STREAM is "a b"`}},
		{"stream, unprintable", vars{"STREAM": "a\x01"}, []string{`OUTBOX_STREAM is "a\x01"`}},
		{"stream, too long", vars{"STREAM": strings.Repeat("a", 256)}, []string{"OUTBOX_STREAM has 256 bytes"}},
		{"replicas", vars{"STREAM_REPLICAS": "6"}, []string{`OUTBOX_STREAM_REPLICAS is "6": write a whole number from 1 to 5`}},
		{"duration without unit", vars{"STREAM_MAX_AGE": "10"}, []string{`OUTBOX_STREAM_MAX_AGE is "10": write a duration with its unit`}},
		{"duration below the server's", vars{"STREAM_MAX_AGE": "5ms"}, []string{"OUTBOX_STREAM_MAX_AGE"}},
		{"duration, negative", vars{"SHUTDOWN_GRACE": "-1s"}, []string{"OUTBOX_SHUTDOWN_GRACE is \"-1s\": a duration is not negative"}},
		{"window over age", vars{"STREAM_MAX_AGE": "1m"}, []string{"OUTBOX_STREAM_DUPLICATE_WINDOW is 2m0s, longer than OUTBOX_STREAM_MAX_AGE, 1m0s"}},
		{"confirm delay", vars{"CONFIRM_DELAY": "180"}, []string{`OUTBOX_CONFIRM_DELAY is "180": write a duration with its unit`}},
		{"subject", vars{"SUBJECT": "{a}.b"}, []string{"OUTBOX_SUBJECT is \"{a}.b\", whose first token is a column"}},
		{"headers", vars{"HEADERS": "all"}, []string{`OUTBOX_HEADERS is "all": it can be cloudevents or minimal`}},
		{"source", vars{"SOURCE": "/{table}"}, []string{`OUTBOX_SOURCE is "/{table}": its placeholders are {database} and {slot}`}},
		{"source, not a uri", vars{"SOURCE": "/a b"}, []string{`OUTBOX_SOURCE is "/a b": a CloudEvents source is a URI`}},
		{"after publish", vars{"AFTER_PUBLISH": "drop"}, []string{`OUTBOX_AFTER_PUBLISH is "drop": it can be mark, delete or keep`}},
		{"retention", vars{"RETENTION": "7d"}, []string{`OUTBOX_RETENTION is "7d": write a duration with its unit`}},
		{"retention of nothing", vars{"RETENTION": "1h", "AFTER_PUBLISH": "keep"}, []string{"OUTBOX_RETENTION is 1h0m0s, and OUTBOX_AFTER_PUBLISH=keep marks no row published: unset one of them"}},
		{"retries", vars{"RETRY_ATTEMPTS": "101"}, []string{`OUTBOX_RETRY_ATTEMPTS is "101": write a whole number from 0 to 100`}},
		{"backoff", vars{"RETRY_BACKOFF": "0"}, []string{`OUTBOX_RETRY_BACKOFF is "0": it must be at least 1s`}},
		{"backfill", vars{"BACKFILL": "yes"}, []string{`OUTBOX_BACKFILL is "yes": it can be true or false`}},
		{"on reject", vars{"ON_REJECT": "skip"}, []string{`OUTBOX_ON_REJECT is "skip": it can be park or halt`}},
		{"inflight", vars{"MAX_INFLIGHT": "0"}, []string{"OUTBOX_MAX_INFLIGHT is \"0\": write a whole number from 1 to 65536"}},
		{"inflight bytes", vars{"MAX_INFLIGHT_BYTES": "1MB"}, []string{"OUTBOX_MAX_INFLIGHT_BYTES is \"1MB\": it must be at least 1MiB"}},
		{"size", vars{"MAX_INFLIGHT_BYTES": "64M"}, []string{"OUTBOX_MAX_INFLIGHT_BYTES is \"64M\": write a size"}},
		{"http", vars{"HTTP_ADDR": "8080"}, []string{`OUTBOX_HTTP_ADDR is "8080": write host:port`}},
		{"level", vars{"LOG_LEVEL": "trace"}, []string{`OUTBOX_LOG_LEVEL is "trace": it can be debug, info, warn or error`}},
		{"format", vars{"LOG_FORMAT": "xml"}, []string{"OUTBOX_LOG_FORMAT"}},
		{"typing error", vars{"STREM": canary}, []string{"OUTBOX_STREM is not known: a typing error? did you mean OUTBOX_STREAM"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := faultsOf(t, with(test.vars))
			if len(got) != len(test.want) {
				t.Fatalf("got %d faults, want %d: %q", len(got), len(test.want), got)
			}
			for i, want := range test.want {
				if !strings.Contains(got[i], want) {
					t.Errorf("got %q, want %q", got[i], want)
				}
			}
		})
	}
}

func TestEveryFaultAtOnce(t *testing.T) {
	vars := make(map[string]string)
	for _, v := range Variables() {
		switch name := strings.TrimPrefix(v.Name, "OUTBOX_"); name {
		case "PUBLICATION", "NATS_USER", "NATS_PASSWORD", "NATS_TOKEN": // any text does
		case "POSTGRES_URL", "NATS_URL", "NATS_NKEY":
			vars[name] = "*{ " + canary
		default:
			if !strings.HasSuffix(name, "_FILE") {
				vars[name] = "*{ wrong"
			}
		}
	}
	got := faultsOf(t, vars)
	if len(got) != len(vars)+1 { // one more: creds beside the nkey
		t.Errorf("%d faults for %d wrong variables:\n%s", len(got), len(vars), strings.Join(got, "\n"))
	}
}

func TestUnsetRequired(t *testing.T) {
	got := faultsOf(t, nil)
	equal(t, "faults", got, []string{"OUTBOX_POSTGRES_URL is not set: set it, or OUTBOX_POSTGRES_URL_FILE"})
}

func TestRotatedPostgresURLIsChecked(t *testing.T) {
	path := write(t, validURL)
	cfg := load(t, map[string]string{"POSTGRES_URL": "", "POSTGRES_URL_FILE": path})
	if err := os.WriteFile(path, []byte("postgres://u:p@"+canary+"@h/db"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := cfg.Postgres.URL.Value()
	if err == nil || strings.Contains(err.Error(), canary) || !strings.Contains(err.Error(), "%XX") {
		t.Errorf("a rotated URL with an unescaped @ gave %v", err)
	}
}

func TestPrintedConfigShowsNoSecret(t *testing.T) {
	cfg := load(t, map[string]string{"NATS_URL": "nats://u:" + canary + "@a:1,tls://" + canary + "@b"})
	cfg.NATS.Token = NewSecret(canary)
	var b bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d", "%p", "%t"} {
		fmt.Fprintf(&b, verb+"\n", cfg)
		fmt.Fprintf(&b, verb+"\n", struct{ s Secret }{cfg.NATS.Token}) // unexported: fmt calls no method
		fmt.Fprintf(&b, verb+"\n", struct{ s Servers }{cfg.NATS.Servers})
	}
	logger := slog.New(slog.NewTextHandler(&b, nil))
	logger.Info("", "cfg", cfg, "secret", cfg.NATS.Token, "servers", cfg.NATS.Servers)
	slog.New(slog.NewJSONHandler(&b, nil)).Info("", "cfg", cfg, "secret", cfg.NATS.Token)
	text, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.Write(text)
	if s := b.String(); strings.Contains(s, canary) || strings.Contains(s, fmt.Sprintf("%x", canary)) {
		t.Errorf("shown: %s", s)
	}
	equal(t, "servers", cfg.NATS.Servers.String(), "nats://[redacted]@a:1,tls://[redacted]@b")
	equal(t, "secret", cfg.NATS.Token.String(), redacted)
	equal(t, "no secret", Secret{}.String(), "")
}

func TestSecretIsReadAnew(t *testing.T) {
	path := write(t, " one \r\n")
	cfg := load(t, map[string]string{"NATS_USER": "u", "NATS_PASSWORD_FILE": path})
	equal(t, "first", value(t, cfg.NATS.Password), " one ")

	if err := os.WriteFile(path, []byte("two\n\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	equal(t, "rotated", value(t, cfg.NATS.Password), "two\n")

	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if v, err := cfg.NATS.Password.Value(); err == nil {
		t.Errorf("an empty file gave %q", v)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	_, err := cfg.NATS.Password.Value()
	if err == nil || strings.Contains(err.Error(), path) {
		t.Errorf("a missing file gave %v", err)
	}
}

func TestSecretFiles(t *testing.T) {
	user := seed(t, nkeys.CreateUser)
	cfg := load(t, map[string]string{
		"POSTGRES_URL": "", "POSTGRES_URL_FILE": write(t, validURL+"\n"),
		"NATS_NKEY_FILE": write(t, user+"\n\n"),
	})
	equal(t, "url", value(t, cfg.Postgres.URL), validURL)
	equal(t, "seed", value(t, cfg.NATS.NKey), user)
	equal(t, "token set", cfg.NATS.Token.IsSet(), false)
	equal(t, "token", value(t, cfg.NATS.Token), "")
}
