package pgserver

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// defaults are for a server that is fast and whose data nobody will miss.
// synchronous_commit stays on: a commit's order and visibility are tested.
var defaults = map[string]string{
	"wal_level":                "logical",
	"max_wal_senders":          "32",
	"max_replication_slots":    "32",
	"max_connections":          "200",
	"shared_buffers":           "64MB",
	"fsync":                    "off",
	"listen_addresses":         "127.0.0.1",
	"unix_socket_directories":  "",
	"log_line_prefix":          "%m [%p] %a ",
	"log_replication_commands": "on",
}

func (c *Cluster) initdb(ctx context.Context) error {
	args := []string{"-D", c.data(), "-U", "postgres", "--no-sync", "--encoding=UTF8", "--locale=C"}
	if c.password == "" {
		args = append(args, "--auth=trust")
	} else {
		file, err := c.passwordFile()
		if err != nil {
			return err
		}
		defer os.Remove(file)
		args = append(args, "--auth=scram-sha-256", "--pwfile="+file)
	}
	out, err := c.command(ctx, "initdb", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, bytes.TrimSpace(out))
	}
	return nil
}

func (c *Cluster) passwordFile() (string, error) {
	file := filepath.Join(c.dir, "password")
	if err := os.WriteFile(file, []byte(c.password), 0o600); err != nil {
		return "", err
	}
	return file, give(file, c.user)
}

// settings are the options' over the defaults.
func (o Options) settings() map[string]string {
	all := maps.Clone(defaults)
	maps.Copy(all, o.Settings)
	return all
}

// configure appends to postgresql.conf rather than using the command line, so
// that ALTER SYSTEM can change every setting.
func (c *Cluster) configure(settings map[string]string) error {
	var lines strings.Builder
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		fmt.Fprintf(&lines, "%s = '%s'\n", name, quoted.Replace(settings[name]))
	}
	fmt.Fprintf(&lines, "port = '%d'\n", c.port)
	f, err := os.OpenFile(filepath.Join(c.data(), "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(lines.String())
	return err
}

var quoted = strings.NewReplacer(`'`, `''`, `\`, `\\`)
