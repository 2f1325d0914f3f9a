package outbox

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/lsn"
)

// State is what one fresh snapshot of the database shows: whether inserts
// still come through the publication, and which transactions can be seen.
type State struct {
	Snapshot    Snapshot
	Publication string        // fingerprint; empty where the table is not published any more
	Unlogged    bool          // a partition, or the table itself, writes no WAL
	WALEnd      pglogrepl.LSN // the insert position: past every commit in the snapshot
	Standbys    pglogrepl.LSN // how far synchronized_standby_slots are; the maximum where none is named
}

// NoStandbys is the position of standbys that nobody waits for.
const NoStandbys = ^pglogrepl.LSN(0)

// State takes a new snapshot. The fingerprint changes with every change of the
// publication and of the table's membership, also one that was undone: it is
// the oid and xmin of their catalog rows (function
// outbox_relay_publication_state, made by migrate).
func (t Table) State(ctx context.Context, conn *pgx.Conn) (State, error) {
	var s State
	var snapshot, walEnd string
	var standbys *string
	err := conn.QueryRow(ctx, `
		select pg_catalog.pg_current_snapshot()::text,
			coalesce(`+t.function("outbox_relay_publication_state")+`($1, pg_catalog.to_regclass($2)), ''),
			exists (select from pg_catalog.pg_partition_tree(pg_catalog.to_regclass($2)) p
				join pg_catalog.pg_class c on c.oid = p.relid
				where p.isleaf and c.relpersistence <> 'p'),
			pg_catalog.pg_current_wal_insert_lsn()::text,
			(select min(coalesce(s.restart_lsn, '0/0'))::text
				from pg_catalog.regexp_split_to_table(nullif(
					pg_catalog.current_setting('synchronized_standby_slots', true), ''), '\s*,\s*') as n(name)
				left join pg_catalog.pg_replication_slots s on s.slot_name = pg_catalog.btrim(n.name, '" '))`,
		t.Publication, t.String()).Scan(&snapshot, &s.Publication, &s.Unlogged, &walEnd, &standbys)
	if err != nil {
		return s, fmt.Errorf("inspect publication %s: %w", t.Publication, err)
	}
	if s.Snapshot, err = ParseSnapshot(snapshot); err != nil {
		return s, err
	}
	if s.WALEnd, err = lsn.Parse(walEnd); err != nil {
		return s, err
	}
	s.Standbys = NoStandbys
	if standbys != nil {
		s.Standbys, err = lsn.Parse(*standbys)
	}
	return s, err
}

// PublicationError says why the publication can't be relied on.
type PublicationError struct {
	Publication string
	Reason      string
	Remedy      string
}

func (e *PublicationError) Error() string {
	return fmt.Sprintf("publication %s %s: %s", e.Publication, e.Reason, e.Remedy)
}

// CheckPublication examines the publication in full, and returns a
// PublicationError for what would pass over events.
func (t Table) CheckPublication(ctx context.Context, conn *pgx.Conn) error {
	fault := func(reason, remedy string) error {
		return &PublicationError{Publication: t.Publication, Reason: reason, Remedy: remedy}
	}
	var all, inserts, more, root, chosen, unlogged bool
	var member, filter *bool
	var listed []string
	name := pgx.Identifier{t.Publication}.Sanitize()
	err := conn.QueryRow(ctx, `
		select p.puballtables or exists (select from pg_catalog.pg_publication_namespace n where n.pnpubid = p.oid),
			p.pubinsert, p.pubupdate or p.pubdelete or p.pubtruncate, p.pubviaroot,
			r.oid is not null, r.prqual is not null, r.prattrs is not null,
			array(select a.attname from pg_catalog.pg_attribute a where a.attrelid = r.prrelid and a.attnum > 0
				and not a.attisdropped and (r.prattrs is null or a.attnum = any (r.prattrs::int2[]))),
			exists (select from pg_catalog.pg_partition_tree(pg_catalog.to_regclass($2)) l
				join pg_catalog.pg_class c on c.oid = l.relid where l.isleaf and c.relpersistence <> 'p')
		from pg_catalog.pg_publication p
		left join pg_catalog.pg_publication_rel r on r.prpubid = p.oid and r.prrelid = pg_catalog.to_regclass($2)
		where p.pubname = $1`, t.Publication, t.String()).
		Scan(&all, &inserts, &more, &root, &member, &filter, &chosen, &listed, &unlogged)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return fault("does not exist", "create it with `outbox-relay migrate`")
	case err != nil:
		return fmt.Errorf("read publication %s: %w", t.Publication, err)
	case all:
		return fault("is for all tables or for a schema", "name the table instead: `outbox-relay migrate` with another OUTBOX_PUBLICATION")
	case !inserts:
		return fault("does not publish inserts", fmt.Sprintf("ALTER PUBLICATION %s SET (publish = 'insert')", name))
	case more:
		return fault("publishes more than inserts, which costs the walsender every update of a row", fmt.Sprintf("ALTER PUBLICATION %s SET (publish = 'insert')", name))
	case !root:
		return fault("does not publish partitions under their root", fmt.Sprintf("ALTER PUBLICATION %s SET (publish_via_partition_root = true)", name))
	case !*member:
		return fault("does not contain table "+t.String(), fmt.Sprintf("run `outbox-relay migrate`, or ALTER PUBLICATION %s ADD TABLE %s", name, t))
	case *filter:
		return fault("has a row filter on "+t.String(), "the events that it leaves out would be passed over: remove it")
	case unlogged:
		return fault("covers an unlogged table or partition", "it writes no WAL, so its events would be passed over: ALTER TABLE … SET LOGGED")
	}
	have := Layout{Columns: map[string]bool{}}
	for _, column := range listed {
		have.Columns[column] = true
	}
	if missing := have.Lacks(t.Columns.Required()); len(missing) > 0 {
		return fault("does not list column "+strings.Join(missing, ", "), "run `outbox-relay migrate`, which extends the list")
	}
	// A list that has something else in the place of a column that may be missing
	// was made before that was renamed: the message would come without it.
	strange, unlisted := t.Columns.strange(listed), have.Lacks(t.Columns.names(false))
	if chosen && len(strange) > 0 && len(unlisted) > 0 {
		return fault(fmt.Sprintf("lists column %s, and not %s, which the message takes", strings.Join(strange, ", "), strings.Join(unlisted, ", ")),
			fmt.Sprintf("if it was renamed, give it its name back; else add %s to the table and run `outbox-relay migrate`", strings.Join(unlisted, ", ")))
	}
	return nil
}
