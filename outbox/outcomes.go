package outbox

import (
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/jackc/pgx/v5"

	"outbox-relay/checkpoint"
)

// Rejected is an event that can never be stored, and why. The event is a copy:
// it is kept whole where its row is gone.
type Rejected struct {
	Event  Event
	Reason string
}

// Recorded counts what recording a batch did.
type Recorded struct {
	Published       int // rows marked or deleted
	PublishedLocked int // rows that the application holds locked: written later, from the leftovers
	Failed          int // rows marked as failed
	FailedLocked    int
	Kept            int // rejected events whose row is gone: kept whole in the leftovers
	sent            int
}

// Locked counts the rows whose outcome became a leftover.
func (r Recorded) Locked() int { return r.PublishedLocked + r.FailedLocked }

// Answered counts the published rows that the application had deleted or
// changed before they were recorded.
func (r Recorded) Answered() int { return r.sent - r.Published - r.PublishedLocked }

// Outcomes returns the SQL that records what became of the events of a batch,
// to be carried out together with the checkpoint. It tells apart, in one
// statement, rows that are free, that the application holds locked (the outcome
// becomes a leftover), and that are gone or no longer pending (an answer). All
// rows must be visible: see Snapshot. SKIP LOCKED, so that no batch deadlocks
// with the application. NOT IN, which hashes whatever the planner believes of the
// sizes: how many rows are locked or free it can only guess.
func (t Table) Outcomes(items []checkpoint.Item, r *Recorded) (checkpoint.Effects, error) {
	var published, failed, reasons, events []string
	for _, item := range items {
		switch {
		case item.Outcome == checkpoint.Skipped:
		case item.Outcome == checkpoint.Parked:
			rejected := item.Detail.(*Rejected)
			whole, err := rejected.Event.whole(t.Columns)
			if err != nil {
				return checkpoint.Effects{}, err
			}
			failed = append(failed, string(item.ID))
			reasons = append(reasons, rejected.Reason)
			events = append(events, whole)
		case t.Mode != Keep:
			published = append(published, string(item.ID))
		}
	}
	effects := checkpoint.Effects{Args: pgx.NamedArgs{}}
	if len(published) > 0 {
		t.recordPublished(&effects, published, r)
	}
	if len(failed) > 0 {
		t.recordFailed(&effects, failed, reasons, events, r)
	}
	return effects, nil
}

func (t Table) recordPublished(e *checkpoint.Effects, ids []string, r *Recorded) {
	e.Args["published"] = ids
	e.CTE += fmt.Sprintf(`,
		sent as materialized (select unnest(@published::text[]) as id from advanced),
		seen as (select sent.id, e.status from %[1]s e join sent on sent.id = %[4]s),
		free as materialized (select sent.id from %[1]s e join sent on sent.id = %[4]s where e.status = 'pending'
			for %[5]s of e skip locked),
		written as (%[2]s returning 1),
		locked as (insert into %[3]s (slot, id, outcome)
			select @slot, id, 'published' from seen where status = 'pending' and id not in (select id from free)
			on conflict (slot, id) do nothing returning 1)`, t, t.published("free"), t.leftovers(), t.id("e"), t.lock())
	e.Result += `, (select count(*) from written), (select count(*) from locked)`
	e.Dest = append(e.Dest, &r.Published, &r.PublishedLocked)
	r.sent = len(ids)
}

// lock is what published needs. A deletion waits for a foreign key's lock too, so
// SKIP LOCKED has to pass over that.
func (t Table) lock() string {
	if t.Mode == Delete {
		return "update"
	}
	return "no key update"
}

// published writes the outcome of the rows whose ids stand in source.
func (t Table) published(source string) string {
	if t.Mode == Delete {
		return fmt.Sprintf(`delete from %s e using %s f where %s = f.id`, t, source, t.id("e"))
	}
	return fmt.Sprintf(`update %s e set status = 'published', published_at = now() from %s f where %s = f.id`, t, source, t.id("e"))
}

