package outbox

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Partition is a partition that holds rows of the table.
type Partition struct {
	OID   uint32
	Name  string // as SQL has it
	Empty bool
	// Recent says that it, or what it is a partition of, was attached in WAL that the slot
	// still holds the catalog for: maybe while no relay ran.
	Recent bool
	// Constraint is the condition that its rows fulfil: a query of the table with it looks
	// in no other partition, and needs no right on this one.
	Constraint string
}

// Partitions returns the partitions of the table; none where it is not partitioned.
func (t Table) Partitions(ctx context.Context, conn *pgx.Conn) ([]Partition, error) {
	rows, err := conn.Query(ctx, `select c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname),
			pg_catalog.pg_relation_size(c.oid) = 0,
			exists (select from pg_catalog.pg_partition_ancestors(c.oid) a join pg_catalog.pg_inherits i on i.inhrelid = a.relid
				join pg_catalog.pg_replication_slots s on s.slot_name = $2
				where pg_catalog.age(i.xmin) <= pg_catalog.age(s.catalog_xmin)),
			coalesce(pg_catalog.pg_get_partition_constraintdef(c.oid), 'true')
		from pg_catalog.pg_partition_tree(pg_catalog.to_regclass($1)) p
		join pg_catalog.pg_class c on c.oid = p.relid join pg_catalog.pg_namespace n on n.oid = c.relnamespace
		where p.isleaf and p.parentrelid is not null`, t.String(), t.Slot)
	if err != nil {
		return nil, fmt.Errorf("list the partitions of %s: %w", t, err)
	}
	partitions, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Partition])
	if err != nil {
		return nil, fmt.Errorf("list the partitions of %s: %w", t, err)
	}
	return partitions, nil
}

// PendingSeen returns the ids of pending rows in a partition, of at most limit that it looks
// at, which could be seen in that snapshot already and have no outcome that waits.
func (t Table) PendingSeen(ctx context.Context, conn *pgx.Conn, p Partition, in Snapshot, limit int) ([]string, error) {
	rows, err := conn.Query(ctx, fmt.Sprintf(`select id, xmin from (select %[1]s as id, e.xmin::text::bigint from %[2]s e
			where e.tableoid = $2 and e.status = 'pending' and (%[3]s)) as e(id, xmin)
		where not exists (select from %[4]s l where l.slot = $1 and l.id = e.id) limit %[5]d`,
		t.id("e"), t, p.Constraint, t.leftovers(), limit), t.Slot, p.OID)
	if err != nil {
		return nil, fmt.Errorf("look for pending rows of partition %s: %w", p.Name, err)
	}
	var ids []string
	var id string
	var xmin int64
	_, err = pgx.ForEachRow(rows, []any{&id, &xmin}, func() error {
		if in.Visible(uint32(xmin)) {
			ids = append(ids, id)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("look for pending rows of partition %s: %w", p.Name, err)
	}
	return ids, nil
}
