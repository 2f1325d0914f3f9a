package relay_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// numbered is an outbox of an application's own, whose ids are of that type.
const numbered = `create table outboxevent (id %s not null primary key, aggregatetype text not null, aggregateid text not null, type text not null, payload jsonb)`

// idKinds are types of ids, with values in their order. That of their text is another.
var idKinds = map[string][]string{
	"bigint":                  {"1", "2", "9", "10", "11", "100", "2000"},
	"smallint":                {"1", "2", "9", "10", "11", "100"},
	`text collate "en-x-icu"`: {"a", "B", "c", "D", "é", "F"},
	`varchar(9) collate "C"`:  {"A", "B", "_", "a", "b"},
}

func (o owned) put(ids ...string) {
	o.Helper()
	for _, id := range ids {
		o.exec(`insert into outboxevent (id, aggregatetype, aggregateid, type, payload) values (` + literal(id) + `, 'Order', '7', 'Created', '{}')`)
	}
}

func literal(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

// backwards are the ids in the reverse of their order: that of none of their types.
func backwards(ids []string) []string {
	ids = slices.Clone(ids)
	slices.Reverse(ids)
	return ids
}

// Rows that do not come out of the slot are published in the order of their ids as the
// ids' own type has it, and not as their text would: those from before the slot, those
// that a lost slot has not brought, what is retried in one request, and what is replayed.
func TestRowsComeInTheOrderOfTheirIDs(t *testing.T) {
	t.Parallel()
	for kind, ids := range idKinds {
		setup := func(t *testing.T) owned {
			t.Parallel()
			o := setupOwned(t, fmt.Sprintf(numbered, kind))
			o.migrate()
			return o
		}
		t.Run(kind+", backfill and replay", func(t *testing.T) {
			o := setup(t)
			o.put(backwards(ids)...)
			o.streaming()
			o.requireStream(ids)
			o.await("published", ids)
			o.command("replay", "--all", "--run", "again", "--yes")
			want := slices.Clone(ids)
			for _, id := range ids {
				want = append(want, id+":again")
			}
			o.requireStream(want)
		})
		t.Run(kind+", heal", func(t *testing.T) {
			o := setup(t)
			o.streaming().Kill()
			o.put(backwards(ids)...)
			o.dropSlot()
			o.streaming()
			o.requireStream(ids)
		})
		t.Run(kind+", retry", func(t *testing.T) {
			o := setup(t)
			o.put(backwards(ids)...)
			o.exec(`update outboxevent set status = 'failed', failed_at = now()`)
			o.streaming()
			o.command(append([]string{"retry"}, backwards(ids)...)...)
			o.requireStream(ids)
		})
	}
}
