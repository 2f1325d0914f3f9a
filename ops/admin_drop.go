package ops

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"outbox-relay/outbox"
)

// Drop removes what a relay has left in its database: slot, publication and its
// own rows. The slot is asked for by its name. force gives up what is known of
// rejected events whose row is gone, and outcomes that are still to be written.
func (a Admin) Drop(ctx context.Context, slot string, force bool) error {
	if slot != a.Table.Slot {
		return fmt.Errorf("%w: slot %s is not the one that OUTBOX_SLOT names, %s: set OUTBOX_SLOT, OUTBOX_TABLE and OUTBOX_PUBLICATION to those of the relay that is to go", ErrUsage, slot, a.Table.Slot)
	}
	return a.use(ctx, nil, func(conn *pgx.Conn) error {
		there, err := a.Table.Belongings(ctx, conn)
		if err != nil {
			return err
		}
		if err := a.mayDrop(there, force); err != nil {
			return err
		}
		dropped, err := a.Table.Drop(ctx, conn, there)
		if err != nil {
			return err
		}
		a.tellDropped(there, dropped)
		return nil
	})
}

// mayDrop names what stands against it, and what to do.
func (a Admin) mayDrop(b outbox.Belongings, force bool) error {
	slot := a.Table.Slot
	switch {
	case b.PID != 0:
		return fmt.Errorf("slot %s is in use, by process %d of Postgres: stop the relay first (all of them: a standby would take over); where it does not end, SELECT pg_terminate_backend(%d)", slot, b.PID, b.PID)
	case b.Slot && (b.Plugin != "pgoutput" || !b.Here):
		return fmt.Errorf("slot %s is no relay's of this database: it is left alone", slot)
	case force:
		return nil
	case b.Kept > 0:
		return fmt.Errorf("outbox_relay_leftovers holds %d rejected events of slot %s whose row is gone: save what you need of them, then say --force", b.Kept, slot)
	case b.Waiting > 0:
		return fmt.Errorf("outbox_relay_leftovers holds the outcomes of %d rows of slot %s that the application held locked: start the relay until they are written, or these rows stay pending; or say --force", b.Waiting, slot)
	}
	return nil
}

func (a Admin) tellDropped(b outbox.Belongings, d outbox.Dropped) {
	if d.Slot {
		fmt.Fprintf(a.Out, "dropped slot %s\n", a.Table.Slot)
	} else {
		fmt.Fprintf(a.Out, "slot %s does not exist\n", a.Table.Slot)
	}
	switch {
	case d.Publication:
		fmt.Fprintf(a.Out, "dropped publication %s\n", a.Table.Publication)
	case b.Publication:
		fmt.Fprintf(a.Out, "kept publication %s: %s\n", a.Table.Publication, b.Shared)
	default:
		fmt.Fprintf(a.Out, "publication %s does not exist\n", a.Table.Publication)
	}
	for _, own := range []struct {
		table string
		rows  int64
	}{
		{"outbox_relay_checkpoints", d.Checkpoints}, {"outbox_relay_history", d.History},
		{"outbox_relay_batches", d.Batches}, {"outbox_relay_backlog", d.Backlog}, {"outbox_relay_leftovers", d.Leftovers},
	} {
		fmt.Fprintf(a.Out, "deleted %s from %s\n", rows(own.rows), own.table)
	}
	fmt.Fprintf(a.Out, "The table, its rows and the stream are as they were.\n")
}
