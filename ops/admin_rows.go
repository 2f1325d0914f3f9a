package ops

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"

	"outbox-relay/outbox"
)

// RetryRows puts these failed rows back to pending, and names those that it
// leaves alone. It is an error where none is retried.
func (a Admin) RetryRows(ctx context.Context, ids []string) error {
	ids = unique(ids)
	return a.use(ctx, nil, func(conn *pgx.Conn) error {
		before, err := a.Table.Statuses(ctx, conn, ids)
		if err != nil {
			return err
		}
		n, err := a.Table.Retry(ctx, conn, ids)
		if err != nil {
			return err
		}
		for _, id := range ids {
			switch status, there := before[id]; {
			case !there:
				fmt.Fprintf(a.Err, "%s: there is no such row\n", id)
			case status != "failed":
				fmt.Fprintf(a.Err, "%s: is %s, not failed\n", id, status)
			}
		}
		if n == 0 {
			return errors.New("no row was retried: none of them has failed")
		}
		a.tellRetried(int64(n))
		return nil
	})
}

// RetryEvery puts all rows back to pending that the relay has parked.
func (a Admin) RetryEvery(ctx context.Context) error {
	return a.use(ctx, nil, func(conn *pgx.Conn) error {
		n, err := a.Table.RetryAll(ctx, conn)
		if err == nil {
			a.tellRetried(n)
		}
		return err
	})
}

func (a Admin) tellRetried(n int64) {
	fmt.Fprintf(a.Out, "%s pending again\n", rowsAre(n))
}

// Park records that an event which has not been published has failed: the way on
// for a relay that halted before it. gone allows an id that has no row.
func (a Admin) Park(ctx context.Context, id, reason string, gone bool) error {
	text := "parked by hand"
	if reason != "" {
		text += ": " + reason
	}
	return a.use(ctx, nil, func(conn *pgx.Conn) error {
		done, status, err := a.Table.Park(ctx, conn, id, text, gone)
		switch {
		case err != nil:
			return err
		case done == outbox.NoRow:
			return fmt.Errorf("there is no row %s: correct the id; if its row was deleted and a relay has halted before it, pass --gone", id)
		case done == outbox.NotPending:
			return fmt.Errorf("%s is %s already: only a pending event can be parked", id, status)
		case done == outbox.ParkedGone:
			fmt.Fprintf(a.Out, "%s has no row (any more): it is noted for slot %s that the event has failed\n", id, a.Table.Slot)
		default:
			fmt.Fprintf(a.Out, "%s is failed now: %s\n", id, text)
		}
		if a.Table.Mode == outbox.Keep {
			fmt.Fprintln(a.Err, "With OUTBOX_AFTER_PUBLISH=keep a row reads pending whether it is published or not: see that this one is not.")
		}
		fmt.Fprintln(a.Out, "A relay that halted before it passes over it when it is started again.")
		return nil
	})
}

func unique(ids []string) []string {
	seen := map[string]bool{}
	return slices.DeleteFunc(slices.Clone(ids), func(id string) bool {
		again := seen[id]
		seen[id] = true
		return again
	})
}
