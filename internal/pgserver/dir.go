package pgserver

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"outbox-relay/internal/flock"
)

const dirPrefix = "outbox-relay-postgres-"

// newDir makes a cluster's folder, and locks it for as long as we live. Folders
// whose process is gone without having closed its cluster are removed.
func newDir(ctx context.Context) (string, *os.File, error) {
	root := tempRoot()
	gate, err := flock.Wait(ctx, root) // so that nobody sees a folder not yet locked
	if err != nil {
		return "", nil, err
	}
	defer gate.Close()
	removeAbandoned(root)
	dir, err := os.MkdirTemp(root, dirPrefix)
	if err != nil {
		return "", nil, err
	}
	lock, err := flock.Try(dir)
	if err != nil {
		os.RemoveAll(dir)
		return "", nil, err
	}
	return dir, lock, nil
}

func removeAbandoned(root string) {
	dirs, _ := filepath.Glob(filepath.Join(root, dirPrefix+"*")) // its only error is a bad pattern
	for _, dir := range dirs {
		if lock, err := flock.Try(dir); err == nil {
			os.RemoveAll(dir) // best effort: it is not ours to fail for
			lock.Close()
		}
	}
}

// tempRoot is the folder for temporary files that the server's user can enter.
func tempRoot() string {
	if isRoot() && !traversable(os.TempDir()) {
		return "/tmp"
	}
	return os.TempDir()
}

func isRoot() bool { return os.Geteuid() == 0 }

// traversable tells whether every user can enter dir.
func traversable(dir string) bool {
	for {
		info, err := os.Stat(dir)
		if err != nil || info.Mode().Perm()&0o001 == 0 {
			return false
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return true
		}
		dir = parent
	}
}

// serverUser is whom the server runs as: nil, ourselves, unless we are root,
// whom Postgres refuses.
func serverUser() (*syscall.Credential, error) {
	if !isRoot() {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		found, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, uidErr := strconv.ParseUint(found.Uid, 10, 32)
		gid, gidErr := strconv.ParseUint(found.Gid, 10, 32)
		if uidErr == nil && gidErr == nil && uid != 0 {
			return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
		}
	}
	return nil, fmt.Errorf("root cannot run Postgres, and there is no user postgres or nobody to run it as")
}

// give makes the server's user the owner of path.
func give(path string, to *syscall.Credential) error {
	if to == nil {
		return nil
	}
	return os.Chown(path, int(to.Uid), int(to.Gid))
}
