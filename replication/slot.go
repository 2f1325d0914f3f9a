package replication

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/fault"
	"outbox-relay/internal/lsn"
)

// ErrNoSlot says that the slot does not exist.
var ErrNoSlot = errors.New("no such replication slot")

// Slot is a row of pg_replication_slots.
type Slot struct {
	Name      string
	Plugin    string
	Type      string // logical or physical
	Database  string
	Temporary bool
	TwoPhase  bool
	Active    bool
	Confirmed pglogrepl.LSN // 0 where there is none
	WALStatus string        // reserved, extended, unreserved, lost
	// Invalidation is why it is lost: wal_removed, idle_timeout and others; empty: it is not,
	// or the server, older than 17, does not say.
	Invalidation string
}

// ReadSlot reads the slot's state, or ErrNoSlot.
func ReadSlot(ctx context.Context, conn *pgx.Conn, name string) (Slot, error) {
	s := Slot{Name: name}
	var confirmed string
	err := conn.QueryRow(ctx, `select coalesce(plugin, ''), slot_type, coalesce(database, ''), temporary, two_phase,
			active, coalesce(confirmed_flush_lsn, '0/0')::text, coalesce(wal_status, ''), coalesce(pg_catalog.to_jsonb(r) ->> 'invalidation_reason', '')
		from pg_catalog.pg_replication_slots r where slot_name = $1`, name).
		Scan(&s.Plugin, &s.Type, &s.Database, &s.Temporary, &s.TwoPhase, &s.Active, &confirmed, &s.WALStatus, &s.Invalidation)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return s, ErrNoSlot
	case err != nil:
		return s, fmt.Errorf("read slot %s: %w", name, err)
	}
	s.Confirmed, err = lsn.Parse(confirmed)
	return s, err
}

// Lost reports whether Postgres has invalidated the slot: WAL that it needs is
// gone, so nothing comes out of it any more.
func (s Slot) Lost() bool { return s.WALStatus == "lost" }

// Why says by which setting Postgres has invalidated a slot, from the reason that it gives.
// Source: https://www.postgresql.org/docs/18/view-pg-replication-slots.html
func Why(invalidation string) string {
	switch invalidation {
	case "idle_timeout":
		return "no relay read from it for longer than idle_replication_slot_timeout"
	case "", "wal_removed":
		return "WAL that it needs is gone (max_slot_wal_keep_size)"
	}
	return "Postgres gives the reason " + invalidation
}

// Check returns an error that says why a relay of this database can't use the
// slot, and what to do.
func (s Slot) Check(database string) error {
	const another = "choose another OUTBOX_SLOT"
	sql := fmt.Sprintf("SELECT pg_drop_replication_slot('%s')", s.Name)
	switch {
	case s.Type != "logical" || s.Plugin != "pgoutput":
		return &fault.Error{What: fmt.Sprintf("slot %s is a %s slot of plugin %q, and the relay needs pgoutput", s.Name, s.Type, s.Plugin),
			Remedy: another + ", or remove it: " + sql, SQL: sql}
	case s.Database != database:
		return &fault.Error{What: fmt.Sprintf("slot %s belongs to database %q, not to %q", s.Name, s.Database, database), Remedy: another}
	case s.Temporary:
		return &fault.Error{What: fmt.Sprintf("slot %s is temporary", s.Name), Remedy: another}
	case s.TwoPhase:
		return &fault.Error{What: fmt.Sprintf("slot %s decodes prepared transactions before they commit (two_phase)", s.Name),
			Remedy: another + ", or remove it: " + sql, SQL: sql}
	}
	return nil
}
