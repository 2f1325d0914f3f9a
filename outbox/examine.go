package outbox

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/internal/fault"
)

// Room is what the server has left for a relay, and how it holds WAL for one.
// Sizes and times are as SHOW prints them.
type Room struct {
	MaxSlots, Slots     int
	MaxSenders, Senders int      // walsenders, those of standbys too
	KeepSize            string   // max_slot_wal_keep_size; -1: no bound
	IdleTimeout         string   // idle_replication_slot_timeout, of 18; 0: none
	Standbys            int      // physical slots that are in use
	Synchronized        string   // synchronized_standby_slots, from 17 on
	Away                []string // names in it whose slot is not there or not in use: the walsender waits for them
}

// ReadRoom looks around the server; every role may.
func ReadRoom(ctx context.Context, conn *pgx.Conn) (r Room, err error) {
	err = conn.QueryRow(ctx, `select current_setting('max_replication_slots')::int,
			(select count(*) from pg_catalog.pg_replication_slots),
			current_setting('max_wal_senders')::int, (select count(*) from pg_catalog.pg_stat_replication),
			current_setting('max_slot_wal_keep_size'), coalesce(current_setting('idle_replication_slot_timeout', true), '0'),
			(select count(*) from pg_catalog.pg_replication_slots where slot_type = 'physical' and active),
			coalesce(current_setting('synchronized_standby_slots', true), ''),
			array(select n.name from pg_catalog.regexp_split_to_table(nullif(
					current_setting('synchronized_standby_slots', true), ''), '[[:space:]]*,[[:space:]]*') as n(name)
				left join pg_catalog.pg_replication_slots s on s.slot_name = pg_catalog.btrim(n.name, '" ')
				where s.active is not true)`).
		Scan(&r.MaxSlots, &r.Slots, &r.MaxSenders, &r.Senders, &r.KeepSize, &r.IdleTimeout, &r.Standbys, &r.Synchronized, &r.Away)
	if err != nil {
		return r, fmt.Errorf("read the server's limits: %w", err)
	}
	return r, nil
}

// Link is how the connection comes to the server.
type Link struct {
	User, Database string
	Proxied        bool   // something answers in the server's place: its process ids are not the server's
	TLS            string // version and cipher, as the server says; empty: none
}

// ReadLink asks the server about the connection.
func ReadLink(ctx context.Context, conn *pgx.Conn) (l Link, err error) {
	var pid uint32
	err = conn.QueryRow(ctx, `select current_user, current_database(), pg_catalog.pg_backend_pid(),
			coalesce((select version || ', ' || cipher from pg_catalog.pg_stat_ssl where ssl and pid = pg_catalog.pg_backend_pid()), '')`).
		Scan(&l.User, &l.Database, &pid, &l.TLS)
	if err != nil {
		return l, fmt.Errorf("ask the server about the connection: %w", err)
	}
	l.Proxied = pid != conn.PgConn().PID()
	return l, nil
}

// Uses says which rights a configuration needs beyond those that every relay has.
type Uses struct {
	Retention bool
	Retries   bool
}

// MissingGrants names the rights that the role lacks, as the statements that give
// them; count is how many were looked for. It needs what ReadLink does, and no more.
func (t Table) MissingGrants(ctx context.Context, conn *pgx.Conn, uses Uses) (missing []string, count int, err error) {
	var user, database string
	var connects, enters bool
	err = conn.QueryRow(ctx, `select current_user, current_database(), has_database_privilege(current_database(), 'CONNECT'),
		coalesce((select has_schema_privilege(oid, 'USAGE') from pg_catalog.pg_namespace where nspname = $1), true)`, t.Schema).
		Scan(&user, &database, &connects, &enters)
	if err != nil {
		return nil, 0, fmt.Errorf("read the role's rights: %w", err)
	}
	to := " TO " + pgx.Identifier{user}.Sanitize()
	if !connects {
		missing = append(missing, "GRANT CONNECT ON DATABASE "+pgx.Identifier{database}.Sanitize()+to)
	}
	if !enters { // nothing in it can be looked at either
		return append(missing, "GRANT USAGE ON SCHEMA "+pgx.Identifier{t.Schema}.Sanitize()+to), 2, nil
	}
	count = 2
	for _, g := range t.grants(uses) {
		lacks, err := g.missing(ctx, conn)
		if err != nil {
			return nil, 0, fmt.Errorf("read the role's rights: %w", err)
		}
		for _, right := range lacks {
			missing = append(missing, "GRANT "+right+" ON "+g.object+to)
		}
		count += max(len(g.rights), 1)
	}
	return missing, count, nil
}

