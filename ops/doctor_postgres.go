package ops

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/internal/charset"
	"outbox-relay/internal/fault"
	"outbox-relay/outbox"
)

// Names of the checks of Postgres, as far as they depend on a connection.
var postgresChecks = []string{"server_version", "primary", "wal_level", "encoding", "pooler", "tls", "replication", "replication_slots", "wal_senders",
	"slot_limits", "standbys", "privileges"}

func (e *examination) postgres(ctx context.Context) {
	if !e.connectPostgres(ctx) {
		why := "no connection to Postgres"
		e.skip(why, postgresChecks...)
		e.skip(why, tableChecks...)
		e.skip(why, slotChecks...)
		return
	}
	e.checkServer()
	e.checkLink(ctx)
	e.checkReplication(ctx)
	e.checkRoom(ctx)
	if e.server.Recovery {
		e.skip("the server is in recovery", append(append([]string{"privileges"}, tableChecks...), slotChecks...)...)
		return
	}
	if !e.checkPrivileges(ctx) {
		e.skip("the role may not look into the schema", append(append([]string{}, tableChecks...), slotChecks...)...)
		return
	}
	e.checkTable(ctx)
	e.checkSlots(ctx)
}

func (e *examination) connectPostgres(ctx context.Context) bool {
	var err error
	if e.sql, err = e.Postgres(ctx); !e.judge("connection", err) {
		return false
	}
	if e.server, err = e.Server(ctx); !e.judge("connection", err) {
		return false
	}
	c := e.sql.Config()
	e.ok("connection", "%s as %s, database %s", net.JoinHostPort(c.Host, fmt.Sprint(c.Port)), c.User, c.Database)
	return true
}

func (e *examination) checkServer() {
	if e.judge("server_version", e.server.CheckVersion()) {
		e.ok("server_version", "%s", e.server.Name)
	}
	if e.judge("primary", e.server.CheckRecovery()) {
		e.ok("primary", "not in recovery")
	}
	if e.judge("wal_level", e.server.CheckWALLevel()) {
		e.ok("wal_level", "%s", e.server.WALLevel)
	}
	e.checkEncoding(charset.Of(e.sql.PgConn().ParameterStatus("server_encoding")))
}

// checkEncoding says what becomes of text that does not convert to UTF-8.
func (e *examination) checkEncoding(text charset.Charset) {
	switch {
	case text.Name == "UTF8":
		e.ok("encoding", "UTF8: every text can be sent")
	case text.Raw():
		e.warn("encoding", &fault.Error{What: text.Name + ": a row whose text has bytes that are no characters is parked, since a message is UTF-8",
			Remedy: "move to a database in UTF8"})
	default:
		e.warn("encoding", &fault.Error{What: text.Name + ": Postgres can't send a row whose text has bytes that are no characters, and the slot can't be read past it: " +
			"then the slot is recreated, and the pending rows are published from the table, but with keep the relay stops",
			Remedy: "move to a database in UTF8"})
	}
}

// checkLink looks at what lies between the doctor and the server.
func (e *examination) checkLink(ctx context.Context) {
	link, err := outbox.ReadLink(ctx, e.sql)
	if err != nil {
		e.judge("pooler", err)
		e.skip("the server did not say", "tls")
		return
	}
	if link.Proxied {
		e.warn("pooler", &fault.Error{What: "a pooler or proxy answers in the server's place: the relay needs a session of its own from end to end",
			Remedy: "let OUTBOX_POSTGRES_URL name the server itself"})
	} else {
		e.ok("pooler", "none: the server itself answers")
	}
	state, f := judgeTLS(e.sql.Config(), link.TLS)
	e.add("tls", state, f)
}

// judgeTLS judges what the server says of the connection's encryption; empty: it
// has none. Within the machine it needs none.
func judgeTLS(config *pgx.ConnConfig, inUse string) (state string, f *fault.Error) {
	local := isLocal(config.Host)
	const remedy = "add sslmode=verify-full and sslrootcert to OUTBOX_POSTGRES_URL"
	switch {
	case inUse == "" && local:
		return stateOK, &fault.Error{What: "none, on this machine"}
	case inUse == "":
		return stateWarning, &fault.Error{What: "the connection is not encrypted", Remedy: remedy}
	case !verified(config) && !local:
		return stateWarning, &fault.Error{What: inUse + "; nobody looks whether the server is the one that is meant", Remedy: remedy}
	}
	return stateOK, &fault.Error{What: inUse + "; " + binding(config)}
}

// verified reports whether the server's certificate is looked at: pgx does so by
// a function of its own for verify-ca.
func verified(config *pgx.ConnConfig) bool {
	tls := config.TLSConfig
	return tls != nil && (!tls.InsecureSkipVerify || tls.VerifyPeerCertificate != nil || tls.VerifyConnection != nil)
}

// binding says what is certain of channel binding: the server tells nobody
// whether it was used.
func binding(config *pgx.ConnConfig) string {
	switch config.ChannelBinding {
	case "require":
		return "the password is bound to it (channel_binding=require)"
	case "disable":
		return "channel binding is off"
	}
	return "channel binding where the server offers it; channel_binding=require makes sure"
}

// isLocal reports whether the host is this machine: a loopback address, or the
// folder of a socket.
func isLocal(host string) bool {
	ip := net.ParseIP(host)
	return strings.HasPrefix(host, "/") || strings.HasPrefix(host, "@") || host == "localhost" || ip != nil && ip.IsLoopback()
}

