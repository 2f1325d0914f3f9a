package outbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/internal/charset"
	"outbox-relay/internal/fault"
	"outbox-relay/outbox/event"
)

// Mode is what happens to a row once its event is in the stream.
type Mode string

const (
	Mark   Mode = "mark"   // status becomes published
	Delete Mode = "delete" // the row goes
	Keep   Mode = "keep"   // the row stays as it is
)

// Table is the outbox table, its publication and how its rows are recorded. It
// is a value without a connection: each method names the one that it uses.
type Table struct {
	Schema, Name string
	Publication  string
	Slot         string // whose leftovers are meant
	Mode         Mode
	Columns      event.Columns
	// ByTime says that the table is partitioned by range of created_at, a timestamptz:
	// an id that tells when it was made then tells the partition. Layout says it.
	ByTime bool
}

// As returns the table as the catalog has it.
func (t Table) As(l Layout) Table {
	t.Columns.Payload, t.Columns.ID, t.Columns.Charset, t.ByTime = l.Payload, l.ID, l.Charset, l.ByTime
	return t
}

// String returns the name quoted for SQL.
func (t Table) String() string { return pgx.Identifier{t.Schema, t.Name}.Sanitize() }

func (t Table) leftovers() string {
	return pgx.Identifier{t.Schema, "outbox_relay_leftovers"}.Sanitize()
}

func (t Table) function(name string) string { return pgx.Identifier{t.Schema, name}.Sanitize() }

// Layout is what the catalog says of the table when the relay starts.
type Layout struct {
	OID     uint32
	Columns map[string]bool // all that the table has
	Payload string          // the type of the payload
	ID      string          // the type of the id, as Columns has it
	ByTime  bool            // see Table
	Charset charset.Charset // of the database's text
	Proof   event.Proof     // of requests: Inspect reads it
}

// Inspect reads the layout and checks that the relay can work with the table;
// each fault is an error that says what to do.
func (t Table) Inspect(ctx context.Context, conn *pgx.Conn) (Layout, error) {
	l, err := t.ReadLayout(ctx, conn)
	for _, check := range []func(context.Context, *pgx.Conn) error{t.CheckOwnTables, t.CheckPartitionKey, t.CheckRowSecurity, t.CheckRules} {
		if err == nil {
			err = check(ctx, conn)
		}
	}
	if err == nil {
		l.Proof, err = t.readProof(ctx, conn)
	}
	return l, err
}

// ReadLayout reads the layout; a table that is not there, or lacks a column, is an
// error that says what to do.
func (t Table) ReadLayout(ctx context.Context, conn *pgx.Conn) (Layout, error) {
	l, c, err := t.readColumns(ctx, conn)
	switch {
	case err != nil:
		return l, err
	case len(l.Columns) == 0:
		return l, t.Absent(ctx, conn)
	}
	if missing := l.Lacks(t.Columns.Required()); len(missing) > 0 {
		return l, &fault.Error{What: fmt.Sprintf("table %s has no column %s", t, strings.Join(missing, ", ")),
			Remedy: cmp.Or(rewrite(t.Columns, missing, l), remedy(t.Columns, missing)), SQL: t.addColumns(missing, l)}
	}
	l.Payload = c.types[t.Columns.Name("payload")]
	return l, cmp.Or(t.checkGenerated(c), t.checkPadding(c), t.checkTypes(c.types))
}

// catalog is what the catalog says of the columns, by their names.
type catalog struct {
	types  map[string]string // as format_type has them
	unsent map[string]bool   // generated, and not sent by logical decoding
}

// readColumns reads them; of a table that is not there, none.
func (t Table) readColumns(ctx context.Context, conn *pgx.Conn) (Layout, catalog, error) {
	l, c := Layout{Columns: map[string]bool{}, Charset: charset.Of(conn.PgConn().ParameterStatus("server_encoding"))}, catalog{map[string]string{}, map[string]bool{}}
	rows, err := conn.Query(ctx, `select a.attrelid, a.attname, pg_catalog.format_type(coalesce(nullif(t.typbasetype, 0), t.oid), null),
			coalesce((select ' collate ' || pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.collname)
				from pg_catalog.pg_collation c join pg_catalog.pg_namespace n on n.oid = c.collnamespace
				where c.oid = a.attcollation and c.oid <> 'pg_catalog.default'::regcollation), ''),
			exists (select from pg_catalog.pg_partitioned_table p where p.partrelid = a.attrelid and p.partstrat = 'r'
				and p.partnatts = 1 and p.partattrs[0] = a.attnum),
			a.attgenerated = 'v' or a.attgenerated = 's' and current_setting('server_version_num')::int < 180000
		from pg_catalog.pg_attribute a join pg_catalog.pg_type t on t.oid = a.atttypid
		where a.attrelid = pg_catalog.to_regclass($1) and a.attnum > 0 and not a.attisdropped`, t.String())
	if err != nil {
		return l, c, fmt.Errorf("read the columns of %s: %w", t, err)
	}
	var column, kind, collate string
	var key, unsent bool
	_, err = pgx.ForEachRow(rows, []any{&l.OID, &column, &kind, &collate, &key, &unsent}, func() error {
		l.Columns[column], c.unsent[column] = true, unsent
		if column == t.Columns.Name("id") {
			l.ID = kind + collate
		}
		c.types[column] = kind
		l.ByTime = l.ByTime || key && column == t.Columns.Name("created_at") && kind == "timestamp with time zone"
		return nil
	})
	if err != nil {
		return l, c, fmt.Errorf("read the columns of %s: %w", t, err)
	}
	return l, c, nil
}

