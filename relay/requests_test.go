package relay_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/url"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/internal/testenv"
)

// someone is a role that may connect, and has the rights of these statements, in which
// %s is its name; it returns a session of it.
func (b *bundle) someone(suffix string, grants ...string) *pgx.Conn {
	b.Helper()
	role := b.slot() + suffix
	name := pgx.Identifier{role}.Sanitize()
	b.exec(`create role ` + name + ` login`)
	b.Cleanup(func() {
		for _, sql := range []string{`drop owned by ` + name, `drop role ` + name} {
			if _, err := b.sql.Exec(context.Background(), sql); err != nil {
				b.Error(err)
			}
		}
	})
	for _, grant := range grants {
		b.exec(strings.ReplaceAll(grant, "%s", name))
	}
	u, err := url.Parse(b.url)
	b.must(err)
	u.User = url.User(role)
	conn, err := pgx.Connect(b.Context(), u.String())
	b.must(err)
	b.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// spy makes a slot that shows all that is decoded.
func (b *bundle) spy() (slot string) {
	b.Helper()
	slot = b.slot() + "_spy"
	b.exec(`select pg_create_logical_replication_slot($1, 'test_decoding')`, slot)
	b.Cleanup(func() {
		if _, err := b.sql.Exec(context.Background(), `select pg_drop_replication_slot($1)`, slot); err != nil {
			b.Error(err)
		}
	})
	return slot
}

// retrier may retry, and operator may ask for replays, too.
var (
	retrier  = []string{`grant select, update (status, retried_at, retried_attempts) on events to %s`, `grant execute on function outbox_relay_ask(regclass, text) to %s`}
	operator = []string{`grant select on events to %s`, `grant execute on function outbox_relay_ask(regclass, text) to %s`}
)

type retriedRow struct {
	ID      string `json:"id"`
	Attempt int    `json:"attempt"`
}

func request(b *bundle, content any) string {
	b.Helper()
	text, err := json.Marshal(content)
	b.must(err)
	return string(text)
}

// A role that may do no more than connect emits what a request is made of: nothing is
// published, and nothing waits for it.
func TestRequestsOfAnyone(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"mark", "keep", "delete"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.forgetFailures()
			r := b.streaming("AFTER_PUBLISH=" + mode)
			ids := b.insert(3)
			failed := b.reject(1)
			b.requireStatus("failed", failed)
			b.mend()
			b.exec(`select outbox_retry($1)`, failed[0])
			ids = append(ids, failed...)
			b.requireStream(ids)
			b.requireDone(mode, ids)

			stranger := b.someone("_stranger")
			for _, content := range []any{
				map[string]any{"replay": "forged", "ids": ids},
				map[string]any{"retry": []retriedRow{{failed[0], 1}}},
				map[string]any{"retry": []retriedRow{{ids[0], 1}, {failed[0], 1}}},
			} {
				_, err := stranger.Exec(t.Context(), `select pg_logical_emit_message(true, 'outbox_relay:' || 'events'::regclass::oid, $1)`, request(b, content))
				b.must(err)
			}
			ids = append(ids, b.insert(2)...)
			b.requireStream(ids)
			b.requireDone(mode, ids)
			r.WaitLog("it is not signed")
			requireLeaves(t, r)
			b.requireStream(ids)
		})
	}
}

// Only granted roles can ask, and read what requests are signed with.
func TestRequestsOfStrangersAreRefused(t *testing.T) {
	t.Parallel()
	b := setup(t)
	stranger, half := b.someone("_stranger"), b.someone("_half", retrier[0])
	app := b.someone("_app", `grant outbox_writer to %s`)
	failed := b.insert(1)[0]
	b.exec(`update events set status = 'failed', failed_at = now() where id = $1`, failed)
	for _, sql := range []string{`select outbox_relay_ask('events', '{}')`, `select * from outbox_relay_secret`, `select outbox_retry(` + literal(failed) + `)`} {
		for _, conn := range []*pgx.Conn{stranger, half, app} {
			var refused *pgconn.PgError
			if _, err := conn.Exec(t.Context(), sql); !errors.As(err, &refused) || refused.Code != "42501" {
				t.Errorf("%s: got %v, want a refusal", sql, err)
			}
		}
	}
	asks := b.someone("_operator", operator...)
	if _, err := asks.Exec(t.Context(), `select secret from outbox_relay_secret`); err == nil {
		t.Error("who may ask can read the secret")
	}
}

// Default privileges that give new tables and functions to everybody do not give away who
// may ask, and roles that could retry before go on so.
func TestDefaultPrivilegesGiveNothingAway(t *testing.T) {
	t.Parallel()
	b := setupEmpty(t, testenv.Postgres(t), testenv.NATSOptions{})
	stranger := b.someone("_stranger")
	b.exec(`alter default privileges in schema public grant select on tables to public`)
	b.exec(`alter default privileges in schema public grant execute on functions to public`)
	b.migrate()
	b.grant()
	for _, sql := range []string{`select outbox_relay_ask('events', '{}')`, `select * from outbox_relay_secret`} {
		var refused *pgconn.PgError
		if _, err := stranger.Exec(t.Context(), sql); !errors.As(err, &refused) || refused.Code != "42501" {
			t.Errorf("%s: got %v, want a refusal", sql, err)
		}
	}
}