// grant is rights on one object: of a table, of its columns, or to execute a
// function.
type grant struct {
	object  string // as GRANT names it
	name    string // for to_regclass or to_regprocedure
	kind    string
	rights  []string
	columns []string // UPDATE of these
	of      string   // the table that has to be partitioned for it to matter
}

func (t Table) grants(uses Uses) []grant {
	events := grant{object: t.String(), name: t.String(), rights: []string{"SELECT"}}
	update := grant{object: t.String(), name: t.String(), kind: "columns",
		columns: []string{"status", "published_at", "failed_at", "failed_reasons", "failed_attempts"}}
	if t.Mode == Delete || uses.Retention {
		events.rights = append(events.rights, "DELETE")
	}
	if uses.Retries {
		update.columns = append(update.columns, "retried_at", "retried_attempts")
	}
	all := []grant{events, update, t.ownGrant("outbox_relay_checkpoints", "SELECT", "INSERT", "UPDATE")}
	for _, name := range []string{"outbox_relay_leftovers", "outbox_relay_history", "outbox_relay_batches", "outbox_relay_backlog"} {
		all = append(all, t.ownGrant(name, "SELECT", "INSERT", "UPDATE", "DELETE"))
	}
	all = append(all, t.executeGrant("outbox_relay_publication_state(name, regclass)"), t.executeGrant("outbox_relay_check_partition_key(regclass)"))
	all = append(all, t.ownGrant("outbox_relay_secret", "SELECT"))
	if uses.Retries {
		all = append(all, t.executeGrant("outbox_relay_ask(regclass, text)"), t.executeGrant(t.ownName("outbox_retry")+"(text[])"),
			t.executeGrant(t.ownName("outbox_retry_all")+"()"))
	}
	if uses.Retention {
		drop := t.executeGrant("outbox_relay_drop_partitions(regclass, interval)")
		drop.kind, drop.of = "partitions", t.String()
		all = append(all, drop)
	}
	return all
}

func (t Table) ownGrant(name string, rights ...string) grant {
	own := pgx.Identifier{t.Schema, name}.Sanitize()
	return grant{object: own, name: own, rights: rights}
}

func (t Table) executeGrant(signature string) grant {
	arguments := strings.LastIndex(signature, "(")
	own := t.function(signature[:arguments]) + signature[arguments:]
	return grant{object: "FUNCTION " + own, name: own, kind: "function"}
}