// CheckPartitionKey refuses a table that recording an outcome would move rows
// about in.
func (t Table) CheckPartitionKey(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, `select `+t.function("outbox_relay_check_partition_key")+`(pg_catalog.to_regclass($1))`, t.String())
	var pgErr *pgconn.PgError
	switch {
	case errors.As(err, &pgErr) && pgErr.Code == "55000": // object not in prerequisite state
		return &fault.Error{What: pgErr.Message, Remedy: pgErr.Hint}
	case err != nil:
		return fmt.Errorf("read how %s is partitioned: %w", t, err)
	}
	return nil
}

// CheckRowSecurity refuses a role that row level security keeps from seeing every row: what
// it does not see it would take for deleted, or for published. The relay's sessions have
// row_security off besides, so that Postgres refuses what a policy made later would hide.
func (t Table) CheckRowSecurity(ctx context.Context, conn *pgx.Conn) error {
	var filtered []string
	var user string
	err := conn.QueryRow(ctx, `select current_user, array(select c.oid::pg_catalog.regclass::text
		from unnest($1::text[]) as own(name), pg_catalog.pg_class c
		where c.oid = pg_catalog.to_regclass(own.name) and pg_catalog.row_security_active(c.oid) order by 1)`,
		append(t.ownTables(), t.own("outbox_relay_secret"), t.String())).Scan(&user, &filtered)
	switch {
	case err != nil:
		return fmt.Errorf("look for row level security of %s: %w", t, err)
	case len(filtered) == 0:
		return nil
	}
	sql := "ALTER ROLE " + pgx.Identifier{user}.Sanitize() + " BYPASSRLS"
	return &fault.Error{What: fmt.Sprintf("row level security of %s hides rows from role %s", strings.Join(filtered, ", "), user),
		Remedy: "the relay has to see every row: as a superuser, " + sql, SQL: sql}
}

// CheckRules refuses a table with a rule for what the relay does to its rows: Postgres
// takes no such statement in WITH.
// Source: https://www.postgresql.org/docs/current/queries-with.html
func (t Table) CheckRules(ctx context.Context, conn *pgx.Conn) error {
	var rule, event string
	err := conn.QueryRow(ctx, `select rulename, case ev_type when '2' then 'UPDATE' else 'DELETE' end from pg_catalog.pg_rewrite
		where ev_class = pg_catalog.to_regclass($1) and ev_enabled <> 'D' and (ev_type = '2' or ev_type = '4' and $2) order by 1 limit 1`,
		t.String(), t.Mode == Delete).Scan(&rule, &event)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil
	case err != nil:
		return fmt.Errorf("look for rules of %s: %w", t, err)
	}
	sql := fmt.Sprintf("DROP RULE %s ON %s", pgx.Identifier{rule}.Sanitize(), t)
	return &fault.Error{What: fmt.Sprintf("table %s has rule %s for %s, with which Postgres refuses to record outcomes", t, pgx.Identifier{rule}.Sanitize(), event),
		Remedy: "do in a trigger what it does, and " + sql, SQL: sql}
}

// columnTypes are those of migrate.
var columnTypes = map[string]string{"id": "text", "version": "int", "aggregate_type": "text", "event_type": "text",
	"payload": "jsonb", "status": "text", "created_at": "timestamptz"}

// addColumns adds columns that the table lacks, where their type is known; rows
// that are there already have none of them.
func (t Table) addColumns(missing []string, l Layout) string {
	var add []string
	for _, name := range missing {
		if columnTypes[name] == "" || t.Columns.Names != nil || l.otherCase(name) != "" {
			return ""
		}
		add = append(add, "ADD COLUMN "+name+" "+columnTypes[name])
	}
	return "ALTER TABLE " + t.String() + " " + strings.Join(add, ", ")
}

// Types that the relay can work with, as format_type has them. An id's text must
// be what pgoutput sends: see checkPadding.
var (
	idTypes      = []string{"text", "character varying", "uuid", "bigint", "integer", "smallint"}
	payloadTypes = []string{"jsonb", "json", "text", "character varying", "bytea"}
	headerTypes  = []string{"jsonb", "json", "text", "character varying"}
	statusTypes  = []string{"text", "character varying"}
	timeTypes    = []string{"timestamp with time zone", "timestamp without time zone"}
)

