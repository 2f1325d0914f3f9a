// Package debian brings tests the programs of Debian's packages that they need.
// Elsewhere than on Debian and its kin, who runs the tests installs them.
package debian

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"outbox-relay/internal/cache"
)

type logFunc = func(format string, args ...any)

// Unpacked returns the path of program: from PATH, or else from the package pkg,
// which is unpacked into a cache and not installed. That is for programs that
// need nothing but the C library, and needs no root.
func Unpacked(ctx context.Context, pkg, program string, logf logFunc) (string, error) {
	if path, err := exec.LookPath(program); err == nil {
		return path, nil
	}
	dir, err := cache.Folder(ctx, "debian-"+pkg, func(work string) (string, error) {
		logf("fetching Debian's package %s, once", pkg)
		return unpack(ctx, pkg, work, logf)
	})
	if err != nil {
		return "", fmt.Errorf("%s is not in PATH: install Debian's package %s: %w", program, pkg, err)
	}
	return filepath.Join(dir, "usr", "bin", program), nil
}

// Installed returns the path of program: from PATH, or else from the package pkg,
// which root installs together with all that it depends on. Others are told to
// have that done.
func Installed(ctx context.Context, pkg, program string, logf logFunc) (string, error) {
	path, err := exec.LookPath(program)
	if err == nil {
		return path, nil
	}
	if os.Geteuid() != 0 {
		return "", fmt.Errorf("%s is not in PATH, and only root can install it: apt-get install %s", program, pkg)
	}
	logf("installing Debian's package %s, once", pkg)
	if err := install(ctx, pkg, logf); err != nil {
		return "", fmt.Errorf("%s is not in PATH: install Debian's package %s: %w", program, pkg, err)
	}
	return exec.LookPath(program)
}

// install asks for new lists only where the package can't be had by the old ones.
func install(ctx context.Context, pkg string, logf logFunc) error {
	apt := func(args ...string) error {
		cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-qq", "-y", "-o", "DPkg::Lock::Timeout=600"}, args...)...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		return cache.Run(logf, cmd)
	}
	if apt("install", "--no-install-recommends", pkg) == nil {
		return nil
	}
	if err := apt("update"); err != nil {
		return err
	}
	return apt("install", "--no-install-recommends", pkg)
}

// unpack puts the package's files below work, and returns where. Where the
// machine's lists don't have it, it asks for lists of its own: only root may renew
// those of the machine.
func unpack(ctx context.Context, pkg, work string, logf logFunc) (string, error) {
	if download(ctx, pkg, work, logf) != nil {
		own, err := update(ctx, work, logf)
		if err != nil {
			return "", err
		}
		if err := download(ctx, pkg, work, logf, own...); err != nil {
			return "", err
		}
	}
	files, err := filepath.Glob(filepath.Join(work, pkg+"_*.deb"))
	if err != nil || len(files) != 1 {
		return "", fmt.Errorf("apt-get download %s left %d files, not one", pkg, len(files))
	}
	root := filepath.Join(work, "root")
	return root, cache.Run(logf, exec.CommandContext(ctx, "dpkg-deb", "--extract", files[0], root))
}

// download puts the package's file into the folder work.
func download(ctx context.Context, pkg, work string, logf logFunc, options ...string) error {
	cmd := exec.CommandContext(ctx, "apt-get", append(options, "-qq", "download", pkg)...)
	cmd.Dir = work
	return cache.Run(logf, cmd)
}

// update fetches lists into work, and returns apt-get's options to use them.
func update(ctx context.Context, work string, logf logFunc) (options []string, err error) {
	lists, archives := filepath.Join(work, "lists"), filepath.Join(work, "archives")
	for _, dir := range []string{lists, archives} {
		if err := os.MkdirAll(filepath.Join(dir, "partial"), 0o755); err != nil {
			return nil, err
		}
	}
	options = []string{"-o", "Dir::State::Lists=" + lists, "-o", "Dir::Cache=" + work, "-o", "Dir::Cache::Archives=" + archives}
	return options, cache.Run(logf, exec.CommandContext(ctx, "apt-get", append(options, "-qq", "update")...))
}
