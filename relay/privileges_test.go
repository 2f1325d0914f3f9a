package relay_test

import (
	"context"
	"errors"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/nats-io/nats-server/v2/server"

	"outbox-relay/internal/testenv"
)

// The role of deploy/postgres/roles.sql, as which the relay runs in all these
// tests, lacks nothing: what it does to rows is all here.
func TestLeastPrivilege(t *testing.T) {
	b := setup(t)
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
	if n := b.count(`select count(*) from pg_stat_activity where datname = current_database() and application_name like 'outbox-relay%' and usename <> 'relay'`); n != 0 {
		t.Fatalf("%d connections are not of the relay's role", n)
	}
	if code := r.Terminate(); code != 0 {
		t.Fatalf("exit code %d", code)
	}

	b.streaming("AFTER_PUBLISH=delete")
	gone := b.insert(10)
	b.requireNoRows(gone)
	b.requireStream(append(append(ids, more...), gone...))
}

// Without one of its rights the relay ends, and says why.
func TestRightIsMissing(t *testing.T) {
	b := setupOn(t, testenv.OwnPostgres(t, nil), testenv.NATSOptions{})
	requireLeaves(t, b.streaming())
	for _, c := range []struct{ name, revoke, grant, says string }{
		{"replication", `alter role relay noreplication`, `alter role relay replication`, `ALTER ROLE "relay" REPLICATION (Amazon RDS: GRANT rds_replication TO "relay")`},
		{"select", `revoke select on events from relay`, `grant select on events to relay`, "deploy/postgres/roles.sql"},
		{"update", `revoke update (status) on events from relay`, `grant update (status) on events to relay`, "deploy/postgres/roles.sql"},
		{"checkpoint", `revoke update on outbox_relay_checkpoints from relay`, `grant update on outbox_relay_checkpoints to relay`, "deploy/postgres/roles.sql"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b.exec(c.revoke)
			id := b.insert(1)
			requireEnd(t, b.start(), 1, "SQLSTATE 42501", c.says)
			b.exec(c.grant)
			r := b.streaming()
			b.requireStatus("published", id)
			requireLeaves(t, r)
		})
	}
}

// The application's role inserts events and learns their ids; that is all.
func TestWriterOnlyInserts(t *testing.T) {
	b := setup(t)
	name := pgx.Identifier{b.slot()}.Sanitize()
	b.exec(`create role ` + name + ` login in role outbox_writer`)
	t.Cleanup(func() {
		if _, err := b.sql.Exec(context.Background(), `drop role `+name); err != nil {
			t.Error(err)
		}
	})
	u, err := url.Parse(b.url)
	b.must(err)
	u.User = url.User(b.slot())
	writer, err := pgx.Connect(t.Context(), u.String())
	b.must(err)
	t.Cleanup(func() { writer.Close(context.Background()) })
	var id string
	b.must(writer.QueryRow(t.Context(), `insert into events (aggregate_type, aggregate_id, event_type, payload, headers)
		values ('order', 'o-42', 'placed', '{}', '{"traceparent": "00-1-01"}') returning id`).Scan(&id))
	for _, sql := range []string{
		`select payload from events`,
		`insert into events (id, aggregate_type, event_type, payload) values ('mine', 'order', 'placed', '{}')`,
		`insert into events (aggregate_type, event_type, payload, status) values ('order', 'placed', '{}', 'published')`,
		`update events set status = 'published'`,
		`delete from events`,
		`truncate events`,
		`select outbox_retry('` + id + `')`,
		`select outbox_retry_all()`,
		`select outbox_relay_drop_partitions('events', '0')`,
		`select * from outbox_relay_checkpoints`,
		`update outbox_relay_checkpoints set epoch = 7`,
		`insert into outbox_relay_batches (slot) values ('x')`,
		`alter table events add x int`,
		`alter publication outbox_relay drop table events`,
		`select pg_create_logical_replication_slot('spy', 'test_decoding')`,
	} {
		var refused *pgconn.PgError
		if _, err := writer.Exec(t.Context(), sql); !errors.As(err, &refused) || refused.Code != "42501" {
			t.Errorf("%s: got %v, want a refusal", sql, err)
		}
	}
	r := b.streaming()
	b.requireStream([]string{id})
	requireLeaves(t, r)
}

// The user of deploy/nats/permissions.conf, as which the relay connects in all
// these tests, has no permission too many: each one that is taken away is named,
// and is all that is missing.
func TestPermissionIsMissing(t *testing.T) {
	user := testenv.RelayUser(t)
	b := setupOn(t, testenv.Postgres(t), testenv.NATSOptions{Edit: func(o *server.Options) {
		o.Users = []*server.User{user, {Username: "anybody"}}
		o.NoAuthUser = "anybody"
	}})
	publish, subscribe := user.Permissions.Publish, user.Permissions.Subscribe
	if len(publish.Allow) != 4 || len(subscribe.Allow) != 1 {
		t.Fatalf("%d and %d permissions", len(publish.Allow), len(subscribe.Allow))
	}
	var ids []string
	for _, c := range []struct {
		list            *[]string
		subject, denied string
	}{ // the stream is made after the first
		{&publish.Allow, "$JS.API.STREAM.CREATE.EVENTS", `Publish to \"$JS.API.STREAM.CREATE.EVENTS\"`},
		{&publish.Allow, "$JS.API.STREAM.INFO.EVENTS", `Publish to \"$JS.API.STREAM.INFO.EVENTS\"`},
		{&publish.Allow, "$JS.API.STREAM.MSG.GET.EVENTS", `Publish to \"$JS.API.STREAM.MSG.GET.EVENTS\"`},
		{&publish.Allow, "events.*.*", `Publish to \"events.order.created\"`},
		{&subscribe.Allow, "_INBOX_outbox.>", `Subscription to \"_INBOX_outbox.`},
	} {
		t.Run(c.subject, func(t *testing.T) {
			whole := *c.list
			i := slices.Index(whole, c.subject)
			if i < 0 {
				t.Fatalf("the user does not have it: %v", whole)
			}
			*c.list = slices.Clone(whole)
			(*c.list)[i] = "another"
			b.nats.Restart()
			ids = append(ids, b.insert(1)...)
			r := b.start()
			r.WaitLog("NATS denies a permission")
			r.Kill()
			if !strings.Contains(r.Logs(), c.denied) || strings.Count(r.Logs(), "denies a permission") != 1 {
				t.Fatal("it is not the one that is missing")
			}
			*c.list = whole
			b.nats.Restart()
			r = b.streaming()
			b.requireStatus("published", ids)
			requireLeaves(t, r)
		})
	}
	b.requireStream(ids)
}

// A permission that is taken from a running relay is waited for.
func TestPermissionComesBack(t *testing.T) {
	user := testenv.RelayUser(t)
	b := setupOn(t, testenv.Postgres(t), testenv.NATSOptions{Edit: func(o *server.Options) {
		o.Users = []*server.User{user, {Username: "anybody"}}
		o.NoAuthUser = "anybody"
	}})
	r := b.streaming()
	allowed := user.Permissions.Publish.Allow
	user.Permissions.Publish.Allow = slices.DeleteFunc(slices.Clone(allowed), func(subject string) bool { return subject == "events.*.*" })
	b.nats.Restart()
	ids := b.insert(3)
	r.WaitLog(`Permissions Violation for Publish to \"events.order.created\"`)
	r.WaitLog("deploy/nats/permissions.conf")
	user.Permissions.Publish.Allow = allowed
	b.nats.Restart()
	b.requireStatus("published", ids)
	b.requireStream(ids)
	requireLeaves(t, r)
}
