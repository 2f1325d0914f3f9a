// Package cache keeps what is fetched once for all checkouts of a machine: the
// servers and programs that tests and the demo need.
package cache

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"outbox-relay/internal/flock"
)

// Folder returns the folder name of the cache, which every user can read. Where
// there is none, fill is given an empty folder to work in, and returns what to
// keep: that, or a folder in it. However many processes ask at the same time, one
// of them fills it, and it is there whole or not at all.
func Folder(ctx context.Context, name string, fill func(work string) (string, error)) (string, error) {
	cache, err := dir()
	if err != nil {
		return "", fmt.Errorf("cache of what is fetched: %w", err)
	}
	target := filepath.Join(cache, name)
	if exists(target) {
		return target, nil
	}
	lock, err := flock.Wait(ctx, cache)
	if err != nil {
		return "", fmt.Errorf("wait for another process's download: %w", err)
	}
	defer lock.Close()
	if exists(target) {
		return target, nil
	}
	work := filepath.Join(cache, "unfinished")
	defer os.RemoveAll(work)
	if err := freshDir(work); err != nil {
		return "", err
	}
	made, err := fill(work)
	if err != nil {
		return "", err
	}
	if err := filepath.WalkDir(made, makeReadable); err != nil {
		return "", err
	}
	return target, os.Rename(made, target)
}

// dir makes the cache. Root's home is closed to the user who will run a fetched
// server, so root has a folder that others can read.
func dir() (string, error) {
	dir := "/var/cache/outbox-relay"
	if os.Geteuid() != 0 {
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

func freshDir(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Mkdir(dir, 0o755)
}

// makeReadable opens a tree to other users, whatever our umask.
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

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