// missing returns the rights that the role lacks on the object; none where that
// is not there.
func (g grant) missing(ctx context.Context, conn *pgx.Conn) (lacks []string, err error) {
	switch g.kind {
	case "columns":
		var columns []string
		err = conn.QueryRow(ctx, `select array(select pg_catalog.quote_ident(attname) from pg_catalog.pg_attribute
			where attrelid = pg_catalog.to_regclass($1) and attname = any ($2) and not attisdropped
				and not has_column_privilege(attrelid, attnum, 'UPDATE')
			order by array_position($2, attname::text))`, g.name, g.columns).Scan(&columns)
		if len(columns) > 0 {
			lacks = []string{"UPDATE (" + strings.Join(columns, ", ") + ")"}
		}
	case "function", "partitions":
		var may bool
		err = conn.QueryRow(ctx, `select coalesce(has_function_privilege(pg_catalog.to_regprocedure($1), 'EXECUTE'), true)
			or $2 <> '' and exists (select from pg_catalog.pg_class where oid = pg_catalog.to_regclass($2) and relkind <> 'p')`, g.name, g.of).Scan(&may)
		if !may {
			lacks = []string{"EXECUTE"}
		}
	default:
		err = conn.QueryRow(ctx, `select array(select r from unnest($2::text[]) r
			where not has_table_privilege(pg_catalog.to_regclass($1), r))`, g.name, g.rights).Scan(&lacks)
		if len(lacks) > 1 {
			lacks = []string{strings.Join(lacks, ", ")}
		}
	}
	return lacks, err
}

// Trigger is the one that migrate makes, which fills what is new in a row.
type Trigger struct {
	Name        string // on_<table>_create
	There       bool
	Enabled     bool   // it fires for inserts
	Function    string // that it calls, for SQL
	Unqualified bool   // the function finds gen_random_ulid() by the search_path of whoever inserts
}

// ReadTrigger looks at the table's trigger.
func (t Table) ReadTrigger(ctx context.Context, conn *pgx.Conn) (g Trigger, err error) {
	g.Name = "on_" + t.Name + "_create"
	err = conn.QueryRow(ctx, `select g.oid is not null, coalesce(g.tgenabled in ('O', 'A'), false), coalesce(f.oid::pg_catalog.regprocedure::text, ''),
			coalesce(pg_catalog.regexp_replace(f.prosrc, '--[^\n]*', '', 'g') ~ '(^|[^."[:alnum:]_])gen_random_ulid[[:space:]]*[(]', false)
				and not exists (select from unnest(f.proconfig) as c where c like 'search_path=%')
		from pg_catalog.pg_class c left join pg_catalog.pg_trigger g on g.tgrelid = c.oid and g.tgname = $2
			left join pg_catalog.pg_proc f on f.oid = g.tgfoid
		where c.oid = pg_catalog.to_regclass($1)`, t.String(), g.Name).
		Scan(&g.There, &g.Enabled, &g.Function, &g.Unqualified)
	if err != nil {
		return g, fmt.Errorf("look at the trigger of table %s: %w", t, err)
	}
	return g, nil
}

// CheckIdentity asks Postgres whether it takes the relay's changes of a row, and of what
// the relay has for itself, by having it plan them. It refuses them, as those of everybody, where another
// publication publishes updates or deletes of the table, and the table has no
// replica identity, or the publication does not list its columns.
func (t Table) CheckIdentity(ctx context.Context, conn *pgx.Conn) error {
	statements := []string{`update ` + t.String() + ` e set status = status where ` + t.id("e") + ` = ''`}
	if t.Mode == Delete {
		statements = append(statements, `delete from `+t.String()+` e where `+t.id("e")+` = ''`)
	}
	for _, own := range t.ownTables() {
		statements = append(statements, `update `+own+` set slot = slot where slot = ''`)
	}
	for _, statement := range statements {
		_, err := conn.Exec(ctx, `explain `+statement)
		var pgErr *pgconn.PgError
		switch {
		case errors.As(err, &pgErr) && (pgErr.Code == "55000" || pgErr.Code == "42P10"): // object not in prerequisite state, invalid column reference
			return t.identityFault(ctx, conn, pgErr)
		case err != nil:
			return fmt.Errorf("plan an outcome of table %s: %w", t, err)
		}
	}
	return nil
}

// family is the table and its partitions; pg_partition_tree has nothing for a
// table that is not partitioned.
const family = `(select relid::oid from pg_catalog.pg_partition_tree(pg_catalog.to_regclass($1))
			union select pg_catalog.to_regclass($1)::oid)`

