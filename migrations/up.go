package migrations

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/database"

	"outbox-relay/internal/pgversion"
)

// lockKey is of the session-level advisory lock that one migration holds in a
// database: outboxes in one schema share functions and tables.
const lockKey int64 = 0x6f7574626f78 // "outbox"

const (
	lockPoll       = 200 * time.Millisecond
	releaseTimeout = 5 * time.Second
)

const (
	oldestVersion     = 150000
	oldestVersionName = "15"
)

// Up brings the outbox t in the database that config leads to up to date: the
// migrations that its version table, <table>_migrations in t's schema, does not
// list yet, each in its own transaction, and then the columns of the publication.
// It may be called at any time, also while a relay runs and while another Up
// does, for which it waits. It does not change config.
//
// step, where it is given, hears before each of the migrations that are to be
// applied how many of them are done.
//
// The role has to own the table, or to have CREATE on the schema where it does
// not exist yet, and CREATE on the database.
func Up(ctx context.Context, config *pgx.ConnConfig, t Target, log *slog.Logger, step ...func(done, total int)) error {
	if err := t.check(); err != nil {
		return err
	}
	config = config.Copy()
	config.RuntimeParams["search_path"], config.RuntimeParams["client_encoding"] = quote(t.Schema), "UTF8"
	db := stdlib.OpenDB(*config)
	defer db.Close()
	if err := migrate(ctx, db, t, log, step); err != nil {
		return fmt.Errorf("migrate %s: %w", t, explain(err, t, config))
	}
	return nil
}

func migrate(ctx context.Context, db *sql.DB, t Target, log *slog.Logger, step []func(done, total int)) error {
	if err := checkServer(ctx, db, t, log); err != nil {
		return err
	}
	unlock, err := lock(ctx, db, log)
	if err != nil {
		return err
	}
	defer unlock()

	if err := checkShape(ctx, db, t); err != nil {
		return err
	}
	applied, err := applyFiles(ctx, db, t, log, step)
	if err != nil {
		return err
	}
	if err := checkTable(ctx, db, t); err != nil {
		return err
	}
	changed, err := publish(ctx, db, t)
	if err != nil {
		return fmt.Errorf("publication %s: %w", display(t.Publication), err)
	}
	switch {
	case changed:
		log.Info("publication brought up to date", "publication", t.Publication, "table", t.String())
	case !applied:
		log.Info("nothing to migrate", "table", t.String())
	}
	return nil
}

// checkShape refuses a table that is another outbox than that of 001, before a
// trigger is put on it that would fail the application's inserts.
func checkShape(ctx context.Context, db *sql.DB, t Target) error {
	var missing, idType string
	err := db.QueryRowContext(ctx, `
		select coalesce((select string_agg(usual, ', ' order by place)
		                 from unnest($2::text[]) with ordinality as essential (usual, place)
		                 where not exists (select from pg_attribute
		                                   where attrelid = outbox and attname = usual and attnum > 0 and not attisdropped)), ''),
		       coalesce((select format_type(atttypid, null) from pg_attribute where attrelid = outbox and attname = 'id'), '')
		from to_regclass($1) as outbox
		where outbox is not null`, t.qualified(), essentialColumns).Scan(&missing, &idType)
	switch {
	case t.Names != nil || errors.Is(err, sql.ErrNoRows):
		return nil
	case err != nil:
		return err
	case missing != "":
		return fmt.Errorf("the table is there already and has no column %s: if it is an outbox of your application's own, such as Debezium's, "+
			"name its columns by OUTBOX_COLUMN_ID, OUTBOX_COLUMN_AGGREGATE_TYPE and so on; else name another table (OUTBOX_TABLE)", missing)
	case idType != "text" && idType != "character varying":
		return fmt.Errorf("the table is there already and its id is of type %s, which the trigger cannot fill: "+
			"set OUTBOX_COLUMN_ID=id, and the application gives the ids, as it does now", idType)
	}
	return nil
}

// checkServer refuses by name what the migrations cannot work on.
func checkServer(ctx context.Context, db *sql.DB, t Target, log *slog.Logger) error {
	var (
		version         int
		name, walLevel  string
		standby, schema bool
	)
	err := db.QueryRowContext(ctx, `
		select current_setting('server_version_num')::int, current_setting('server_version'), current_setting('wal_level'),
		       pg_is_in_recovery(), exists (select from pg_namespace where nspname = $1)`, t.Schema).
		Scan(&version, &name, &walLevel, &standby, &schema)
	switch {
	case err != nil:
		return err
	case version < oldestVersion:
		return fmt.Errorf("the server is Postgres %s: the outbox needs %s or newer", name, oldestVersionName)
	case standby:
		return errors.New("the server is a standby: connect to its primary (target_session_attrs=read-write picks it)")
	case !schema:
		return fmt.Errorf("schema %s does not exist: create it (CREATE SCHEMA %s) or name another", display(t.Schema), quote(t.Schema))
	}
	if !pgversion.Decodes(version, walLevel) {
		log.Warn("wal_level is not logical: the migration works, the relay will not; set it and restart Postgres",
			"wal_level", walLevel, "remedy", "ALTER SYSTEM SET wal_level = 'logical'")
	}
	return nil
}

// lock waits until no other Up works in the database. It polls: waiting within a
// statement would hold a snapshot all the while.
func lock(ctx context.Context, db *sql.DB, log *slog.Logger) (unlock func(), err error) {
	conn, err := db.Conn(ctx)
	if err != nil {
		return nil, err
	}
	for waited := false; ; waited = true {
		var locked bool
		err := conn.QueryRowContext(ctx, "select pg_try_advisory_lock($1)", lockKey).Scan(&locked)
		if err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		if locked {
			return func() { release(conn) }, nil
		}
		if !waited {
			log.Info("another migration works in this database: waiting for it")
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), conn.Close())
		case <-time.After(lockPoll):
		}
	}
}

