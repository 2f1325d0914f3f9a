package outbox

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/fault"
	"outbox-relay/outbox/event"
)

// readProof reads what requests are checked by.
func (t Table) readProof(ctx context.Context, conn *pgx.Conn) (p event.Proof, err error) {
	err = conn.QueryRow(ctx, `select secret, since from `+t.own("outbox_relay_secret")).Scan(&p.Secret, &p.Since)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return p, &fault.Error{What: fmt.Sprintf("table %s has no row, so no request can be proved", t.Own("outbox_relay_secret")),
			Remedy: "as its owner:", SQL: fmt.Sprintf("INSERT INTO %s (since) VALUES (now())", t.Own("outbox_relay_secret"))}
	case err != nil:
		return p, fmt.Errorf("read the secret of requests: %w", err)
	}
	return p, nil
}
