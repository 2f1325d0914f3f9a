package outbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/fault"
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
					pg_catalog.current_setting('synchronized_standby_slots', true), ''), '[[:space:]]*,[[:space:]]*') as n(name)
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

// publicationFacts is what the catalog says of the publication.
type publicationFacts struct {
	all, inserts, more, root, chosen bool
	member, filter                   *bool
	listed                           []string // the table's columns that it publishes
	unlogged                         []string // partitions, or the table, that write no WAL
}

// PublicationFaults is what is wrong with the publication, each part on its own;
// nil where nothing is.
type PublicationFaults struct {
	Table      error // it is not there, or not of the table
	Operations error // it does not publish inserts, and nothing else
	Root       error // partitions come under their own names
	Filter     error // rows are left out
	Columns    error // columns that the message needs are left out
	Logged     error // a part of the table writes no WAL
}

// CheckPublication examines the publication in full, and returns the first fault
// that would pass over events.
func (t Table) CheckPublication(ctx context.Context, conn *pgx.Conn) error {
	f, err := t.PublicationFaults(ctx, conn)
	if err != nil {
		return err
	}
	return cmp.Or(f.Table, f.Operations, f.Root, f.Filter, f.Logged, f.Columns)
}

// PublicationFaults examines the publication in full. A publication that is not
// of the table has no other fault.
func (t Table) PublicationFaults(ctx context.Context, conn *pgx.Conn) (PublicationFaults, error) {
	p, err := t.readPublication(ctx, conn)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return PublicationFaults{Table: t.migrateFault("does not exist", "create it with `outbox-relay migrate`")}, nil
	case err != nil:
		return PublicationFaults{}, fmt.Errorf("read publication %s: %w", t.Publication, err)
	case p.all:
		return PublicationFaults{Table: t.publicationFault("is for all tables or for a schema", "name the table instead: `outbox-relay migrate` with another OUTBOX_PUBLICATION", "")}, nil
	}
	f := PublicationFaults{Operations: t.operationsFault(p)}
	if !p.root {
		sql := fmt.Sprintf("ALTER PUBLICATION %s SET (publish_via_partition_root = true)", t.publication())
		f.Root = t.publicationFault("does not publish partitions under their root", sql, sql)
	}
	if !*p.member {
		sql := fmt.Sprintf("ALTER PUBLICATION %s ADD TABLE %s", t.publication(), t)
		f.Table = t.publicationFault("does not contain table "+t.String(), "run `outbox-relay migrate`, or "+sql, sql)
		return f, nil
	}
	if *p.filter {
		sql := fmt.Sprintf("ALTER PUBLICATION %[1]s DROP TABLE %[2]s; ALTER PUBLICATION %[1]s ADD TABLE %[3]s", t.publication(), t, t.listing(p))
		f.Filter = t.publicationFault("has a row filter on "+t.String(), "the events that it leaves out would be passed over: remove it: "+sql, sql)
	}
	if len(p.unlogged) > 0 {
		sql := "ALTER TABLE " + strings.Join(p.unlogged, " SET LOGGED; ALTER TABLE ") + " SET LOGGED"
		f.Logged = t.publicationFault("covers an unlogged table or partition", "it writes no WAL, so its events would be passed over: "+sql, sql)
	}
	f.Columns = t.columnsFault(p)
	return f, nil
}

func (t Table) publication() string { return pgx.Identifier{t.Publication}.Sanitize() }

// publicationFault is one that SQL mends, if there is any.
func (t Table) publicationFault(reason, remedy, sql string) error {
	return &fault.Error{What: "publication " + t.Publication + " " + reason, Remedy: remedy, SQL: sql}
}

// migrateFault is one that migrating mends.
func (t Table) migrateFault(reason, remedy string) error {
	return &fault.Error{What: "publication " + t.Publication + " " + reason, Remedy: remedy, Shell: "outbox-relay migrate"}
}

func (t Table) readPublication(ctx context.Context, conn *pgx.Conn) (p publicationFacts, err error) {
	err = conn.QueryRow(ctx, `
		select p.puballtables or exists (select from pg_catalog.pg_publication_namespace n where n.pnpubid = p.oid),
			p.pubinsert, p.pubupdate or p.pubdelete or p.pubtruncate, p.pubviaroot,
			r.oid is not null, r.prqual is not null, r.prattrs is not null,
			array(select a.attname from pg_catalog.pg_attribute a where a.attrelid = r.prrelid and a.attnum > 0
				and not a.attisdropped and (r.prattrs is null or a.attnum = any (r.prattrs::int2[]))),
			array(select c.oid::regclass::text from pg_catalog.pg_partition_tree(pg_catalog.to_regclass($2)) l
				join pg_catalog.pg_class c on c.oid = l.relid where l.isleaf and c.relpersistence <> 'p' order by 1)
		from pg_catalog.pg_publication p
		left join pg_catalog.pg_publication_rel r on r.prpubid = p.oid and r.prrelid = pg_catalog.to_regclass($2)
			and (pg_catalog.to_jsonb(r) ->> 'prexcept') is distinct from 'true' -- of 19: a table that it leaves out
		where p.pubname = $1`, t.Publication, t.String()).
		Scan(&p.all, &p.inserts, &p.more, &p.root, &p.member, &p.filter, &p.chosen, &p.listed, &p.unlogged)
	return p, err
}

func (t Table) operationsFault(p publicationFacts) error {
	sql := fmt.Sprintf("ALTER PUBLICATION %s SET (publish = 'insert')", t.publication())
	switch {
	case !p.inserts:
		return t.publicationFault("does not publish inserts", sql, sql)
	case p.more:
		return t.publicationFault("publishes more than inserts, which costs the walsender every update of a row", sql, sql)
	}
	return nil
}

// listing is the table as a publication names it, with the columns that this one
// has chosen.
func (t Table) listing(p publicationFacts) string {
	if !p.chosen {
		return t.String()
	}
	var quoted []string
	for _, column := range p.listed {
		quoted = append(quoted, pgx.Identifier{column}.Sanitize())
	}
	return t.String() + " (" + strings.Join(quoted, ", ") + ")"
}

func (t Table) columnsFault(p publicationFacts) error {
	have := Layout{Columns: map[string]bool{}}
	for _, column := range p.listed {
		have.Columns[column] = true
	}
	if missing := have.Lacks(t.Columns.Required()); len(missing) > 0 {
		return t.migrateFault("does not list column "+strings.Join(missing, ", "), "run `outbox-relay migrate`, which extends the list")
	}
	// A list that has something else in the place of a column that may be missing
	// was made before that was renamed: the message would come without it.
	strange, unlisted := t.Columns.Unknown(p.listed), have.Lacks(t.Columns.Optional())
	if p.chosen && len(strange) > 0 && len(unlisted) > 0 {
		return t.migrateFault(fmt.Sprintf("lists column %s, and not %s, which the message takes", strings.Join(strange, ", "), strings.Join(unlisted, ", ")),
			fmt.Sprintf("if it was renamed, give it its name back; else add %s to the table and run `outbox-relay migrate`", strings.Join(unlisted, ", ")))
	}
	return nil
}
