package pgserver

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fakeServer makes a folder with programs that say they are version.
func fakeServer(t *testing.T, version string) string {
	t.Helper()
	dir, err := os.MkdirTemp(tempRoot(), "fake-postgres-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	for _, program := range []string{"initdb", "postgres"} {
		script := "#!/bin/sh\necho 'postgres (PostgreSQL) " + version + "'\n"
		if err := os.WriteFile(filepath.Join(dir, program), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestFindNamedFolder(t *testing.T) {
	for _, test := range []struct{ version, asked, wantErr string }{
		{"17.2 (Debian 17.2-1)", "", ""},
		{"18beta1", "18", ""},
		{"17.2", "18", "holds Postgres 17, wanted 18"},
		{"14.9", "", "holds Postgres 14, wanted 15 or newer"},
		{"seventeen", "", "says"},
		{"17.2", "v17", "POSTGRES_VERSION"},
	} {
		t.Run(test.version+"/"+test.asked, func(t *testing.T) {
			bin := fakeServer(t, test.version)
			t.Setenv("POSTGRES_BIN", bin)
			t.Setenv("POSTGRES_VERSION", test.asked)
			found, err := Find(t.Context(), Options{})
			if test.wantErr == "" && (err != nil || found.Bin != bin) {
				t.Fatalf("Find = %v, %v", found, err)
			}
			if test.wantErr != "" && (err == nil || !strings.Contains(err.Error(), test.wantErr)) {
				t.Fatalf("error %v, want %q", err, test.wantErr)
			}
		})
	}
}

// TestFindThroughSymlink has in PATH only a link to initdb.
func TestFindThroughSymlink(t *testing.T) {
	bin, path := fakeServer(t, "16.1"), t.TempDir()
	if err := os.Symlink(filepath.Join(bin, "initdb"), filepath.Join(path, "initdb")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", path+":/bin")
	t.Setenv("POSTGRES_BIN", "")
	found, err := Find(t.Context(), Options{Major: 16})
	if err != nil || found != (Installation{Bin: bin, Major: 16}) {
		t.Fatalf("Find = %v, %v", found, err)
	}
}

func TestNothingToFind(t *testing.T) {
	t.Setenv("POSTGRES_BIN", "")
	t.Setenv("PATH", t.TempDir())
	_, err := Find(t.Context(), Options{Major: 99})
	if err == nil || !strings.Contains(err.Error(), "POSTGRES_BIN") {
		t.Fatalf("error without a remedy: %v", err)
	}
}