// checkReplication tries it, which needs the right to and a walsender.
func (e *examination) checkReplication(ctx context.Context) {
	if e.server.Recovery {
		e.skip("the server is in recovery", "replication")
		return
	}
	system, err := e.Replication(ctx)
	switch {
	case isFull(err):
		e.full(ctx, err)
	case e.judge("replication", err):
		e.system = system
		e.ok("replication", "a replication connection was opened: cluster %s, timeline %d", system.ID, system.Timeline)
	}
}

func isFull(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == "53300" // too_many_connections: no walsender is left, too
}

// full says that no walsender is left: beside a relay that has its own, that is
// no fault.
func (e *examination) full(ctx context.Context, err error) {
	f := fault.Of(err)
	state, senders := stateFault, 0
	var reads bool
	err = e.sql.QueryRow(ctx, `select exists (select from pg_catalog.pg_replication_slots where slot_name = $1 and active),
		current_setting('max_wal_senders')::int`, e.Config.Table.Slot).Scan(&reads, &senders)
	if !e.judge("replication", err) {
		return
	}
	if reads {
		state = stateWarning
	}
	e.add("replication", state, &fault.Error{What: f.What, Remedy: "raise max_wal_senders, and restart Postgres, or end what uses them",
		SQL: fmt.Sprintf("ALTER SYSTEM SET max_wal_senders = %d", senders+5)})
}

func (e *examination) checkRoom(ctx context.Context) {
	room, err := outbox.ReadRoom(ctx, e.sql)
	if err != nil {
		e.judge("replication_slots", err)
		e.skip("the server did not say", "wal_senders", "slot_limits", "standbys")
		return
	}
	e.ok("wal_senders", "%d of %d are in use just now (max_wal_senders)", room.Senders, room.MaxSenders)
	e.checkSlotRoom(ctx, room)
	e.checkLimits(room)
	e.checkStandbys(room)
}

// checkSlotRoom looks whether the relay's slot can be made, where it is not yet.
func (e *examination) checkSlotRoom(ctx context.Context, room outbox.Room) {
	var there bool
	err := e.sql.QueryRow(ctx, `select exists (select from pg_catalog.pg_replication_slots where slot_name = $1)`, e.Config.Table.Slot).Scan(&there)
	found := fmt.Sprintf("%d of %d are in use (max_replication_slots)", room.Slots, room.MaxSlots)
	switch {
	case !e.judge("replication_slots", err):
	case !there && room.Slots >= room.MaxSlots:
		e.add("replication_slots", stateFault, &fault.Error{What: found + ": none is left for " + e.Config.Table.Slot,
			Remedy: "drop one that nobody needs, or raise it and restart Postgres",
			SQL:    fmt.Sprintf("ALTER SYSTEM SET max_replication_slots = %d", room.MaxSlots+5)})
	default:
		e.ok("replication_slots", "%s", found)
	}
}

// checkLimits looks at what bounds the WAL that a slot holds: what is lost by it
// comes from the table, but with keep.
func (e *examination) checkLimits(room outbox.Room) {
	keep := e.Config.Table.Mode == outbox.Keep
	bounded, idle := room.KeepSize != "-1", room.IdleTimeout != "0"
	switch {
	case keep && (bounded || idle):
		e.warn("slot_limits", &fault.Error{What: fmt.Sprintf("max_slot_wal_keep_size is %s, idle_replication_slot_timeout is %s: Postgres may invalidate the slot, and with OUTBOX_AFTER_PUBLISH=keep nobody can tell what it has lost",
			room.KeepSize, room.IdleTimeout), Remedy: "watch the slot, or take OUTBOX_AFTER_PUBLISH=mark"})
	case idle:
		loosen, sql := loosened("idle_timeout")
		e.warn("slot_limits", &fault.Error{What: fmt.Sprintf("idle_replication_slot_timeout is %s: Postgres invalidates the slot of a relay that is away for longer", room.IdleTimeout),
			Remedy: loosen + ": max_slot_wal_keep_size bounds what a slot holds", SQL: sql})
	case bounded || keep:
		e.ok("slot_limits", "max_slot_wal_keep_size is %s", room.KeepSize)
	default:
		e.warn("slot_limits", &fault.Error{What: "max_slot_wal_keep_size is -1: while no relay runs, its slot holds WAL until the disk is full",
			Remedy: "bound it below what the disk has: a slot that is lost by it is made anew, with what it has lost from the table",
			SQL:    "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf()"})
	}
}

func (e *examination) checkStandbys(room outbox.Room) {
	switch {
	case len(room.Away) > 0:
		e.add("standbys", stateFault, &fault.Error{What: "synchronized_standby_slots names " + strings.Join(room.Away, ", ") + ", which no standby uses: no event is sent until it does",
			Remedy: "start the standby, or take its slot out", SQL: "ALTER SYSTEM SET synchronized_standby_slots = ''; SELECT pg_reload_conf()"})
	case room.Synchronized != "":
		e.ok("standbys", "synchronized_standby_slots is %s", room.Synchronized)
	case room.Standbys > 0 && e.server.Version >= 170000:
		e.warn("standbys", &fault.Error{What: "standbys read from slots, and synchronized_standby_slots is empty: after a promotion the stream can hold events that the new primary does not have",
			Remedy: "name in it the slots of those that may be promoted"})
	case room.Standbys > 0:
		e.warn("standbys", &fault.Error{What: "standbys read from slots: before Postgres 17 the relay's slot does not follow a promotion, and the stream can hold events that the new primary does not have",
			Remedy: "after one, start the relay: it says what it finds, and publishes from the table"})
	default:
		e.ok("standbys", "none reads from a slot")
	}
}
