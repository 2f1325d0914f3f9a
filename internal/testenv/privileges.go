package testenv

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats-server/v2/server"
)

// RelayName is the relay's role in Postgres, and its user and password at NATS.
const RelayName = "relay"

// grants keeps two databases of one cluster from making the same role at once.
var grants sync.Mutex

// GrantRoles runs deploy/postgres/roles.sql in the database at that URL, which
// is migrated. Of what only some settings need it grants what these variables
// (OUTBOX_RETENTION) do. Where roles have passwords, RelayName's is that of the URL.
func GrantRoles(tb testing.TB, adminURL string, variables ...string) {
	tb.Helper()
	ctx := context.WithoutCancel(tb.Context()) // also from a Cleanup
	conn, err := pgx.Connect(ctx, adminURL)
	if err != nil {
		tb.Fatal(err)
	}
	defer conn.Close(ctx)
	sql := RolesSQL(tb, variables...)
	if password := conn.Config().Password; password != "" {
		sql += fmt.Sprintf("\nalter role %s password '%s';", RelayName, strings.ReplaceAll(password, `'`, `''`))
	}
	grants.Lock()
	defer grants.Unlock()
	if _, err := conn.Exec(ctx, sql); err != nil {
		tb.Fatalf("deploy/postgres/roles.sql: %v", err)
	}
}

// RolesSQL is what GrantRoles runs.
func RolesSQL(tb testing.TB, variables ...string) string {
	tb.Helper()
	return uncomment(deployed(tb, "postgres", "roles.sql"), variables)
}

// uncomment takes in the statements behind "-- Only with OUTBOX_X, …:" that one
// of the variables asks for.
func uncomment(sql string, variables []string) string {
	paragraphs := strings.Split(sql, "\n\n")
	for i, paragraph := range paragraphs {
		title, rest, _ := strings.Cut(paragraph, ":\n")
		wanted := slices.ContainsFunc(variables, func(name string) bool {
			return regexp.MustCompile(`\b` + name + `\b`).MatchString(title)
		})
		if wanted && strings.HasPrefix(title, "-- Only with ") {
			paragraphs[i] = strings.TrimPrefix(rest, "-- ")
		}
	}
	return strings.Join(paragraphs, "\n\n")
}

// AsRelay is the URL with RelayName in the place of its user.
func AsRelay(tb testing.TB, adminURL string) string {
	tb.Helper()
	u, err := url.Parse(adminURL)
	if err != nil {
		tb.Fatal(err)
	}
	if password, ok := u.User.Password(); ok {
		u.User = url.UserPassword(RelayName, password)
	} else {
		u.User = url.User(RelayName)
	}
	return u.String()
}

// RelayUser is the user at NATS of that name, with the permissions of
// deploy/nats/permissions.conf, included as that says.
func RelayUser(tb testing.TB) *server.User {
	tb.Helper()
	return includedUser(tb, "permissions.conf")
}

// OtherUser is one with the permissions of deploy/nats/others.conf, with the
// name and the password "other".
func OtherUser(tb testing.TB) *server.User {
	tb.Helper()
	user := includedUser(tb, "others.conf")
	user.Username, user.Password = "other", "other"
	return user
}

func includedUser(tb testing.TB, file string) *server.User {
	tb.Helper()
	dir := tb.TempDir()
	for name, text := range map[string]string{
		file: deployed(tb, "nats", file),
		"nats.conf": fmt.Sprintf(`authorization { users: [ { user: %[1]s, password: %[1]s, permissions: { include ./%[2]s } } ] }`,
			RelayName, file),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	options, err := server.ProcessConfigFile(filepath.Join(dir, "nats.conf"))
	if err != nil {
		tb.Fatalf("deploy/nats/%s: %v", file, err)
	}
	return options.Users[0]
}

// deployed reads a file of deploy/.
func deployed(tb testing.TB, folder, name string) string {
	tb.Helper()
	root, err := moduleRoot()
	if err != nil {
		tb.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "deploy", folder, name))
	if err != nil {
		tb.Fatal(err)
	}
	return string(text)
}
