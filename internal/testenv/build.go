package testenv

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

var built builds

// builds has the binaries built by this test binary, each built once.
type builds struct {
	mu       sync.Mutex
	dir      string
	binaries map[string]string // package: binary
}

// RelayBinary builds the relay, once per test binary, and returns its path. It
// is there until Main ends. With RELAY_RACE=1 in the environment it has the race
// detector, and ends with code 66 on the first race.
func RelayBinary(tb testing.TB) string {
	tb.Helper()
	return binary(tb, relay)
}

const relay = "." // the relay's package

func raceDetector() bool { return os.Getenv("RELAY_RACE") == "1" }

// binary is the path of package pkg's program; pkg is an import path, or relative
// to the module's root.
func binary(tb testing.TB, pkg string) string {
	tb.Helper()
	path, err := built.get(pkg)
	if err != nil {
		tb.Fatalf("build %s: %v", pkg, err)
	}
	return path
}

func (b *builds) get(pkg string) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if path, ok := b.binaries[pkg]; ok {
		return path, nil
	}
	if b.dir == "" {
		dir, err := os.MkdirTemp("", "outbox-relay-build-")
		if err != nil {
			return "", err
		}
		b.dir, b.binaries = dir, map[string]string{}
	}
	path := filepath.Join(b.dir, fmt.Sprintf("outbox-relay-%d", len(b.binaries)))
	if err := build(pkg, path); err != nil {
		return "", err
	}
	b.binaries[pkg] = path
	return path, nil
}

func (b *builds) remove() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return os.RemoveAll(b.dir)
}

func build(pkg, output string) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	args, cgo := []string{"build", "-o", output}, "0"
	if pkg == relay && raceDetector() {
		args, cgo = append(args, "-race"), "1"
	}
	cmd := exec.Command("go", append(args, pkg)...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, bytes.TrimSpace(out))
	}
	return nil
}

// moduleRoot is the folder of go.mod: tests run in their package's folder.
func moduleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOMOD: %w", err)
	}
	mod := strings.TrimSpace(string(out))
	if mod == "" || mod == os.DevNull {
		return "", errors.New("the test does not run inside the module")
	}
	return filepath.Dir(mod), nil
}
