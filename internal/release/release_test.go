package main

import (
	"archive/tar"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// host is the only platform that the tests build for: the others differ in what
// the compiler is told, and cost as much again.
const host = runtime.GOOS + "/" + runtime.GOARCH

// checkout clones the repository into a folder, and tags it.
func checkout(t *testing.T, folder string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), folder)
	for _, args := range [][]string{
		{"clone", "--quiet", "--no-hardlinks", filepath.Join("..", ".."), dir},
		{"-C", dir, "tag", "--force", "v9.8.7"},
	} {
		if out, err := exec.Command("git", args...).CombinedOutput(); err != nil {
			t.Fatalf("git %s: %v\n%s", args[0], err, out)
		}
	}
	return dir
}

func released(t *testing.T, source string) (files map[string][]byte) {
	t.Helper()
	r := release{source: source, out: filepath.Join(t.TempDir(), "dist")}
	if err := r.run(t.Context(), []string{host}); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(r.out)
	if err != nil {
		t.Fatal(err)
	}
	files = map[string][]byte{}
	for _, entry := range entries {
		if files[entry.Name()], err = os.ReadFile(filepath.Join(r.out, entry.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

func TestRelease(t *testing.T) {
	files := released(t, checkout(t, "a"))
	name := "outbox-relay_v9.8.7_" + strings.ReplaceAll(host, "/", "_")
	requireSums(t, files, name)
	requireMaterials(t, files[name+".cdx.json"])
	requireArchive(t, files[name+".tar.gz"], name)

	again := released(t, checkout(t, "another/and deeper"))
	if len(files) != 3 || len(again) != 3 {
		t.Errorf("%d and %d files, want 3", len(files), len(again))
	}
	for name, content := range files {
		if !slices.Equal(content, again[name]) {
			t.Errorf("%s is not the same, built elsewhere", name)
		}
	}
}

func requireSums(t *testing.T, files map[string][]byte, name string) {
	t.Helper()
	want := ""
	for _, suffix := range []string{".tar.gz", ".cdx.json"} {
		want += fmt.Sprintf("%x  %s\n", sha256.Sum256(files[name+suffix]), name+suffix)
	}
	if got := string(files["SHA256SUMS"]); got != want {
		t.Errorf("SHA256SUMS:\n%swant:\n%s", got, want)
	}
}

// requireMaterials checks that the bill names the version and a library, and none
// that only tests link.
func requireMaterials(t *testing.T, text []byte) {
	t.Helper()
	type component struct{ Name, Version string }
	var bill struct {
		BOMFormat  string
		Metadata   struct{ Component component }
		Components []component
	}
	if err := json.Unmarshal(text, &bill); err != nil {
		t.Fatal(err)
	}
	if bill.BOMFormat != "CycloneDX" || bill.Metadata.Component != (component{"outbox-relay", "v9.8.7"}) {
		t.Errorf("the bill is a %s of %v", bill.BOMFormat, bill.Metadata.Component)
	}
	has := func(name string) bool {
		return slices.ContainsFunc(bill.Components, func(c component) bool { return c.Name == name && c.Version != "" })
	}
	if !has("github.com/jackc/pgx/v5") || !has("std") || has("github.com/nats-io/nats-server/v2") {
		t.Errorf("the components are %v", bill.Components)
	}
}

// requireArchive unpacks the archive and runs what is in it.
func requireArchive(t *testing.T, packed []byte, folder string) {
	t.Helper()
	path, names := unpack(t, packed)
	want := []string{"outbox-relay", "LICENSE", "README.md", "CHANGELOG.md"}
	if runtime.GOOS == "linux" {
		want = append(want, "outbox-relay.service")
	}
	for i := range want {
		want[i] = folder + "/" + want[i]
	}
	if !slices.Equal(names, want) {
		t.Errorf("the archive has %v", names)
	}
	out, err := exec.Command(filepath.Join(path, folder, "outbox-relay"), "version").Output()
	lines := strings.Split(string(out), "\n")
	commit, _ := exec.Command("git", "rev-parse", "HEAD").Output()
	if err != nil || lines[0] != "outbox-relay v9.8.7" || lines[1] != "commit "+strings.TrimSpace(string(commit)) {
		t.Errorf("the released binary says %q: %v", out, err)
	}
}

func unpack(t *testing.T, packed []byte) (root string, names []string) {
	t.Helper()
	root = t.TempDir()
	stream, err := gzip.NewReader(strings.NewReader(string(packed)))
	if err != nil {
		t.Fatal(err)
	}
	for files := tar.NewReader(stream); ; {
		header, err := files.Next()
		if errors.Is(err, io.EOF) {
			return root, names
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, header.Name)
		content, err := io.ReadAll(files)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(root, header.Name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, content, header.FileInfo().Mode())); err != nil {
			t.Fatal(err)
		}
	}
}
