package outbox

import (
	"context"
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
	Astray          int // rows that are not in the partition that their id tells: looked for in all later, from the leftovers
	Kept            int // rejected events whose row is gone: kept whole in the leftovers
	sent            int
}

// Locked counts the rows whose outcome became a leftover since they are locked.
func (r Recorded) Locked() int { return r.PublishedLocked + r.FailedLocked }

// Answered counts the published rows that the application had deleted or
// changed before they were recorded.
func (r Recorded) Answered() int { return max(0, r.sent-r.Published-r.PublishedLocked-r.Astray) }

// Outcomes returns the SQL that records what became of the events of a batch,
// to be carried out together with the checkpoint. It tells apart, in one
// statement, rows that are free, that the application holds locked (the outcome
// becomes a leftover), and that are gone or no longer pending (an answer). All
// rows must be visible: see Snapshot.
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
	sent := t.newList(e.Args, "sent", ids)
	e.CTE += sent.with(t.lock()) + fmt.Sprintf(`,
		written as (%s returning 1),
		locked as (insert into %s (slot, id, outcome)
			select @slot, id, 'published' from sent where status = 'pending' and not free or %s
			on conflict (slot, id) do nothing returning 1)`, t.published(sent, "free"), t.leftovers(), sent.astray())
	e.Result += `, (select count(*) from written), (select count(*) from sent where status = 'pending' and not free),
		(select count(*) from sent where ` + sent.astray() + `)`
	e.Dest = append(e.Dest, &r.Published, &r.PublishedLocked, &r.Astray)
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

// published writes the outcome of those rows of a list that the condition holds for.
func (t Table) published(l *list, condition string) string {
	if t.Mode == Delete {
		return fmt.Sprintf(`delete from %s e where %s`, t, l.isIn(condition))
	}
	return fmt.Sprintf(`update %s e set status = 'published', published_at = now() where %s`, t, l.isIn(condition))
}

// An orphan can be noted already, without the event, by Park. DISTINCT ON: one
// command can't come twice upon the same leftover.
func (t Table) recordFailed(e *checkpoint.Effects, ids, reasons, events []string, r *Recorded) {
	bad := t.newList(e.Args, "bad", ids)
	bad.add("reason", reasons)
	bad.add("event", events)
	e.CTE += bad.with("no key update") + fmt.Sprintf(`,
		parked as (%[1]s returning 1),
		badlocked as (insert into %[2]s (slot, id, outcome, reason, event)
			select @slot, id, 'failed', reason, event::jsonb from bad where status = 'pending' and not free or %[3]s
			on conflict (slot, id) do nothing returning 1),
		orphans as (insert into %[2]s as l (slot, id, outcome, reason, event, waiting)
			select distinct on (id) @slot, id, 'failed', reason, event::jsonb, false from bad where %[4]s
			on conflict (slot, id) do update set event = excluded.event where l.outcome = 'failed' and l.event is null returning 1)`,
		t.failed(bad, "free"), t.leftovers(), bad.astray(), bad.gone())
	e.Result += `, (select count(*) from parked), (select count(*) from badlocked), (select count(*) from orphans)`
	e.Dest = append(e.Dest, &r.Failed, &r.FailedLocked, &r.Kept)
}

// failed writes the outcome, with its reason, of those rows of a list that the condition
// holds for.
func (t Table) failed(l *list, condition string) string {
	return fmt.Sprintf(`update %[1]s e set status = 'failed', failed_at = now(), failed_attempts = e.failed_attempts + 1,
		failed_reasons = array_append(e.failed_reasons, (select jsonb_object(@%[2]s_id::text[], @%[2]s_reason::text[])) ->> (%[3]s)) where %[4]s`,
		t, l.name, t.id("e"), l.isIn(condition))
}

// Leftover is an outcome that waits until the application lets go of the row.
type Leftover struct {
	ID, Outcome, Reason string
}

// NextLeftovers reads the next outcomes that wait, at most limit and no more than one
// statement is to write, in the order of ids behind after. last says that there are no
// more.
func (t Table) NextLeftovers(ctx context.Context, conn *pgx.Conn, after string, limit int) (next []Leftover, last bool, err error) {
	rows, err := conn.Query(ctx, `select id, outcome, coalesce(reason, '') from `+t.leftovers()+`
		where slot = $1 and id > $2 and waiting order by id limit $3`, t.Slot, after, limit)
	if err != nil {
		return nil, false, fmt.Errorf("read the leftovers of slot %s: %w", t.Slot, err)
	}
	next, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Leftover])
	if err != nil {
		return nil, false, fmt.Errorf("read the leftovers of slot %s: %w", t.Slot, err)
	}
	ids := make([]string, len(next))
	for i, l := range next {
		ids[i] = l.ID
	}
	near := t.Near(ids)
	return next[:near], near == len(next) && len(next) < limit, nil
}

// LeftoversWritten is what came of writing leftovers.
type LeftoversWritten struct {
	Done   int      // written, answered by the application, or of an event whose row is gone
	Astray []string // ids of rows that are not in the partition that their id tells
}

// WriteLeftovers returns the SQL that writes these outcomes as far as their rows are
// free by now. What is astray is to be given to WriteLeftoversAnywhere.
func (t Table) WriteLeftovers(leftovers []Leftover, w *LeftoversWritten) checkpoint.Effects {
	var ids, outcomes, reasons []string
	for _, l := range leftovers {
		ids, outcomes, reasons = append(ids, l.ID), append(outcomes, l.Outcome), append(reasons, l.Reason)
	}
	e := checkpoint.Effects{Args: pgx.NamedArgs{}, Dest: []any{&w.Done, &w.Astray}}
	due := t.newList(e.Args, "due", ids)
	due.add("outcome", outcomes)
	due.add("reason", reasons)
	e.CTE = due.with(t.lock()) + fmt.Sprintf(`,
		written as (%[1]s returning 1),
		parked as (%[2]s returning 1),
		orphans as (update %[3]s set waiting = false where slot = @slot
			and id = any (array(select id from due where outcome = 'failed' and %[4]s)) returning 1),
		settled as (delete from %[3]s where slot = @slot
			and id = any (array(select id from due where free or status <> 'pending' or %[4]s and outcome = 'published')) returning 1)`,
		t.published(due, "free and outcome = 'published'"), t.failed(due, "free and outcome = 'failed'"), t.leftovers(), due.gone())
	e.Result = `, (select count(*) from settled) + (select count(*) from orphans), array(select id from due where ` + due.astray() + `)`
	return e
}

// WriteLeftoversAnywhere is WriteLeftovers of a table whose ids tell nothing.
func (t Table) WriteLeftoversAnywhere(leftovers []Leftover, w *LeftoversWritten) checkpoint.Effects {
	return t.anywhere().WriteLeftovers(leftovers, w)
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
