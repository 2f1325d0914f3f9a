package outbox

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Belongings is what is there of a relay in its database.
type Belongings struct {
	Slot        bool
	PID         int    // of the walsender that has the slot; 0: none
	Plugin      string // of the slot
	Here        bool   // the slot is of this database
	Publication bool
	Shared      string // why the publication is not this relay's alone; empty: it is
	Waiting     int    // outcomes that are not written to their rows yet
	Kept        int    // rejected events whose row is gone
}

// Belongings looks for what belongs to the relay of the table's slot.
func (t Table) Belongings(ctx context.Context, conn *pgx.Conn) (Belongings, error) {
	var b Belongings
	var others, tables []string
	err := conn.QueryRow(ctx, `select s.slot_name is not null, coalesce(s.active_pid, 0), coalesce(s.plugin, ''),
			coalesce(s.database = pg_catalog.current_database(), false),
			p.oid is not null,
			array(select slot from `+t.own("outbox_relay_checkpoints")+` where slot <> $1 order by 1),
			case when p.puballtables or exists (select from pg_catalog.pg_publication_namespace n where n.pnpubid = p.oid)
				then array['all tables, or those of a schema']
				else array(select r.prrelid::regclass::text from pg_catalog.pg_publication_rel r
					where r.prpubid = p.oid and r.prrelid is distinct from pg_catalog.to_regclass($3) order by 1) end,
			(select count(*) from `+t.leftovers()+` where slot = $1 and waiting),
			(select count(*) from `+t.leftovers()+` where slot = $1 and not waiting)
		from (select) as one
		left join pg_catalog.pg_replication_slots s on s.slot_name = $1
		left join pg_catalog.pg_publication p on p.pubname = $2`, t.Slot, t.Publication, t.String()).
		Scan(&b.Slot, &b.PID, &b.Plugin, &b.Here, &b.Publication, &others, &tables, &b.Waiting, &b.Kept)
	if err != nil {
		return b, fmt.Errorf("look for what belongs to slot %s: %w", t.Slot, err)
	}
	switch {
	case len(others) > 0:
		b.Shared = "there are checkpoints of other slots, whose relays may use it: " + strings.Join(others, ", ")
	case len(tables) > 0:
		b.Shared = "it publishes more than this table: " + strings.Join(tables, ", ")
	}
	return b, nil
}

// Dropped is what Drop has removed.
type Dropped struct {
	Checkpoints, History, Batches, Backlog, Leftovers int64
	Slot, Publication                                 bool
}

// Drop removes the relay's rows, its publication unless that is shared, and its
// slot last: whatever fails before leaves all as it was. It can be run again.
func (t Table) Drop(ctx context.Context, conn *pgx.Conn, b Belongings) (Dropped, error) {
	var d Dropped
	err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		for _, own := range []struct {
			table string
			rows  *int64
		}{
			{"outbox_relay_checkpoints", &d.Checkpoints}, {"outbox_relay_history", &d.History},
			{"outbox_relay_batches", &d.Batches}, {"outbox_relay_backlog", &d.Backlog}, {"outbox_relay_leftovers", &d.Leftovers},
		} {
			tag, err := tx.Exec(ctx, `delete from `+t.own(own.table)+` where slot = $1`, t.Slot)
			if err != nil {
				return fmt.Errorf("delete the rows of slot %s from %s: %w", t.Slot, own.table, err)
			}
			*own.rows = tag.RowsAffected()
		}
		if b.Publication && b.Shared == "" {
			if _, err := tx.Exec(ctx, `drop publication `+pgx.Identifier{t.Publication}.Sanitize()); err != nil {
				return fmt.Errorf("drop publication %s: %w", t.Publication, err)
			}
			d.Publication = true
		}
		if !b.Slot {
			return nil
		}
		d.Slot = true
		if _, err := tx.Exec(ctx, `select pg_catalog.pg_drop_replication_slot($1)`, t.Slot); err != nil {
			return fmt.Errorf("drop slot %s: %w", t.Slot, err)
		}
		return nil
	})
	if err != nil {
		return Dropped{}, err
	}
	return d, nil
}