// An orphan can be noted already, without the event, by Park. DISTINCT ON: one
// command can't come twice upon the same leftover.
func (t Table) recordFailed(e *checkpoint.Effects, ids, reasons, events []string, r *Recorded) {
	e.Args["failed"], e.Args["reasons"], e.Args["events"] = ids, reasons, events
	e.CTE += fmt.Sprintf(`,
		bad as materialized (select u.* from advanced, unnest(@failed::text[], @reasons::text[], @events::text[]) as u(id, reason, event)),
		badseen as (select bad.id, e.status from %[1]s e join bad on bad.id = %[4]s),
		badfree as materialized (select bad.id, bad.reason from %[1]s e join bad on bad.id = %[4]s where e.status = 'pending'
			for no key update of e skip locked),
		parked as (%[2]s returning 1),
		badlocked as (insert into %[3]s (slot, id, outcome, reason, event)
			select @slot, b.id, 'failed', b.reason, b.event::jsonb from bad b join badseen s on s.id = b.id
			where s.status = 'pending' and b.id not in (select id from badfree)
			on conflict (slot, id) do nothing returning 1),
		orphans as (insert into %[3]s as l (slot, id, outcome, reason, event, waiting)
			select distinct on (b.id) @slot, b.id, 'failed', b.reason, b.event::jsonb, false from bad b
			where b.id not in (select id from badseen)
			on conflict (slot, id) do update set event = excluded.event where l.outcome = 'failed' and l.event is null returning 1)`, t, t.failed("badfree"), t.leftovers(), t.id("e"))
	e.Result += `, (select count(*) from parked), (select count(*) from badlocked), (select count(*) from orphans)`
	e.Dest = append(e.Dest, &r.Failed, &r.FailedLocked, &r.Kept)
}

func (t Table) failed(source string) string {
	return fmt.Sprintf(`update %s e set status = 'failed', failed_at = now(), failed_attempts = e.failed_attempts + 1,
		failed_reasons = array_append(e.failed_reasons, f.reason) from %s f where %s = f.id`, t, source, t.id("e"))
}

// Leftovers returns the SQL that writes the outcomes of rows that were locked,
// as far as they are free by now, and counts those that still wait. It takes
// any of them, so that none waits behind rows that stay locked.
func (t Table) Leftovers(waiting *int) checkpoint.Effects {
	return checkpoint.Effects{
		Args: pgx.NamedArgs{},
		CTE: fmt.Sprintf(`,
		due as materialized (select l.id, l.outcome, l.reason from %[3]s l, advanced
			where l.slot = @slot and l.waiting order by random() limit 1000),
		seen as (select due.id, e.status from %[1]s e join due on due.id = %[5]s),
		free as materialized (select due.id, due.outcome, due.reason from %[1]s e join due on due.id = %[5]s
			where e.status = 'pending' for %[6]s of e skip locked),
		sent as (select id from free where outcome = 'published'),
		bad as (select id, reason from free where outcome = 'failed'),
		written as (%[2]s returning 1),
		parked as (%[4]s returning 1),
		orphans as (update %[3]s l set waiting = false from due where l.slot = @slot and l.id = due.id
			and due.outcome = 'failed' and l.id not in (select id from seen) returning 1),
		settled as (delete from %[3]s l using due where l.slot = @slot and l.id = due.id
			and l.id not in (select id from seen where status = 'pending' and id not in (select id from free))
			and (due.outcome = 'published' or l.id in (select id from seen))
			returning 1)`, t, t.published("sent"), t.leftovers(), t.failed("bad"), t.id("e"), t.lock()),
		Result: fmt.Sprintf(`, (select count(*) from %s where slot = @slot and waiting) - (select count(*) from settled) - (select count(*) from orphans)`, t.leftovers()),
		Dest:   []any{waiting},
	}
}

// whole returns the event as a JSON object of its columns. A payload of another type
// than jsonb is a string, to the letter; bytea is in hex, as Postgres writes it.
func (e *Event) whole(columns Columns) (string, error) {
	object := map[string]any{"commit_lsn": e.Position.Commit.String(), "ordinal": e.Position.Ordinal}
	for _, field := range columns.Fields(e) {
		switch value := *field.Value; {
		case value == nil:
		case field.Usual == "payload" && columns.Bytea():
			object[field.Name] = `\x` + hex.EncodeToString(value)
		case field.Usual == "payload" && (columns.Payload == "" || columns.Payload == "jsonb"),
			field.Usual == "headers" && json.Valid(value):
			object[field.Name] = json.RawMessage(value)
		default:
			object[field.Name] = string(value)
		}
	}
	whole, err := json.Marshal(object)
	if err != nil {
		return "", fmt.Errorf("keep event %s whole: %w", e.ID, err)
	}
	return string(whole), nil
}
