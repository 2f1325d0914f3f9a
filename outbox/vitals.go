package outbox

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Vitals are what tells whether a relay keeps up, read at little cost.
type Vitals struct {
	At         time.Time  // Postgres's clock
	Checkpoint *time.Time // when it was last written; nil: there is none
	Slot       *SlotState // nil: it does not exist
}

// Vitals reads those of the relay of the table's slot.
func (t Table) Vitals(ctx context.Context, conn *pgx.Conn) (Vitals, error) {
	v := Vitals{Slot: &SlotState{}}
	err := conn.QueryRow(ctx, `select now(), (select updated_at from `+t.own("outbox_relay_checkpoints")+` where slot = $1)`, t.Slot).
		Scan(&v.At, &v.Checkpoint)
	if err != nil {
		return v, fmt.Errorf("read when the checkpoint of slot %s was written: %w", t.Slot, err)
	}
	if err := optional(t.readSlot(ctx, conn, v.Slot), &v.Slot); err != nil {
		return v, fmt.Errorf("read slot %s: %w", t.Slot, err)
	}
	return v, nil
}
