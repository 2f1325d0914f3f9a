package relay_test

import (
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"outbox-relay/internal/testenv"
)

// secured sets the server's certificate, from then on required of every client.
func (b *bundle) secured(a *testenv.Authority) {
	b.Helper()
	a.Issue("server")
	var data string
	b.must(b.sql.QueryRow(b.Context(), `show data_directory`).Scan(&data))
	for from, to := range map[string]string{"server.pem": "server.crt", "server.key": "server.key"} {
		b.give(a.Path(from), filepath.Join(data, to))
	}
	b.exec(`alter system set ssl = on`)
	b.exec(`select pg_reload_conf()`)
}

// give copies a file and gives it to the folder's owner: Postgres reads no key
// that others can.
func (b *bundle) give(from, to string) {
	b.Helper()
	data, err := os.ReadFile(from)
	b.must(err)
	b.must(os.WriteFile(to, data, 0o600))
	info, err := os.Stat(filepath.Dir(to))
	b.must(err)
	owner := info.Sys().(*syscall.Stat_t)
	b.must(os.Chown(to, int(owner.Uid), int(owner.Gid)))
}

// verified is the bundle's URL with verify-full and that root.
func (b *bundle) verified(root string) string {
	b.Helper()
	u, err := url.Parse(b.url)
	b.must(err)
	u.Host = "localhost:" + u.Port()
	u.RawQuery = url.Values{"sslmode": {"verify-full"}, "sslrootcert": {root}}.Encode()
	return "POSTGRES_URL=" + u.String()
}

func TestPostgresByTLS(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.OwnPostgres(t, nil), testenv.NATSOptions{})
	a := testenv.NewAuthority(t)
	b.secured(a)
	r := b.streaming(b.verified(a.Path("ca.pem")))
	ids := b.insert(3)
	b.requireStatus("published", ids)
	b.requireStream(ids)
	if n := b.count(`select count(*) from pg_stat_ssl join pg_stat_activity using (pid)
		where ssl and application_name like 'outbox-relay%'`); n != 2 {
		t.Fatalf("%d connections by TLS, want both", n)
	}
	requireLeaves(b, r)
	stranger := b.verified(testenv.NewAuthority(t).Path("ca.pem"))
	requireEnd(t, b.start(stranger), 1, "unknown authority", "sslrootcert", "OUTBOX_POSTGRES_URL")
}
