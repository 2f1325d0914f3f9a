package ops

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/internal/fault"
	"outbox-relay/migrations"
	"outbox-relay/outbox"
)

// Names of the checks of the table and what belongs to it.
var tableChecks = []string{"table", "migrations", "partition_key", "trigger", "row_security", "rules", "replica_identity",
	"publication", "publication_operations", "publication_root", "publication_filter", "publication_columns", "publication_logged"}

func isDenied(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == "42501" // insufficient_privilege
}

// checkPrivileges names each right that the role lacks, and reports whether it
// may look into the schema at all.
func (e *examination) checkPrivileges(ctx context.Context) bool {
	housekeeping := e.Config.Housekeeping
	missing, count, err := e.Config.Table.MissingGrants(ctx, e.sql,
		outbox.Uses{Retention: housekeeping.Retention > 0, Retries: housekeeping.Retries.Attempts > 0})
	switch {
	case !e.judge("privileges", err):
		return true
	case len(missing) == 0:
		e.ok("privileges", "all %d that this configuration needs", count)
		return true
	}
	e.add("privileges", stateFault, &fault.Error{What: "the role lacks: " + strings.Join(rights(missing), "; "),
		Remedy: "as the owner of the table:", SQL: strings.Join(missing, "; ")})
	return !strings.HasPrefix(missing[len(missing)-1], "GRANT USAGE")
}

// rights are the statements without the verb and the role.
func rights(grants []string) []string {
	var short []string
	for _, grant := range grants {
		right, _, _ := strings.Cut(strings.TrimPrefix(grant, "GRANT "), " TO ")
		short = append(short, right)
	}
	return short
}

func (e *examination) checkTable(ctx context.Context) {
	t := e.Config.Table
	layout, err := t.ReadLayout(ctx, e.sql)
	if e.judge("table", err) {
		e.ok("table", "%s has every column that the message needs", t)
	}
	if layout.OID == 0 {
		e.skip("the table is not there", tableChecks[1:7]...)
	} else {
		e.table = e.checkMigrations(ctx) && err == nil
		e.checkRows(ctx)
	}
	e.checkPublication(ctx)
}

// printed runs all migrations, whatever the table of versions says.
const printed = `outbox-relay migrate --print | psql -v ON_ERROR_STOP=1 "$OUTBOX_POSTGRES_URL"`

// checkMigrations reports whether what the relay has for itself is there.
func (e *examination) checkMigrations(ctx context.Context) bool {
	t := e.Config.Table
	err := t.CheckOwnTables(ctx, e.sql)
	var lacking []string
	if err == nil {
		lacking, err = t.Lacking(ctx, e.sql, migrations.RetryFunction(t.Name)+"(text[])", migrations.RetryAllFunction(t.Name)+"()")
	}
	if err == nil && len(lacking) > 0 {
		err = &fault.Error{What: "not there: " + strings.Join(lacking, ", "), Remedy: "migrate with this release", Shell: "outbox-relay migrate"}
	}
	applied, newest, unknown := migrations.Applied(ctx, e.sql, e.Migrate)
	if err != nil && unknown == nil && applied >= newest && !isDenied(err) {
		err = &fault.Error{What: fault.Of(err).What + ", although every migration was applied", Remedy: "run them again by psql: they change nothing that is there",
			Shell: printed}
	}
	if !e.judge("migrations", err) {
		return false
	}
	switch {
	case unknown != nil: // by psql, or it is not the role's business
		e.ok("migrations", "what they make is there; which were applied is not to be seen by this role")
	case applied < newest:
		e.add("migrations", stateFault, &fault.Error{What: fmt.Sprintf("%d of %d are applied", applied, newest), Remedy: "migrate with this release", Shell: "outbox-relay migrate"})
	case applied > newest:
		e.ok("migrations", "%d are applied, by a newer release; this one has %d", applied, newest)
	default:
		e.ok("migrations", "all %d are applied", newest)
	}
	return true
}

// checkRows looks at what becomes of rows.
func (e *examination) checkRows(ctx context.Context) {
	t := e.Config.Table
	if !e.table {
		e.skip("the table is not as migrate makes it", "partition_key")
	} else if e.judge("partition_key", t.CheckPartitionKey(ctx, e.sql)) {
		e.ok("partition_key", "it names no column that the relay updates")
	}
	trigger, err := t.ReadTrigger(ctx, e.sql)
	if e.judge("trigger", err) {
		e.checkTrigger(trigger)
	}
	if e.judge("row_security", t.CheckRowSecurity(ctx, e.sql)) {
		e.ok("row_security", "hides no row from the role")
	}
	if e.judge("rules", t.CheckRules(ctx, e.sql)) {
		e.ok("rules", "none is in the way of recording outcomes")
	}
	if e.judge("replica_identity", t.CheckIdentity(ctx, e.sql)) {
		e.ok("replica_identity", "no publication is in the way of recording outcomes")
	}
}

func (e *examination) checkTrigger(trigger outbox.Trigger) {
	const fill = ": the application has to fill id, status and created_at itself"
	switch {
	case e.Config.Table.Columns.Names != nil:
		e.ok("trigger", "none is needed: the outbox is the application's own, which gives the ids")
	case trigger.Unqualified:
		e.warn("trigger", &fault.Error{What: trigger.Function + " calls gen_random_ulid() without its schema: inserts fail in a session whose search_path lacks that",
			Remedy: "write the schema in front of it, or give the function a search_path, which costs each insert a little:",
			SQL:    fmt.Sprintf("ALTER FUNCTION %s SET search_path = %s, pg_temp", trigger.Function, pgx.Identifier{e.Config.Table.Schema}.Sanitize())})
	case trigger.Enabled:
		e.ok("trigger", "%s fills what is new in a row", trigger.Name)
	case trigger.There:
		e.warn("trigger", &fault.Error{What: trigger.Name + " is off" + fill, Remedy: "turn it on, if it does not",
			SQL: fmt.Sprintf("ALTER TABLE %s ENABLE TRIGGER %s", e.Config.Table, pgx.Identifier{trigger.Name}.Sanitize())})
	default:
		e.warn("trigger", &fault.Error{What: trigger.Name + " is not there" + fill, Remedy: "make it, if it does not", Shell: printed})
	}
}

func (e *examination) checkPublication(ctx context.Context) {
	names := tableChecks[7:]
	faults, err := e.Config.Table.PublicationFaults(ctx, e.sql)
	if !e.judge(names[0], err) {
		e.skip("the publication could not be looked at", names[1:]...)
		return
	}
	if !e.judge(names[0], faults.Table) && faults.Operations == nil && faults.Root == nil {
		e.skip("the publication is not there, or not of the table", names[1:]...)
		return
	}
	parts := []struct {
		err  error
		good string
	}{
		{faults.Table, e.Config.Table.Publication + " has the table"}, {faults.Operations, "inserts only"}, {faults.Root, "partitions under their root"},
		{faults.Filter, "no row is left out"}, {faults.Columns, "all columns that the message needs"}, {faults.Logged, "every part of the table writes WAL"},
	}
	e.publish = true
	for i, part := range parts {
		e.publish = e.publish && part.err == nil
		switch {
		case i == 0 && part.err != nil: // judged
		case i > 2 && faults.Table != nil:
			e.skip("the publication is not of the table", names[i])
		case e.judge(names[i], part.err):
			e.ok(names[i], "%s", part.good)
		}
	}
}
