package config

import (
	"os"
	"strings"
	"testing"
)

func TestVariables(t *testing.T) {
	t.Parallel()
	var names []string
	for _, v := range Variables() {
		names = append(names, strings.TrimPrefix(v.Name, "OUTBOX_"))
		if v.Meaning == "" {
			t.Errorf("%s has no meaning", v.Name)
		}
	}
	// The contract; a name here is never changed.
	equal(t, "names", names, strings.Fields(`
		POSTGRES_URL POSTGRES_URL_FILE TABLE
		COLUMN_ID COLUMN_AGGREGATE_TYPE COLUMN_AGGREGATE_ID COLUMN_EVENT_TYPE COLUMN_PAYLOAD COLUMN_HEADERS COLUMN_CREATED_AT
		SLOT PUBLICATION
		NATS_URL NATS_CREDS NATS_CA NATS_CERT NATS_KEY NATS_NKEY NATS_NKEY_FILE NATS_USER NATS_PASSWORD NATS_PASSWORD_FILE
		NATS_TOKEN NATS_TOKEN_FILE NATS_TLS_FIRST NATS_DOMAIN NATS_INBOX_PREFIX
		STREAM STREAM_CREATE STREAM_REPLICAS STREAM_MAX_AGE STREAM_DUPLICATE_WINDOW
		SUBJECT HEADERS SOURCE AFTER_PUBLISH RETENTION ON_REJECT RETRY_ATTEMPTS RETRY_BACKOFF BACKFILL MAX_INFLIGHT MAX_INFLIGHT_BYTES CONFIRM_DELAY
		HTTP_ADDR HTTP_TOKEN HTTP_TOKEN_FILE HTTP_DEBUG LOG_LEVEL LOG_FORMAT SHUTDOWN_GRACE`))
	equal(t, "first", Variables()[0], Variable{"OUTBOX_POSTGRES_URL", "required", "URL or DSN of the database; several hosts allowed"})
}

func TestUsage(t *testing.T) {
	t.Parallel()
	lines := strings.Split(strings.TrimSuffix(Usage(), "\n"), "\n")
	for i, v := range Variables() {
		line := strings.Join(strings.Fields(lines[i+1]), " ")
		want := strings.Join(strings.Fields(v.Name+" "+v.Default+" "+v.Meaning), " ")
		equal(t, v.Name, line, want)
	}
}

func TestUnknown(t *testing.T) {
	t.Parallel()
	found := unknown([]string{
		"OUTBOX_TABEL=x", "OUTBOX_NATS_URLS=x", "OUTBOX_MAX_INFLIGT_BYTES=x", "OUTBOX_Slot=x", "OUTBOX_FROBNICATE=x", "OUTBOX_X=x", "OUTBOX_=x",
		"OUTBOX_PORT=8080", "OUTBOX_COLUMN_=x",
		"OUTBOX=x", "outbox_slot=x", "NATS_URL=x", "MY_OUTBOX_SLOTT=x", "OUTBOX_SLOT=x",
		// Kubernetes, for Services named outbox and outbox-relay
		"OUTBOX_SERVICE_HOST=10.0.0.1", "OUTBOX_SERVICE_PORT=80", "OUTBOX_PORT=tcp://10.0.0.1:80",
		"OUTBOX_RELAY_SERVICE_HOST=10.0.0.1", "OUTBOX_RELAY_SERVICE_PORT=80", "OUTBOX_RELAY_SERVICE_PORT_HTTP=80",
		"OUTBOX_RELAY_PORT=tcp://10.0.0.1:80", "OUTBOX_RELAY_PORT_80_TCP=tcp://10.0.0.1:80", "OUTBOX_RELAY_PORT_80_TCP_PROTO=tcp",
		"OUTBOX_RELAY_PORT_80_TCP_PORT=80", "OUTBOX_RELAY_PORT_80_TCP_ADDR=10.0.0.1",
	}, Variables())
	var got []string
	for _, err := range found {
		got = append(got, err.Error())
	}
	const none = " is not known: unset it, or see outbox-relay help for the variables there are"
	const near = " is not known: a typing error? did you mean OUTBOX_"
	equal(t, "faults", strings.Join(got, "\n"), strings.Join([]string{
		"OUTBOX_" + none,
		"OUTBOX_COLUMN_" + near + "COLUMN_ID",
		"OUTBOX_FROBNICATE" + none,
		"OUTBOX_MAX_INFLIGT_BYTES" + near + "MAX_INFLIGHT_BYTES",
		"OUTBOX_NATS_URLS" + near + "NATS_URL",
		"OUTBOX_PORT" + none,
		"OUTBOX_Slot" + near + "SLOT",
		"OUTBOX_TABEL" + near + "TABLE",
		"OUTBOX_X" + none,
	}, "\n"))
}

func TestEditDistance(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"abc", "abc", 0}, {"kitten", "sitting", 3}, {"flaw", "lawn", 2}} {
		if got := editDistance(test.a, test.b); got != test.want {
			t.Errorf("%s, %s: got %d, want %d", test.a, test.b, got, test.want)
		}
	}
}

// A row of the page's table is | `NAME` | `default` | meaning |. What follows the
// meaning there is free.
func TestPageHasEveryVariable(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := make(map[string]string)
	for line := range strings.Lines(string(page)) {
		if strings.HasPrefix(line, "| `OUTBOX_") {
			name, _, _ := strings.Cut(strings.TrimPrefix(line, "| `"), "`")
			rows[name] = line
		}
	}
	for _, v := range Variables() {
		def := v.Default
		if def != "" && def != "required" {
			def = "`" + def + "`"
		}
		want := strings.ReplaceAll("| `"+v.Name+"` | "+def+" | "+v.Meaning, "|  |", "| |")
		if !strings.HasPrefix(rows[v.Name], want) {
			t.Errorf("docs/configuration.md: got %q, want %s |", rows[v.Name], want)
		}
		delete(rows, v.Name)
	}
	for name := range rows {
		t.Errorf("docs/configuration.md has %s, which Load does not read", name)
	}
}
