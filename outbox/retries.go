package outbox

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Retries says which failed rows are tried again without being asked: those that
// were retried fewer than Attempts times, each time twice as long after the
// failure as the time before, at first after Backoff.
type Retries struct {
	Attempts int
	Backoff  time.Duration
}

// Failure is a failed row, and its place among all of them.
type Failure struct {
	ID string
	At time.Time // failed_at
}

// Due lists the failures whose time has come, at most limit, oldest first,
// behind the place after, without those whose ids are in except. It finds them by
// the index on failed_at.
func (r Retries) Due(ctx context.Context, conn *pgx.Conn, t Table, after Failure, except []string, limit int) ([]Failure, error) {
	args := pgx.NamedArgs{"backoff": r.Backoff, "attempts": r.Attempts, "except": except}
	behind := ""
	if after.ID != "" {
		behind = fmt.Sprintf(" and (failed_at, %s) > (@at, %s)", t.order(), t.ordered("@after"))
		args["at"], args["after"] = after.At, after.ID
	}
	rows, err := conn.Query(ctx, fmt.Sprintf(`select %[3]s, failed_at from %[1]s e
		where failed_at <= now() - @backoff::interval and status = 'failed'%[5]s
			and retried_attempts < @attempts
			and extract(epoch from now() - failed_at) >= extract(epoch from @backoff::interval) * 2 ^ least(retried_attempts, 100)
			and %[3]s <> all (coalesce(@except::text[], '{}'))
		order by failed_at, %[4]s limit %[2]d`, t, limit, t.id("e"), t.order(), behind), args)
	if err != nil {
		return nil, fmt.Errorf("look for failed rows of %s: %w", t, err)
	}
	due, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Failure])
	if err != nil {
		return nil, fmt.Errorf("look for failed rows of %s: %w", t, err)
	}
	return due, nil
}

// Retry puts rows that failed back to pending and asks the relay to publish them,
// at most 1000. It returns how many: what is not failed, or gone, is passed over.
func (t Table) Retry(ctx context.Context, conn *pgx.Conn, ids []string) (retried int, err error) {
	err = conn.QueryRow(ctx, `select `+t.retryFunction()+`(variadic $1::text[])`, ids).Scan(&retried)
	if err != nil {
		return 0, fmt.Errorf("retry failed rows of %s: %w", t, err)
	}
	return retried, nil
}

// retryFunction is made by migrate.
func (t Table) retryFunction() string { return t.function(t.ownName("outbox_retry")) }

// ownName is a function's name as migrate makes it, which no other outbox in the schema has.
func (t Table) ownName(function string) string {
	if t.Name == "events" {
		return function
	}
	return function + "_" + t.Name
}