// release unlocks, also when the migration's own context is over. Where it cannot,
// it ends the session, and the lock goes with it: a moment later, for Postgres
// does not say when.
func release(conn *sql.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
	defer cancel()
	if _, err := conn.ExecContext(ctx, "select pg_advisory_unlock($1)", lockKey); err != nil {
		_ = conn.Raw(func(c any) error { return c.(*stdlib.Conn).Close() })
	}
	_ = conn.Close()
}

func applyFiles(ctx context.Context, db *sql.DB, t Target, log *slog.Logger, step []func(done, total int)) (applied bool, err error) {
	rendered, err := t.numbered()
	if err != nil {
		return false, err
	}
	var steps []*goose.Migration
	names := map[int64]string{}
	for _, f := range rendered {
		version, err := goose.NumericComponent(f.Name)
		if err != nil {
			return false, err
		}
		names[version] = f.Name
		steps = append(steps, goose.NewGoMigration(version, &goose.GoFunc{RunTx: f.run}, nil))
	}
	store, err := newVersionTable(t)
	if err != nil {
		return false, err
	}
	provider, err := goose.NewProvider(goose.DialectCustom, db, nil,
		goose.WithStore(store), goose.WithGoMigrations(steps...), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return false, err
	}
	total, err := left(ctx, provider)
	if err != nil {
		return false, err
	}
	for done := 0; ; done++ {
		for _, tell := range step {
			tell(done, total)
		}
		result, err := provider.UpByOne(ctx)
		switch {
		case errors.Is(err, goose.ErrNoNextVersion):
			return applied, nil
		case err != nil:
			return applied, cause(err)
		}
		applied = true
		log.Info("migration applied", "file", names[result.Source.Version], "table", t.String(), "duration", result.Duration)
	}
}

// left counts the migrations that are to be applied.
func left(ctx context.Context, provider *goose.Provider) (n int, err error) {
	all, err := provider.Status(ctx)
	for _, migration := range all {
		if migration.State == goose.StatePending {
			n++
		}
	}
	return n, err
}

// cause is what goose wraps; the file's name is in it already.
func cause(err error) error {
	var partial *goose.PartialError
	if errors.As(err, &partial) {
		return partial.Err
	}
	return err
}

// run sends the file whole, as psql does; goose's parser would split it.
func (f File) run(ctx context.Context, tx *sql.Tx) error {
	if _, err := tx.ExecContext(ctx, f.SQL); err != nil {
		return fmt.Errorf("%s: %w", f.Name, err)
	}
	return nil
}

// checkTable refuses what was made of the table since its migrations were applied.
func checkTable(ctx context.Context, db *sql.DB, t Target) error {
	if _, err := db.ExecContext(ctx, "select outbox_relay_check_partition_key($1::regclass)", t.qualified()); err != nil {
		return err
	}
	var partitioned bool
	err := db.QueryRowContext(ctx, "select relkind = 'p' from pg_class where oid = $1::regclass", t.qualified()).Scan(&partitioned)
	if err == nil && t.Partitioned && !partitioned {
		err = errors.New("the table is there already and is not partitioned: name another (OUTBOX_TABLE), or leave out --partitioned")
	}
	return err
}

// publish reports whether there was anything to change.
func publish(ctx context.Context, db *sql.DB, t Target) (changed bool, err error) {
	const state = "select coalesce(outbox_relay_publication_state($1, $2::regclass), '')"
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return false, err
	}
	defer tx.Rollback()
	var before, after string
	table := t.qualified()
	if err := tx.QueryRowContext(ctx, state, t.Publication, table).Scan(&before); err != nil {
		return false, err
	}
	if _, err := tx.ExecContext(ctx, t.publish()); err != nil {
		return false, err
	}
	if err := tx.QueryRowContext(ctx, state, t.Publication, table).Scan(&after); err != nil {
		return false, err
	}
	return before != after, tx.Commit()
}

// versionTable is goose's own, under a quoted name: goose quotes nothing, and
// looks for the table under the very name that it writes.
type versionTable struct {
	database.Store
	schema, name string
}

func newVersionTable(t Target) (versionTable, error) {
	name := t.Table + "_migrations"
	store, err := database.NewStore(goose.DialectPostgres, quote(t.Schema)+"."+quote(name))
	return versionTable{Store: store, schema: t.Schema, name: name}, err
}

// TableExists is a hook of goose.
func (v versionTable) TableExists(ctx context.Context, db database.DBTxConn) (bool, error) {
	var exists bool
	err := db.QueryRowContext(ctx,
		"select exists (select from pg_tables where schemaname = $1 and tablename = $2)", v.schema, v.name).Scan(&exists)
	return exists, err
}

const (
	insufficientPrivilege = "42501"
	undefinedColumn       = "42703"
)

// explain adds to err what the user can do about it.
func explain(err error, t Target, config *pgx.ConnConfig) error {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return err
	}
	switch pgErr.Code {
	case insufficientPrivilege:
		return fmt.Errorf("%w; role %s lacks a privilege: migrate as the owner of %s and of what else is named outbox_relay, "+
			"with CREATE on schema %s and CREATE on database %s", err, display(config.User), t, display(t.Schema), display(config.Database))
	case undefinedColumn:
		return fmt.Errorf("%w; what the message needs has to be a column of %s: add it, or leave it out of the configuration", err, t)
	}
	for _, more := range []string{pgErr.Detail, pgErr.Hint} {
		if more != "" {
			err = fmt.Errorf("%w; %s", err, more)
		}
	}
	return err
}
