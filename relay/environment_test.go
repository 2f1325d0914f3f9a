package relay_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats-server/v2/server"

	"outbox-relay/internal/testenv"
)

// JetStream that is switched off by a restart of the server is waited for by a
// relay that has streamed.
func TestJetStreamIsSwitchedOff(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	ids := b.insert(3)
	b.requireStatus("published", ids)
	b.nats.RestartWith(func(o *server.Options) { o.JetStream = false })
	ids = append(ids, b.insert(3)...)
	r.WaitLog("JetStream is not enabled")
	r.WaitLog("waiting to start again")
	b.nats.RestartWith(func(o *server.Options) { o.JetStream = true })
	b.requireStatus("published", ids)
	b.requireStream(ids)
	requireLeaves(t, r)
}

// So is whatever else about the relay's surroundings was right once: none of it
// concerns what is to be published.
func TestWhatWasRightBeforeIsWaitedFor(t *testing.T) {
	t.Parallel()
	b := setupOn(t, testenv.OwnPostgres(t, nil), testenv.NATSOptions{})
	file := filepath.Join(t.TempDir(), "url")
	url := testenv.AsRelay(b, b.url)
	b.must(os.WriteFile(file, []byte(url), 0o600))
	env := b.with("POSTGRES_URL=", "POSTGRES_URL_FILE="+file)
	r := testenv.StartRelay(t, env)
	r.WaitLog("msg=streaming")
	end := `select pg_terminate_backend(pid) from pg_stat_activity where usename = 'relay'`
	config := b.sql.Config().Copy()
	database := pgx.Identifier{config.Database}.Sanitize()
	config.Database = "postgres" // one's own can't be closed
	outside, err := pgx.ConnectConfig(t.Context(), config)
	b.must(err)
	defer outside.Close(t.Context())
	for _, c := range []struct{ name, spoil, mend, says string }{
		{"REPLICATION taken away", `alter role relay noreplication`, `alter role relay replication`, "42501"},
		{"a right taken away", `revoke update on outbox_relay_checkpoints from relay`, `grant update on outbox_relay_checkpoints to relay`, "permission denied for table outbox_relay_checkpoints"},
		{"no login", `alter role relay nologin`, `alter role relay login`, "28000"},
		{"database closed", `alter database ` + database + ` allow_connections false`, `alter database ` + database + ` allow_connections true`, "55000"},
	} {
		conn := b.sql
		if strings.Contains(c.spoil, "database") {
			conn = outside
		}
		_, err := conn.Exec(t.Context(), c.spoil)
		b.must(err)
		b.exec(end)
		r.WaitLog(c.says)
		_, err = conn.Exec(t.Context(), c.mend)
		b.must(err)
		b.requireStatus("published", b.insert(1))
	}
	b.must(os.Rename(file, file+".away")) // a secret that is being replaced
	b.exec(end)
	r.WaitLog("OUTBOX_POSTGRES_URL_FILE")
	b.must(os.Rename(file+".away", file))
	b.requireStatus("published", b.insert(1))
	b.requireStream(b.ids())
	requireLeaves(t, r)
}
