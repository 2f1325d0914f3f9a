package outbox

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Statuses returns the status of each of these rows; an id that has no row is
// left out.
func (t Table) Statuses(ctx context.Context, conn *pgx.Conn, ids []string) (map[string]string, error) {
	statuses := map[string]string{}
	err := t.lookUp(ctx, conn, ids, t.id("e")+" as id, e.status", func(r pgx.CollectableRow) (id string, err error) {
		var status string
		err = r.Scan(&id, &status)
		statuses[id] = status
		return id, err
	})
	if err != nil {
		return nil, fmt.Errorf("read the status of rows of %s: %w", t, err)
	}
	return statuses, nil
}

// RetryAll puts all rows back to pending that the relay has parked, and asks the
// relay to publish them. It returns how many.
func (t Table) RetryAll(ctx context.Context, conn *pgx.Conn) (retried int64, err error) {
	if err := conn.QueryRow(ctx, `select `+t.function(t.ownName("outbox_retry_all"))+`()`).Scan(&retried); err != nil {
		return 0, fmt.Errorf("retry all failed rows of %s: %w", t, err)
	}
	return retried, nil
}

// Parking is what came of parking a row by hand.
type Parking string

const (
	Parked     Parking = "parked"      // the row was pending and has failed now
	ParkedGone Parking = "gone"        // there is no row: it is noted that the event has failed
	NoRow      Parking = "no row"      // nothing was done: there is none
	NotPending Parking = "not pending" // nothing was done: the row is not pending, or an outcome is noted already
)

// Park records that an event which has not been published has failed, so that a
// relay that halted before it passes over it. Where nothing was done, status is
// that of the row, or of what is noted of it. Only with gone the event may have no row: it
// is kept as a leftover then, which nobody takes away but an operator.
func (t Table) Park(ctx context.Context, conn *pgx.Conn, id, reason string, gone bool) (done Parking, status string, err error) {
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		err := tx.QueryRow(ctx, `select status from `+t.String()+` e where `+t.id("e")+` = $1 for no key update`, id).Scan(&status)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			done, status, err = t.parkGone(ctx, tx, id, reason, gone)
		case err == nil && status == "pending":
			done = Parked
			_, err = tx.Exec(ctx, `update `+t.String()+` e set status = 'failed', failed_at = now(), failed_attempts = e.failed_attempts + 1,
				failed_reasons = array_append(e.failed_reasons, $2::text) where `+t.id("e")+` = $1`, id, reason)
		case err == nil:
			done = NotPending
		}
		return err
	})
	if err != nil {
		return "", "", fmt.Errorf("park event %s: %w", id, err)
	}
	return done, status, nil
}

func (t Table) parkGone(ctx context.Context, tx pgx.Tx, id, reason string, gone bool) (done Parking, outcome string, err error) {
	if !gone {
		return NoRow, "", nil
	}
	tag, err := tx.Exec(ctx, `insert into `+t.leftovers()+` (slot, id, outcome, reason, waiting)
		values ($1, $2, 'failed', $3, false) on conflict (slot, id) do nothing`, t.Slot, id, reason)
	if err != nil || tag.RowsAffected() == 1 {
		return ParkedGone, "failed", err
	}
	err = tx.QueryRow(ctx, `select outcome from `+t.leftovers()+` where slot = $1 and id = $2`, t.Slot, id).Scan(&outcome)
	return NotPending, outcome, err
}
