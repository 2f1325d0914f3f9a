package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"outbox-relay/internal/config"
	"outbox-relay/internal/debian"
)

// unit is the systemd unit with a program that is there, and systemd-analyze.
func unit(t *testing.T) (path, analyze string) {
	t.Helper()
	analyze, err := debian.Installed(t.Context(), "systemd", "systemd-analyze", t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(readFile(t, "deploy/systemd/outbox-relay.service"), "/usr/local/bin/outbox-relay", self)
	path = filepath.Join(t.TempDir(), "outbox-relay.service")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path, analyze
}

// systemd itself reads the unit without a word. An unknown key or value is only a
// warning to it.
func TestSystemdUnit(t *testing.T) {
	path, analyze := unit(t)
	if out, err := exec.Command(analyze, "verify", "--man=no", path).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// What the service could do beside its work stays little: 1.2 of 10 by systemd 252,
// where 9.6 is a unit without any restriction.
func TestSystemdUnitIsHardened(t *testing.T) {
	path, analyze := unit(t)
	if out, err := exec.Command(analyze, "security", "--offline=true", "--no-pager", "--threshold=15", path).CombinedOutput(); err != nil {
		t.Errorf("systemd-analyze security: %v\n%s", err, out)
	}
}

// The unit's own variables are known to the relay, and its secrets are files.
func TestSystemdUnitConfiguresTheRelay(t *testing.T) {
	text := readFile(t, "deploy/systemd/outbox-relay.service")
	credentials := t.TempDir()
	for _, line := range regexp.MustCompile(`(?m)^LoadCredential=(\w+):/etc/outbox-relay/\w+$`).FindAllStringSubmatch(text, -1) {
		if err := os.WriteFile(filepath.Join(credentials, line[1]), []byte("postgres://relay:secret@db/app"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, line := range regexp.MustCompile(`(?m)^Environment=(OUTBOX_\w+)=(.*)$`).FindAllStringSubmatch(text, -1) {
		t.Setenv(line[1], strings.ReplaceAll(line[2], "%d", credentials))
	}
	cfg, err := config.Load()
	if err != nil {
		t.Fatal(err)
	}
	if url, err := cfg.Postgres.URL.Value(); err != nil || url != "postgres://relay:secret@db/app" {
		t.Errorf("the relay takes %q for its database: %v", url, err)
	}
}