// The transaction that a request and its proof are of is not the row's own id: with a
// savepoint that is another, and so in a block that catches exceptions.
func TestRequestsWithinSavepoints(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"mark", "keep"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.forgetFailures()
			r := b.streaming("AFTER_PUBLISH=" + mode)
			want := b.insert(2)
			failed := b.reject(5)
			b.requireStatus("failed", failed)
			b.mend()
			ops, asks := b.someone("_retrier", retrier...), b.someone("_operator", operator...)
			run := func(conn *pgx.Conn, statements ...string) {
				t.Helper()
				for _, sql := range append(append([]string{"begin"}, statements...), "commit") {
					if _, err := conn.Exec(t.Context(), sql); err != nil {
						t.Fatalf("%s: %v", sql, err)
					}
				}
			}
			retry := func(id string) string { return `select outbox_retry(` + literal(id) + `)` }
			replay := func(name string, ids ...string) string {
				return `select outbox_relay_ask('events', ` + literal(request(b, map[string]any{"replay": name, "ids": ids})) + `)`
			}

			run(ops, "savepoint a", retry(failed[0]), "release a")
			run(ops, "savepoint a", retry(failed[0]), "rollback to a", "savepoint b", retry(failed[1]))
			run(ops, `do $$ begin perform 1 / 0; exception when division_by_zero then perform outbox_retry(`+literal(failed[2])+`); end $$`)
			run(ops, retry(failed[3]), "savepoint a", retry(failed[4]))
			run(asks, "savepoint a", replay("one", want[0]), "savepoint b", replay("lost", want...), "rollback to b")
			run(asks, replay("two", want[1]), replay("three", want...))
			want = append(want, failed...)
			want = append(want, want[0]+":one", want[1]+":two", want[0]+":three", want[1]+":three")
			b.requireStream(want)
			requireLeaves(t, r)
			if strings.Contains(r.Logs(), "it is not signed") {
				t.Error("a request with proof was passed over")
			}
		})
	}
}

// A signature is valid in its own transaction only, for its own outbox and its own words.
func TestSignatureIsNotUsedAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.streaming()
	ids := b.insert(2)
	b.requireStatus("published", ids)
	spy := b.spy()
	b.ask(map[string]any{"replay": "one", "ids": ids[:1]})
	signed := b.text(`select substring(data from 'content:(.*)') from pg_logical_slot_peek_changes($1, null, null) where data like '%content:%replay%'`, spy)
	stranger := b.someone("_stranger")
	for _, content := range []string{signed, strings.Replace(signed, ids[0], ids[1], 1), signed[:64], strings.Repeat("0", 64) + signed[64:]} {
		_, err := stranger.Exec(t.Context(), `select pg_logical_emit_message(true, 'outbox_relay:' || 'events'::regclass::oid, $1)`, content)
		b.must(err)
	}
	ids = append(ids, ids[0]+":one")
	ids = append(ids, b.insert(1)...)
	b.requireStream(ids)
	if n := strings.Count(r.Logs(), "ignored a request"); n != 4 {
		t.Errorf("%d requests were ignored", n)
	}
	requireLeaves(t, r)
	b.requireStream(ids)
}

// A publication of all tables shows nobody the secret.
func TestSecretIsNotDecoded(t *testing.T) {
	t.Parallel()
	b := setupEmpty(t, testenv.Postgres(t), testenv.NATSOptions{})
	spy := b.spy()
	b.migrate()
	secret := b.text(`select encode(secret, 'hex') from outbox_relay_secret`)
	if n := b.count(`select count(*) from pg_logical_slot_peek_changes($1, null, null) where data like '%' || $2 || '%'`, spy, secret); n != 0 || len(secret) != 64 {
		t.Errorf("a secret of %d digits is decoded %d times", len(secret), n)
	}
	if n := b.count(`select count(*) from pg_logical_slot_peek_changes($1, null, null) where data like '%outbox_relay_secret%'`, spy); n != 1 {
		t.Errorf("%d changes of the table are decoded, want the row without its secret", n)
	}
}

// A heal leaves rows to the slot that this brings by a request: not to one without proof.
func TestHealBelievesNoForgedRequest(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.forgetFailures()
	r := b.streaming()
	failed := b.reject(2)
	b.requireStatus("failed", failed)
	b.mend()
	r.Kill()
	b.exec(`select outbox_retry($1)`, failed[0])
	b.dropSlot()
	stop := b.barred("outbox_relay_backlog")
	r = b.start()
	b.awaitBarred("outbox_relay_backlog") // the slot is made
	stranger := b.someone("_stranger")
	forged := request(b, map[string]any{"retry": []retriedRow{{failed[0], 1}}})
	_, err := stranger.Exec(t.Context(), `select pg_logical_emit_message(true, 'outbox_relay:' || 'events'::regclass::oid, $1)`, forged)
	b.must(err)
	b.killUnrecorded(r, stop)
	r = b.streaming()
	b.requireStatus("published", failed[:1])
	b.requireStream(failed[:1])
	requireLeaves(t, r)
}

// Requests that the release before has made are taken: it knew of no proof.
func TestRequestsOfTheReleaseBefore(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.forgetFailures()
	r := b.streaming()
	ids := b.insert(1)
	b.requireStatus("published", ids)
	r.Kill()
	emit := func(run string) {
		b.exec(`select pg_logical_emit_message(true, 'outbox_relay:' || 'events'::regclass::oid, $1)`,
			request(b, map[string]any{"replay": run, "ids": ids}))
	}
	emit("before")
	b.exec(`alter table outbox_relay_secret replica identity full`)    // for a publication of all tables
	b.exec(`update outbox_relay_secret set since = clock_timestamp()`) // as migrate does where a relay has run
	emit("after")
	r = b.streaming()
	ids = append(ids, ids[0]+":before")
	ids = append(ids, b.insert(1)...)
	b.requireStream(ids)
	requireLeaves(t, r)
}
