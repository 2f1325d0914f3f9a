package migrations

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/pressly/goose/v3"
)

// Applied returns the newest migration that Up has applied to t, and the newest
// that this release has. Files that were run by psql are not among them: where
// all were, there is no table of versions, which is an error.
func Applied(ctx context.Context, conn *pgx.Conn, t Target) (applied, newest int64, err error) {
	rendered, err := t.numbered()
	if err != nil {
		return 0, 0, err
	}
	if newest, err = goose.NumericComponent(rendered[len(rendered)-1].Name); err != nil {
		return 0, 0, err
	}
	versions := pgx.Identifier{t.Schema, t.Table + "_migrations"}.Sanitize()
	if err := conn.QueryRow(ctx, `select coalesce(max(version_id), 0) from `+versions+` where is_applied`).Scan(&applied); err != nil {
		return 0, 0, fmt.Errorf("read which migrations of %s are applied: %w", t, err)
	}
	return applied, newest, nil
}
