package relay_test

import (
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/testenv"
)

// keywords writes a URL of Postgres in the other form.
func keywords(t *testing.T, address string) string {
	t.Helper()
	config, err := pgx.ParseConfig(address)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("host='%s' port=%d user='%s' password='%s' dbname='%s' sslmode=disable",
		config.Host, config.Port, config.User, config.Password, strings.ReplaceAll(config.Database, "'", `\'`))
}

// What libpq reads and means nothing to the relay is left out; settings of Postgres are
// the sessions', except for those that the relay pins, whatever their case.
func TestParametersOfTheURLThatMeanNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`create schema app`)
	parameters := map[string]string{
		"gssencmode": "prefer", "keepalives": "1", "keepalives_idle": "30", "keepalives_interval": "5", "keepalives_count": "3",
		"tcp_user_timeout": "10000", "sslcompression": "0", "fallback_application_name": "psql", "replication": "database",
		"load_balance_hosts": "disable", "sslnegotiation": "postgres", "target_session_attrs": "any",
		"search_path": "app", "statement_timeout": "60000", "options": "-c work_mem=5MB", "app.tenant": "it's",
		"timezone": "Europe/Berlin", "DATESTYLE": "German",
	}
	var query, more strings.Builder
	for name, value := range parameters {
		query.WriteString("&" + name + "=" + strings.ReplaceAll(url.QueryEscape(value), "+", "%20"))
		more.WriteString(" " + name + "='" + strings.ReplaceAll(value, "'", `\'`) + "'")
	}
	for form, dsn := range map[string]func(string) string{
		"URL":      func(address string) string { return address + query.String() },
		"keywords": func(address string) string { return keywords(t, address) + more.String() },
	} {
		t.Run(form, func(t *testing.T) {
			env := b.with("POSTGRES_URL=" + dsn(testenv.AsRelay(t, b.url)))
			r := testenv.StartRelay(t, env)
			r.WaitLog("msg=streaming")
			b.requireStatus("published", b.insert(2))
			requireEnd(t, testenv.StartRelay(t, env, "status"), 0, "(walsender ")
			doctor := testenv.StartRelay(t, env, "doctor")
			doctor.Wait(time.Minute)
			if !strings.Contains(doctor.Logs(), "relay may replicate") && !strings.Contains(doctor.Logs(), "wal_level") {
				t.Errorf("doctor has not asked Postgres: %s", doctor.Logs())
			}
			requireLeaves(t, r)
			requireEnd(t, testenv.StartRelay(t, b.with("POSTGRES_URL="+dsn(b.url)), "migrate"), 0, "nothing to migrate")
		})
	}
}

// What is neither is named before anything is connected, with the same remedy by each
// command; what may be a part of the password is not named.
func TestParametersOfTheURLThatAreRefused(t *testing.T) {
	t.Parallel()
	b := setup(t)
	inKeywords := keywords(t, b.url)
	for _, c := range []struct{ dsn, says, hides string }{
		{b.url + "&schema=shop", "has parameter schema, ", ""},
		{b.url + "&pgbouncer=true", "has parameter pgbouncer, ", ""},
		{b.url + "&connection_limit=5", "has parameter connection_limit, ", ""},
		{inKeywords + " pool_max_conns=5", "has parameter pool_max_conns, ", ""},
		{b.url + "&default_query_exec_mode=simple_protocol", "has parameter default_query_exec_mode, ", ""},
		{b.url + "&gssencmode=require", "has parameter gssencmode, ", ""},
		{b.url + "&sslcrl=/tls/crl.pem", "has parameter sslcrl, ", ""},
		{b.url + "&hostaddr=127.0.0.1", "has parameter hostaddr, ", ""},
		{b.url + "&colour=blue", "has parameter colour, ", ""},
		{strings.Replace(inKeywords, "dbname", "password=one hunter2=x dbname", 1), "password", "hunter"},
		{strings.Replace(inKeywords, "dbname", "password=one hunter2 dbname", 1), "password", "hunter"},
		{strings.Replace(inKeywords, "dbname", "password=one abc dbname", 1), "password", "abc"},
		{strings.Replace(b.url, "?", "?password=one&hunter2=x&", 1), "password", "hunter"},
	} {
		for _, command := range []string{"run", "status", "doctor", "migrate"} {
			r := testenv.StartRelay(t, b.with("POSTGRES_URL="+c.dsn), command)
			requireEnd(t, r, 2, "OUTBOX_POSTGRES_URL ", c.says)
			if c.hides != "" && strings.Contains(r.Logs(), c.hides) {
				t.Errorf("%s of %q shows a part of the password: %s", command, c.dsn, r.Logs())
			}
		}
	}
}

// One cause has one remedy, whoever connects.
func TestRemediesOfConnectingAreTheSame(t *testing.T) {
	t.Parallel()
	b := setupOn(t, passwordPostgres(t, "right"), testenv.NATSOptions{})
	u, err := url.Parse(b.url)
	b.must(err)
	u.Path = "/nowhere"
	b.exec(`create role outsider login password 'right'`)
	b.exec(`revoke connect on database ` + pgx.Identifier{b.database()}.Sanitize() + ` from public`)
	outsider, err := url.Parse(b.url)
	b.must(err)
	outsider.User = url.UserPassword("outsider", "right")
	for _, c := range []struct{ url, says string }{
		{withPassword(t, b.url, "wrong"), "check user and password in OUTBOX_POSTGRES_URL, and pg_hba.conf"},
		{u.String(), "create the database, or correct OUTBOX_POSTGRES_URL"},
		{outsider.String(), "GRANT CONNECT ON DATABASE"},
		{strings.Replace(b.url, "sslmode=disable", "sslmode=require", 1), "set ssl at the server"},
	} {
		for _, command := range []string{"run", "status", "doctor", "migrate"} {
			requireEnd(t, testenv.StartRelay(t, b.with("POSTGRES_URL="+c.url), command), 1, c.says)
		}
	}
}
