package relay_test

import (
	"net/url"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/testenv"
)

// readmeRole is the SQL of the README that makes the relay's role.
func (b *bundle) readmeRole() string {
	b.Helper()
	readme, err := os.ReadFile("../README.md")
	b.must(err)
	block := regexp.MustCompile("(?s)```sql\n(CREATE ROLE.*?)```").FindSubmatch(readme)
	if block == nil {
		b.Fatal("README.md has no SQL that creates the role")
	}
	config, err := pgx.ParseConfig(b.url)
	b.must(err)
	return strings.ReplaceAll(string(block[1]), "DATABASE app", "DATABASE "+pgx.Identifier{config.Database}.Sanitize())
}

// asReadmeRole makes the role of the README in a server of its own, and lets the
// relay run as that. It returns the grants that only delete needs.
func asReadmeRole(t *testing.T) (b *bundle, deletes string) {
	t.Helper()
	b = setupOn(t, testenv.OwnPostgres(t, nil), testenv.NATSOptions{})
	grants, deletes, _ := strings.Cut(b.readmeRole(), "-- only with")
	b.exec(grants)
	address, err := url.Parse(b.url)
	b.must(err)
	address.User = url.UserPassword("relay", "secret")
	b.env["OUTBOX_POSTGRES_URL"] = address.String()
	return b, deletes
}

// The relay lives on what the README grants: all that it does to rows is here.
func TestLeastPrivilege(t *testing.T) {
	b, deletes := asReadmeRole(t)
	ids := b.insert(10)
	requireLeaves(b, b.streaming())
	b.dropSlot()
	ids = append(ids, b.insert(10)...)
	r := b.streaming()
	ids = append(ids, b.insert(10)...)
	bad := b.insertTooLarge()
	more := b.insert(10)
	b.requireStatus("published", append(ids, more...))
	b.requireStatus("failed", []string{bad})
	if code := r.Terminate(); code != 0 {
		t.Fatalf("exit code %d", code)
	}

	_, grant, _ := strings.Cut(deletes, "\n")
	b.exec(grant)
	b.streaming("AFTER_PUBLISH=delete")
	gone := b.insert(10)
	b.requireNoRows(gone)
	b.requireStream(append(append(ids, more...), gone...))
}

func TestRightIsMissing(t *testing.T) {
	b, _ := asReadmeRole(t)
	requireLeaves(b, b.streaming())
	for _, c := range []struct{ name, revoke, grant string }{
		{"replication", `alter role relay noreplication`, `alter role relay replication`},
		{"select", `revoke select on events from relay`, `grant select on events to relay`},
		{"update", `revoke update (status) on events from relay`, `grant update (status) on events to relay`},
		{"checkpoint", `revoke update on outbox_relay_checkpoints from relay`, `grant update on outbox_relay_checkpoints to relay`},
	} {
		t.Run(c.name, func(t *testing.T) {
			b.exec(c.revoke)
			id := b.insert(1)
			requireEnd(t, b.start(), 1, "SQLSTATE 42501", "Give the relay a role")
			b.exec(c.grant)
			r := b.streaming()
			b.requireStatus("published", id)
			requireLeaves(b, r)
		})
	}
}
