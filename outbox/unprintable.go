package outbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/internal/fault"
)

// Unprintable reports whether Postgres failed to print a value: text that does not
// convert to UTF-8, bytea of which the hex is larger than a gigabyte, what an output
// function refuses. The error ends the whole statement, or the walsender, and names no
// row; another row may be sent all the same.
// Source: https://www.postgresql.org/docs/current/errcodes-appendix.html; what is larger
// than a gigabyte fails in src/backend/utils/mmgr/mcxt.c, or as 54000 in
// src/common/stringinfo.c.
func Unprintable(err error) bool {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return false
	}
	return strings.HasPrefix(pgErr.Code, "22") || strings.HasPrefix(pgErr.Code, "54") || pgErr.Code == "XX001" ||
		pgErr.Code == "XX000" && pgErr.File == "mcxt.c"
}

// rowsApart is Rows where one of the rows can't be printed, for that cause: each half is
// read by itself, down to the row.
func (t Table) rowsApart(ctx context.Context, conn *pgx.Conn, layout Layout, ids []string, cause error) (map[string]*Row, error) {
	if len(ids) == 1 {
		row, err := t.unprintable(ctx, conn, ids[0], cause)
		if err != nil || row == nil {
			return map[string]*Row{}, err
		}
		return map[string]*Row{ids[0]: row}, nil
	}
	half := len(ids) / 2
	byID, err := t.Rows(ctx, conn, layout, ids[:half])
	if err != nil {
		return nil, err
	}
	second, err := t.Rows(ctx, conn, layout, ids[half:])
	maps.Copy(byID, second)
	return byID, err
}

// unprintable reads what is known of a row that could not be printed, for that cause:
// its state alone. Nil: there is no row, or the id is no text of this database.
func (t Table) unprintable(ctx context.Context, conn *pgx.Conn, id string, cause error) (*Row, error) {
	var pgErr *pgconn.PgError
	errors.As(cause, &pgErr)
	row := &Row{Unprintable: fmt.Sprintf("Postgres can't send the row: %s (SQLSTATE %s)", pgErr.Message, pgErr.Code)}
	row.Event.ID = []byte(id)
	found := false
	err := t.lookUp(ctx, conn, []string{id}, "e.retried_attempts, e.status::text", func(r pgx.CollectableRow) (string, error) {
		found = true
		return id, r.Scan(&row.Attempts, &row.Event.Status)
	})
	switch {
	case err != nil && !Unprintable(err):
		return nil, fmt.Errorf("read row %s of %s: %w", id, t, err)
	case !found:
		return nil, nil
	}
	return row, nil
}

// unprintableID is the fault of a pending row whose id can't be sent: it can't be listed.
func (t Table) unprintableID(cause error) error {
	id := t.id("e")
	find := fmt.Sprintf("SELECT ctid, convert_to(%[1]s, getdatabaseencoding()) FROM %[2]s e WHERE status = 'pending' AND %[1]s ~ '[^[:ascii:]]'", id, t)
	return &fault.Error{What: fmt.Sprintf("Postgres can't send the id of a pending row of %s: %s", t, cause), Cause: cause,
		Remedy: "give the row another id; it is found by " + find, SQL: find}
}

// escaped is a text expression as Postgres can send it in any case: with each byte that
// is not ASCII as \ and three octal digits.
func escaped(expression string) string {
	return "pg_catalog.encode(pg_catalog.convert_to(" + expression + ", pg_catalog.getdatabaseencoding()), 'escape')"
}

// plain is a text expression as it is.
func plain(expression string) string { return expression }

// shown reads what people look at: text as it is, or escaped where Postgres can't send that.
func shown[T any](read func(text func(expression string) string) (T, error)) (T, error) {
	got, err := read(plain)
	if Unprintable(err) {
		return read(escaped)
	}
	return got, err
}
