package pgserver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
)

// oldest is the first supported major version: 14 sends every transaction of
// other tables as an empty BEGIN/COMMIT pair.
const oldest = 15

// Installation is a folder with initdb and postgres in it.
type Installation struct {
	Bin   string // the folder, symlinks resolved
	Major int    // 15, 16, ...
}

// Find looks for a Postgres server: in the folder named by the environment
// variable POSTGRES_BIN and nowhere else if that is set; in PATH; in the usual
// folders of distributions, newest first; and at last by npm, which downloads
// about 25 MB into a cache. Options.Major, else the environment variable
// POSTGRES_VERSION, asks for one major version; without it the first one found
// that is 15 or newer will do.
func Find(ctx context.Context, o Options) (Installation, error) {
	major, err := wantedMajor(o)
	if err != nil {
		return Installation{}, err
	}
	if bin := os.Getenv("POSTGRES_BIN"); bin != "" {
		return findNamed(ctx, bin, major)
	}
	for _, bin := range slices.Concat(binsInPath(), usualBins()) {
		if found, err := inspect(ctx, bin); err == nil && found.fits(major) {
			return found, nil
		}
	}
	return findFetched(ctx, major, o.logf())
}

// wantedMajor is the version asked for, 0 for any.
func wantedMajor(o Options) (int, error) {
	if o.Major != 0 {
		return o.Major, nil
	}
	env := os.Getenv("POSTGRES_VERSION")
	if env == "" {
		return 0, nil
	}
	major, err := strconv.Atoi(env)
	if err != nil || major < oldest {
		return 0, fmt.Errorf("POSTGRES_VERSION=%q: give a major version, %d or newer", env, oldest)
	}
	return major, nil
}

func findNamed(ctx context.Context, bin string, major int) (Installation, error) {
	found, err := inspect(ctx, bin)
	if err != nil {
		return Installation{}, fmt.Errorf("POSTGRES_BIN=%s: %w", bin, err)
	}
	if !found.fits(major) {
		return Installation{}, fmt.Errorf("POSTGRES_BIN=%s holds Postgres %d, wanted %s", bin, found.Major, wanted(major))
	}
	return found, nil
}

func findFetched(ctx context.Context, major int, logf logFunc) (Installation, error) {
	bin, err := fetch(ctx, major, logf)
	if err != nil {
		return Installation{}, fmt.Errorf("no Postgres %s here (set POSTGRES_BIN to its bin folder): %w", wanted(major), err)
	}
	found, err := inspect(ctx, bin)
	if err != nil {
		return Installation{}, fmt.Errorf("fetched Postgres in %s: %w", bin, err)
	}
	return found, nil
}

func wanted(major int) string {
	if major == 0 {
		return strconv.Itoa(oldest) + " or newer"
	}
	return strconv.Itoa(major)
}

func (i Installation) fits(major int) bool {
	return i.Major == major || major == 0 && i.Major >= oldest
}

// binsInPath resolves symlinks: initdb in PATH may be a lone link into a folder
// that has the rest.
func binsInPath() []string {
	var bins []string
	for _, program := range []string{"postgres", "initdb", "pg_ctl"} {
		if path, err := exec.LookPath(program); err == nil {
			bins = append(bins, filepath.Dir(resolve(path)))
		}
	}
	return bins
}

func usualBins() []string {
	var bins []string
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin",
		"/usr/pgsql-*/bin",
		"/opt/homebrew/opt/postgresql@*/bin",
		"/usr/local/opt/postgresql@*/bin",
		"/Applications/Postgres.app/Contents/Versions/*/bin",
	} {
		found, _ := filepath.Glob(pattern) // its only error is a bad pattern
		slices.Reverse(found)              // two-digit versions sort as text
		bins = append(bins, found...)
	}
	return bins
}

func resolve(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	return path
}

var versionOutput = regexp.MustCompile(`^postgres \(PostgreSQL\) (\d+)`)

// inspect asks the server in bin for its version. A folder that the user who
// will run the server cannot enter is an error.
func inspect(ctx context.Context, bin string) (Installation, error) {
	bin = resolve(bin)
	for _, program := range []string{"initdb", "postgres"} {
		if _, err := exec.LookPath(filepath.Join(bin, program)); err != nil {
			return Installation{}, fmt.Errorf("not a Postgres server's folder: %w", err)
		}
	}
	if isRoot() && !traversable(bin) {
		return Installation{}, errors.New("root cannot run Postgres, and other users cannot enter this folder")
	}
	out, err := exec.CommandContext(ctx, filepath.Join(bin, "postgres"), "--version").Output()
	if err != nil {
		return Installation{}, fmt.Errorf("postgres --version: %w", err)
	}
	match := versionOutput.FindSubmatch(out)
	if match == nil {
		return Installation{}, fmt.Errorf("postgres --version says %q", out)
	}
	major, err := strconv.Atoi(string(match[1]))
	return Installation{Bin: bin, Major: major}, err
}