// identityFault says what is in the way, and how it goes.
func (t Table) identityFault(ctx context.Context, conn *pgx.Conn, refused *pgconn.PgError) error {
	f := &fault.Error{What: "no outcome can be recorded, since Postgres refuses it: " + refused.Message, Cause: refused,
		Remedy: "another publication publishes updates or deletes of the table: give it a replica identity"}
	ask := `select array(select format('ALTER TABLE %s REPLICA IDENTITY %s', c.oid::regclass,
			case when exists (select from pg_catalog.pg_index i where i.indrelid = c.oid and i.indisprimary) then 'DEFAULT' else 'FULL' end)
		from ` + family + ` l join pg_catalog.pg_class c on c.oid = l.relid
		where c.relkind = 'r' and not case c.relreplident when 'f' then true when 'n' then false
			else exists (select from pg_catalog.pg_index i where i.indrelid = c.oid
				and case c.relreplident when 'd' then i.indisprimary else i.indisreplident end) end)`
	if refused.Code != "55000" {
		f.What += ": " + refused.Detail
		f.Remedy = "another publication publishes updates or deletes of the table, and not all of its columns or rows: let it publish all"
		ask = `select array(select format('ALTER PUBLICATION %1$I DROP TABLE %2$s; ALTER PUBLICATION %1$I ADD TABLE %2$s', p.pubname, r.prrelid::regclass)
			from pg_catalog.pg_publication_rel r join pg_catalog.pg_publication p on p.oid = r.prpubid and (p.pubupdate or p.pubdelete)
			where (r.prattrs is not null or r.prqual is not null)
				and r.prrelid in (select relid from ` + family + ` l)
			order by p.pubname)`
	}
	var statements []string
	if err := conn.QueryRow(ctx, ask, t.String()).Scan(&statements); err != nil {
		return fmt.Errorf("look for the publications of table %s: %w", t, err)
	}
	f.SQL = strings.Join(statements, "; ")
	return f
}

// SlotDetails is what the server says of a slot beyond replication.Slot; what a
// version does not know is nil.
type SlotDetails struct {
	SlotState
	InactiveSince *time.Time // from 17 on
	Failover      *bool      // from 17 on
}

// ReadSlotDetails reads them; pgx.ErrNoRows where there is no slot.
func (t Table) ReadSlotDetails(ctx context.Context, conn *pgx.Conn) (d SlotDetails, err error) {
	if err := t.readSlot(ctx, conn, &d.SlotState); err != nil {
		return d, fmt.Errorf("read slot %s: %w", t.Slot, err)
	}
	err = conn.QueryRow(ctx, `select (s ->> 'inactive_since')::timestamptz, (s ->> 'failover')::boolean
		from (select to_jsonb(r) as s from pg_catalog.pg_replication_slots r where slot_name = $1) as j`, t.Slot).
		Scan(&d.InactiveSince, &d.Failover)
	if err != nil {
		return d, fmt.Errorf("read slot %s: %w", t.Slot, err)
	}
	return d, nil
}

// Lacking returns the functions that migrate makes and are not there, by their
// signatures; retry is the table's own, of package migrations.
func (t Table) Lacking(ctx context.Context, conn *pgx.Conn, retry ...string) (lacking []string, err error) {
	for _, signature := range slices.Concat([]string{"outbox_relay_publication_state(name, regclass)", "outbox_relay_publish(name, regclass, text[])",
		"outbox_relay_check_partition_key(regclass)", "outbox_relay_drop_partitions(regclass, interval)", "outbox_relay_ask(regclass, text)"}, retry) {
		var there bool
		own := t.executeGrant(signature).name
		if err := conn.QueryRow(ctx, `select pg_catalog.to_regprocedure($1) is not null`, own).Scan(&there); err != nil {
			return nil, fmt.Errorf("look for function %s: %w", own, err)
		}
		if !there {
			lacking = append(lacking, own)
		}
	}
	return lacking, nil
}
