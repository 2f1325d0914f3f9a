// Command release builds what is published of a version: for each platform the
// static binary with its licence and documents in an archive, its bill of
// materials, and the checksums of all. The same commit and Go give the same bytes,
// wherever the checkout lies.
package main

import (
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const sbomTool = "github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.10.0"

func main() {
	r := release{}
	flag.StringVar(&r.source, "source", ".", "the checkout")
	flag.StringVar(&r.out, "out", "dist", "the folder to make")
	targets := flag.String("targets", "linux/amd64,linux/arm64,darwin/amd64,darwin/arm64", "platforms")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := r.run(ctx, strings.Split(*targets, ",")); err != nil {
		fmt.Fprintf(os.Stderr, "release: %s\n", err)
		os.Exit(1)
	}
}

type release struct {
	source, out string
	version     string    // of the tag, or of what git makes of the commit
	commit      string    // with its changes, if there are any
	time        time.Time // of all files: SOURCE_DATE_EPOCH, or that of the commit
	sums        strings.Builder
}

func (r *release) run(ctx context.Context, targets []string) (err error) {
	if r.out, err = filepath.Abs(r.out); err != nil {
		return err
	}
	if err := r.identify(ctx); err != nil {
		return err
	}
	if err := os.RemoveAll(r.out); err != nil {
		return err
	}
	if err := os.MkdirAll(r.out, 0o755); err != nil {
		return err
	}
	for _, target := range targets {
		if err := r.build(ctx, target); err != nil {
			return fmt.Errorf("%s: %w", target, err)
		}
	}
	return os.WriteFile(filepath.Join(r.out, "SHA256SUMS"), []byte(r.sums.String()), 0o644)
}

// identify asks git which version this is, and of when.
func (r *release) identify(ctx context.Context) (err error) {
	if r.version, err = r.git(ctx, "describe", "--tags", "--always", "--dirty"); err != nil {
		return err
	}
	if r.commit, err = r.git(ctx, "rev-parse", "HEAD"); err != nil {
		return err
	}
	if strings.HasSuffix(r.version, "-dirty") {
		r.commit += " with changes"
	}
	epoch := os.Getenv("SOURCE_DATE_EPOCH")
	if epoch == "" {
		if epoch, err = r.git(ctx, "log", "-1", "--format=%ct"); err != nil {
			return err
		}
	}
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH: %w: give seconds since 1970", err)
	}
	r.time = time.Unix(seconds, 0).UTC()
	return nil
}

func (r *release) git(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Dir, cmd.Stderr = r.source, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("git %s: %w", args[0], err)
	}
	return strings.TrimSpace(string(out)), nil
}

// build makes the archive and the bill of materials of a platform.
func (r *release) build(ctx context.Context, target string) error {
	system, arch, ok := strings.Cut(target, "/")
	if !ok {
		return fmt.Errorf("is no platform such as linux/amd64")
	}
	name := strings.Join([]string{"outbox-relay", r.version, system, arch}, "_")
	work, err := os.MkdirTemp("", "outbox-relay-release-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	binary := filepath.Join(work, "outbox-relay")
	if err := r.compile(ctx, binary, system, arch); err != nil {
		return err
	}
	if err := r.publish(name+".tar.gz", func(path string) error { return r.archive(path, name, binary, system) }); err != nil {
		return err
	}
	return r.publish(name+".cdx.json", func(path string) error { return r.materials(ctx, binary, path) })
}

// compile sets all that changes what the compiler makes. What Go says itself of
// the checkout differs between a clone and a worktree: version and commit are
// given instead.
func (r *release) compile(ctx context.Context, binary, system, arch string) error {
	flags := fmt.Sprintf("-s -w -buildid= -X main.version=%s -X 'main.commit=%s'", r.version, r.commit)
	return r.gotool(ctx, []string{"CGO_ENABLED=0", "GOOS=" + system, "GOARCH=" + arch, "GOAMD64=v1", "GOARM64=v8.0", "GOEXPERIMENT="},
		"build", "-trimpath", "-buildvcs=false", "-ldflags", flags, "-o", binary, ".")
}

// materials lists the modules in the binary.
func (r *release) materials(ctx context.Context, binary, path string) error {
	return r.gotool(ctx, []string{"CGO_ENABLED=0"}, "run", "-trimpath", sbomTool, "bin", "-json", "-std", "-noserial", "-notimestamp",
		"-version", r.version, "-output", path, binary)
}

func (r *release) gotool(ctx context.Context, env []string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Env, cmd.Stderr = r.source, append(append(os.Environ(), "GOFLAGS="), env...), os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go %s: %w", args[0], err)
	}
	return nil
}

// publish makes a file of the release, and adds its checksum.
func (r *release) publish(name string, write func(path string) error) error {
	path := filepath.Join(r.out, name)
	if err := write(path); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	fmt.Fprintf(&r.sums, "%x  %s\n", sha256.Sum256(content), name)
	return nil
}
