package relay_test

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"outbox-relay/internal/testenv"
)

// secured sets the server's certificate and whose it trusts, and who has to come
// by TLS, and how.
func (b *bundle) secured(a *testenv.Authority, certificate, access string) {
	b.Helper()
	var data string
	b.must(b.sql.QueryRow(b.Context(), `show data_directory`).Scan(&data))
	for from, to := range map[string]string{certificate + ".pem": "server.crt", certificate + ".key": "server.key", "ca.pem": "root.crt"} {
		b.give(a.Path(from), filepath.Join(data, to))
	}
	access += "\nhost all postgres 127.0.0.1/32 trust\n" // the test
	b.must(os.WriteFile(filepath.Join(data, "pg_hba.conf"), []byte(access), 0o600))
	b.exec(`alter system set ssl = on`)
	b.exec(`alter system set ssl_ca_file = 'root.crt'`)
	b.exec(`select pg_reload_conf()`)
	testenv.Eventually(b, "the rules", func() bool {
		return b.count(`select count(*) from pg_hba_file_rules where user_name = '{relay}' and current_setting('ssl') = 'on'`) > 0
	})
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

// by is the relay's URL with these parameters in the place of the bundle's.
func (b *bundle) by(parameters ...string) string {
	b.Helper()
	u, err := url.Parse(testenv.AsRelay(b, b.url))
	b.must(err)
	u.Host = "localhost:" + u.Port()
	query := url.Values{"sslmode": {"verify-full"}}
	for i := 0; i < len(parameters); i += 2 {
		query.Set(parameters[i], parameters[i+1])
	}
	u.RawQuery = query.Encode()
	return "POSTGRES_URL=" + u.String()
}

// requireSecure publishes over connections that are all by TLS.
func (b *bundle) requireSecure(address string) {
	b.Helper()
	r := b.streaming(address)
	b.requireStatus("published", b.insert(3))
	if n := b.count(`select count(*) from pg_stat_ssl join pg_stat_activity using (pid)
		where ssl and usename = 'relay' and application_name like 'outbox-relay%'`); n != 2 {
		b.Fatalf("%d connections by TLS, want both", n)
	}
	requireLeaves(b, r)
}

func TestPostgresByTLS(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.OwnPostgres(t, nil), testenv.NATSOptions{})
	a, stranger := testenv.NewAuthority(t), testenv.NewAuthority(t)
	for _, name := range []string{"server", "relay", "somebody"} {
		a.Issue(name)
	}
	stranger.Issue("relay")
	a.Issue("late", testenv.Expired)
	a.Issue("elsewhere", testenv.ForAnotherHost)
	ca := []string{"sslrootcert", a.Path("ca.pem")}
	with := func(from *testenv.Authority, name string) string {
		return b.by(append(ca, "sslcert", from.Path(name+".pem"), "sslkey", from.Path(name+".key"))...)
	}

	requireEnd(t, b.start(b.by(ca...)), 1, "server refused TLS connection", "sslmode", "OUTBOX_POSTGRES_URL") // it has none yet
	b.secured(a, "server", "hostssl all relay 127.0.0.1/32 trust")
	b.requireSecure(b.by(ca...))
	requireEnd(t, b.start(b.by("sslmode", "disable")), 1, "28000", "OUTBOX_POSTGRES_URL")
	requireEnd(t, b.start(b.by("sslrootcert", stranger.Path("ca.pem"))), 1, "unknown authority", "sslrootcert", "OUTBOX_POSTGRES_URL")
	requireEnd(t, b.start(b.by("sslrootcert", a.Path("none.pem"))), 2, "OUTBOX_POSTGRES_URL", "none.pem")
	b.secured(a, "late", "hostssl all relay 127.0.0.1/32 trust")
	requireEnd(t, b.start(b.by(ca...)), 1, "expired", "OUTBOX_POSTGRES_URL")
	b.secured(a, "elsewhere", "hostssl all relay 127.0.0.1/32 trust")
	requireEnd(t, b.start(b.by(ca...)), 1, "elsewhere.example", "the host in OUTBOX_POSTGRES_URL")

	// By client certificate: the role is its common name.
	b.secured(a, "server", "hostssl all relay 127.0.0.1/32 cert")
	b.requireSecure(with(a, "relay"))
	requireEnd(t, b.start(b.by(ca...)), 1, "28000", "valid client certificate", "OUTBOX_POSTGRES_URL")
	requireEnd(t, b.start(with(a, "somebody")), 1, "28000", "OUTBOX_POSTGRES_URL")
	requireEnd(t, b.start(with(stranger, "relay")), 1, "tls: ", "sslcert and sslkey in OUTBOX_POSTGRES_URL")
	requireEnd(t, b.start(with(a, "late")), 1, "tls: ", "sslcert and sslkey in OUTBOX_POSTGRES_URL")

	// What is wrong later is waited out.
	r := b.streaming(with(a, "relay"))
	b.secured(a, "elsewhere", "hostssl all relay 127.0.0.1/32 cert")
	b.exec(`select pg_terminate_backend(pid) from pg_stat_activity where usename = 'relay'`)
	r.WaitLog("elsewhere.example")
	missed := b.insert(2)
	b.secured(a, "server", "hostssl all relay 127.0.0.1/32 cert")
	b.requireStatus("published", missed)
	requireLeaves(t, r)
}

// channel_binding=require proves that no one stands in between, who has a
// certificate that the relay trusts: the password's proof names the server's.
func TestChannelBinding(t *testing.T) {
	t.Parallel()
	b := setupOn(t, passwordPostgres(t, "some-secret"), testenv.NATSOptions{})
	a := testenv.NewAuthority(t)
	a.Issue("server")
	bound := b.by("sslrootcert", a.Path("ca.pem"), "channel_binding", "require")
	b.secured(a, "server", "host all relay 127.0.0.1/32 scram-sha-256")
	b.requireSecure(bound)
	requireEnd(t, b.start(b.by("sslmode", "disable", "channel_binding", "require")), 1, "channel binding required", "sslmode")
	b.secured(a, "server", "hostssl all relay 127.0.0.1/32 password") // the password itself, to whoever asks
	requireEnd(t, b.start(bound), 1, "channel binding required", "channel_binding", "OUTBOX_POSTGRES_URL")
	b.secured(a, "server", "hostssl all relay 127.0.0.1/32 trust")
	requireEnd(t, b.start(bound), 1, "channel binding required", "OUTBOX_POSTGRES_URL")
}

// A server that is to be the primary, and is not yet, is waited for.
func TestReadOnlyServerByTLSIsWaitedFor(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.OwnPostgres(t, nil), testenv.NATSOptions{})
	a := testenv.NewAuthority(t)
	a.Issue("server")
	b.secured(a, "server", "hostssl all relay 127.0.0.1/32 trust")
	b.exec(fmt.Sprintf(`alter role %s set default_transaction_read_only = on`, testenv.RelayName))
	r := b.start(b.by("sslrootcert", a.Path("ca.pem"), "target_session_attrs", "read-write"))
	r.WaitLog("waiting to start again")
	r.WaitLog("target_session_attrs in OUTBOX_POSTGRES_URL")
	b.exec(fmt.Sprintf(`alter role %s reset default_transaction_read_only`, testenv.RelayName))
	r.WaitLog("msg=streaming")
	requireLeaves(t, r)
}
