package outbox_test

import (
	"testing"

	"outbox-relay/outbox"
)

// A remedy is pasted into psql, which folds what has no quotes, and takes no key word.
func TestOwnTablesInRemedies(t *testing.T) {
	t.Parallel()
	for schema, want := range map[string]string{
		"public": `public.outbox_relay_checkpoints`,
		"Shop":   `"Shop"."outbox_relay_checkpoints"`,
		"order":  `"order"."outbox_relay_checkpoints"`,
	} {
		if got := (outbox.Table{Schema: schema, Name: "events"}).Own("outbox_relay_checkpoints"); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}