// checkTypes refuses columns of a type that the relay can't work with. Those that
// the table lacks are not its business.
func (t Table) checkTypes(types map[string]string) error {
	for _, c := range []struct {
		usual string
		take  []string
	}{
		{"id", idTypes}, {"payload", payloadTypes}, {"headers", headerTypes}, {"status", statusTypes},
		{"created_at", timeTypes}, {"published_at", timeTypes}, {"failed_at", timeTypes}, {"retried_at", timeTypes},
		{"failed_reasons", []string{"text[]"}},
	} {
		name := t.Columns.Name(c.usual)
		if kind := types[name]; kind != "" && !slices.Contains(c.take, kind) {
			return &fault.Error{What: fmt.Sprintf("column %s of table %s is of type %s", pgx.Identifier{name}.Sanitize(), t, kind),
				Remedy: "it can be " + strings.Join(c.take, ", ")}
		}
	}
	return nil
}

// Lacks returns those of the names that the table has not.
func (l Layout) Lacks(names []string) []string {
	var missing []string
	for _, name := range names {
		if !l.Columns[name] {
			missing = append(missing, name)
		}
	}
	return missing
}

// ownTables are those that migrate makes for what relays write, quoted for SQL.
func (t Table) ownTables() []string {
	return []string{t.own("outbox_relay_checkpoints"), t.own("outbox_relay_history"), t.own("outbox_relay_leftovers"),
		t.own("outbox_relay_batches"), t.own("outbox_relay_backlog")}
}

// Own is the name of one of the relay's own tables in a statement that people are to paste:
// a schema that was given in quotes needs them.
func (t Table) Own(name string) string {
	if t.Schema == "public" {
		return t.Schema + "." + name
	}
	return t.own(name)
}

// CheckOwnTables makes sure that what migrate makes for the relay itself is there, and as
// this release makes it.
func (t Table) CheckOwnTables(ctx context.Context, conn *pgx.Conn) error {
	for _, own := range append(t.ownTables(), t.own("outbox_relay_secret")) {
		var there bool
		if err := conn.QueryRow(ctx, `select pg_catalog.to_regclass($1) is not null`, own).Scan(&there); err != nil {
			return fmt.Errorf("look for table %s: %w", own, err)
		}
		if !there {
			return &fault.Error{What: fmt.Sprintf("table %s does not exist", own), Remedy: "run `outbox-relay migrate`", Shell: "outbox-relay migrate"}
		}
	}
	var older *string
	err := conn.QueryRow(ctx, `select case
		when not exists (select from pg_catalog.pg_attribute
			where attrelid = pg_catalog.to_regclass($1) and attname = 'refused_at' and not attisdropped) then 'table ' || $1
		when exists (select from pg_catalog.pg_proc
			where oid = pg_catalog.to_regprocedure($2) and prosrc not like '%outbox_relay_ask%') then 'function ' || $2
		end`, t.leftovers(), t.retryFunction()+"(text[])").Scan(&older)
	switch {
	case err != nil:
		return fmt.Errorf("look for what migrate makes for %s: %w", t, err)
	case older != nil:
		return &fault.Error{What: *older + " was made by an earlier release", Remedy: "run `outbox-relay migrate` of this release", Shell: "outbox-relay migrate"}
	}
	return nil
}

// ErrNoRow says that the event's row is gone.
var ErrNoRow = errors.New("the row is gone")

// Fill reads the named columns of the event's row, which its Relation did not
// list since it was written before the publication was extended. The values are
// new memory. ErrNoRow if the application has deleted the row.
func (t Table) Fill(ctx context.Context, conn *pgx.Conn, e *event.Event, names []string) error {
	var list []string
	var dest []any
	for _, field := range t.Columns.Fields(e) {
		if slices.Contains(names, field.Name) {
			list = append(list, t.value("e", field))
			dest = append(dest, field.Value)
		}
	}
	err := conn.QueryRow(ctx, `select `+strings.Join(list, ", ")+` from `+t.String()+` e where `+t.id("e")+` = $1`,
		string(e.ID)).Scan(dest...)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return ErrNoRow
	case err != nil:
		return fmt.Errorf("read %s of event %s: %w", strings.Join(names, ", "), e.ID, err)
	}
	return nil
}

// HasPending reports whether any row waits to be published.
func (t Table) HasPending(ctx context.Context, conn *pgx.Conn) (bool, error) {
	var pending bool
	err := conn.QueryRow(ctx, `select exists (select from `+t.String()+` where status = 'pending')`).Scan(&pending)
	if err != nil {
		return false, fmt.Errorf("look for pending rows: %w", err)
	}
	return pending, nil
}
