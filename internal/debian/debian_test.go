package debian

import (
	"os/exec"
	"strings"
	"testing"
)

func TestProgramInPathIsTaken(t *testing.T) {
	want, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, find := range []func() (string, error){
		func() (string, error) { return Unpacked(t.Context(), "no-such-package", "sh", t.Logf) },
		func() (string, error) { return Installed(t.Context(), "no-such-package", "sh", t.Logf) },
	} {
		if got, err := find(); err != nil || got != want {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
	}
}

// Without apt-get in PATH nothing can be fetched, nor by others than root.
func TestErrorNamesThePackage(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, unpacked := Unpacked(t.Context(), "no-such-package", "no-such-program", t.Logf)
	_, installed := Installed(t.Context(), "no-such-package", "no-such-program", t.Logf)
	for _, err := range []error{unpacked, installed} {
		if err == nil || !strings.Contains(err.Error(), "no-such-program is not in PATH") || !strings.Contains(err.Error(), "no-such-package") {
			t.Errorf("error without a remedy: %v", err)
		}
	}
}

func TestUnpack(t *testing.T) {
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("this machine has no Debian packages")
	}
	root, err := unpack(t.Context(), "hello", t.TempDir(), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(root + "/usr/bin/hello").CombinedOutput()
	if err != nil || string(out) != "Hello, world!\n" {
		t.Errorf("the unpacked program says %q, %v", out, err)
	}
}
