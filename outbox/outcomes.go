package outbox

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/checkpoint"
	"outbox-relay/outbox/event"
)

// Rejected is an event that can never be stored, and why. The event is a copy:
// it is kept whole where its row is gone.
type Rejected struct {
	Event  event.Event
	Reason string
}

// Recorded counts what recording a batch did.
type Recorded struct {
	Published       int // rows marked or deleted
	PublishedLocked int // rows that the application holds locked: written later, from the leftovers
	Failed          int // rows marked as failed
	FailedLocked    int
	Unchanged       int // rows that were free, and that writing their outcome did not change: kept in the leftovers
	Astray          int // rows that are not in the partition that their id tells: looked for in all later, from the leftovers
	Held            int // outcomes that were kept in the leftovers without a look at their rows
	Kept            int // rejected events whose row is gone: kept whole in the leftovers
	sent            int
}

// Locked counts the rows whose outcome became a leftover since they are locked.
func (r Recorded) Locked() int { return r.PublishedLocked + r.FailedLocked }

// Answered counts the published rows that the application had deleted or
// changed before they were recorded.
func (r Recorded) Answered() int {
	return max(0, r.sent-r.Published-r.PublishedLocked-r.Unchanged-r.Astray)
}

// Outcomes returns the SQL that records what became of the events of a batch,
// to be carried out together with the checkpoint. It tells apart, in one
// statement, rows that are free, that the application holds locked (the outcome
// becomes a leftover), and that are gone or no longer pending (an answer). A trigger
// can swallow a write, or take it back: what Postgres returns of the row says so. All
// rows must be visible: see Snapshot.
func (t Table) Outcomes(items []checkpoint.Item, r *Recorded) (checkpoint.Effects, error) {
	var published, failed, reasons, events []string
	for _, item := range items {
		switch {
		case item.Outcome == checkpoint.Skipped:
		case item.Outcome == checkpoint.Parked:
			rejected := item.Detail.(*Rejected)
			whole, err := whole(&rejected.Event, t.Columns)
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
		written as (%s),
		locked as (insert into %s (slot, id, outcome)
			select @slot, id, 'published' from sent where status = 'pending' and not free or %s
			union all select @slot, id, 'published' from (%s) as unchanged
			on conflict (slot, id) do nothing returning 1)`, t.published(sent, "free"), t.leftovers(), sent.astray(), unchanged("sent", "written"))
	e.Result += `, (select count(*) from written where done), (select count(*) from sent where status = 'pending' and not free),
		(select count(*) from (` + unchanged("sent", "written") + `) as u),
		(select count(*) from sent where ` + sent.astray() + `)`
	e.Dest = append(e.Dest, &r.Published, &r.PublishedLocked, &r.Unchanged, &r.Astray)
	r.sent = len(ids)
}

// unchanged selects the ids of a list whose rows were free and are not among those that
// the other expression has written. It compares ids only where there are fewer of them.
func unchanged(list, written string) string {
	return fmt.Sprintf(`select id from (select id from %[1]s where free except select id from %[2]s where done) as u
		where (select count(*) from %[2]s where done) < (select count(*) from %[1]s where free)`, list, written)
}

// lock is what published needs. A deletion waits for a foreign key's lock too, so
// SKIP LOCKED has to pass over that.
func (t Table) lock() string {
	if t.Mode == Delete {
		return "update"
	}
	return "no key update"
}

// published writes the outcome of those rows of a list that the condition holds for. It
// returns their ids, and whether that is done: a trigger can have changed the row's status.
func (t Table) published(l *list, condition string) string {
	if t.Mode == Delete {
		return fmt.Sprintf(`delete from %s e where %s returning %s as id, true as done`, t, l.isIn(condition), t.id("e"))
	}
	return fmt.Sprintf(`update %s e set status = 'published', published_at = now() where %s returning %s as id, e.status = 'published' as done`,
		t, l.isIn(condition), t.id("e"))
}

// An orphan can be noted already, without the event, by Park. DISTINCT ON: one
// command can't come twice upon the same leftover.
func (t Table) recordFailed(e *checkpoint.Effects, ids, reasons, events []string, r *Recorded) {
	bad := t.newList(e.Args, "bad", ids)
	bad.add("reason", reasons)
	bad.add("event", events)
	e.CTE += bad.with("no key update") + fmt.Sprintf(`,
		parked as (%[1]s),
		badlocked as (insert into %[2]s (slot, id, outcome, reason, event)
			select @slot, id, 'failed', reason, event::jsonb from bad
				where status = 'pending' and not free or %[3]s or id in (%[5]s)
			on conflict (slot, id) do nothing returning 1),
		orphans as (insert into %[2]s as l (slot, id, outcome, reason, event, waiting)
			select distinct on (id) @slot, id, 'failed', reason, event::jsonb, false from bad where %[4]s
			on conflict (slot, id) do update set event = excluded.event where l.outcome = 'failed' and l.event is null returning 1)`,
		t.failed(bad, "free"), t.leftovers(), bad.astray(), bad.gone(), unchanged("bad", "parked"))
	e.Result += `, (select count(*) from parked where done), (select count(*) from badlocked), (select count(*) from orphans)`
	e.Dest = append(e.Dest, &r.Failed, &r.FailedLocked, &r.Kept)
}

// failed writes the outcome, with its reason, of those rows of a list that the condition
// holds for. It returns what published does.
func (t Table) failed(l *list, condition string) string {
	return fmt.Sprintf(`update %[1]s e set status = 'failed', failed_at = now(), failed_attempts = e.failed_attempts + 1,
		failed_reasons = array_append(e.failed_reasons, (select jsonb_object(@%[2]s_id::text[], @%[2]s_reason::text[])) ->> (%[3]s)) where %[4]s
		returning %[3]s as id, e.status = 'failed' as done`,
		t, l.name, t.id("e"), l.isIn(condition))
}

// Held returns the SQL that keeps the outcomes of a batch in the leftovers, and touches
// none of its rows: for a batch whose rows Postgres refuses to change.
func (t Table) Held(items []checkpoint.Item) (checkpoint.Effects, error) {
	var ids, outcomes []string
	var reasons, events []*string
	for _, item := range items {
		outcome := "published"
		var reason, event *string
		switch {
		case item.Outcome == checkpoint.Skipped, item.Outcome == checkpoint.Stored && t.Mode == Keep:
			continue
		case item.Outcome == checkpoint.Parked:
			rejected := item.Detail.(*Rejected)
			whole, err := whole(&rejected.Event, t.Columns)
			if err != nil {
				return checkpoint.Effects{}, err
			}
			outcome, reason, event = "failed", &rejected.Reason, &whole
		}
		ids, outcomes, reasons, events = append(ids, string(item.ID)), append(outcomes, outcome), append(reasons, reason), append(events, event)
	}
	return checkpoint.Effects{
		CTE: `, held as (insert into ` + t.leftovers() + ` (slot, id, outcome, reason, event)
			select distinct on (id) @slot, id, outcome, reason, event::jsonb
			from advanced, unnest(@ids::text[], @outcomes::text[], @reasons::text[], @events::text[]) as h(id, outcome, reason, event)
			on conflict (slot, id) do nothing)`,
		Args: pgx.NamedArgs{"ids": ids, "outcomes": outcomes, "reasons": reasons, "events": events},
	}, nil
}

// Leftover is an outcome that waits: the application holds the row locked, or Postgres
// refuses to change it.
type Leftover struct {
	ID, Outcome, Reason string
	Refused             bool // not long ago
}

// refusalPause is how long a row is left alone that Postgres has refused to change.
const refusalPause = time.Minute

// NextLeftovers reads the next outcomes that wait, at most limit and no more than one
// statement is to write, in the order of ids behind after. last says that there are no
// more.
func (t Table) NextLeftovers(ctx context.Context, conn *pgx.Conn, after string, limit int) (next []Leftover, last bool, err error) {
	rows, err := conn.Query(ctx, `select id, outcome, coalesce(reason, ''), coalesce(refused_at > now() - $4::interval, false) from `+t.leftovers()+`
		where slot = $1 and id > $2 and waiting order by id limit $3`, t.Slot, after, limit, refusalPause)
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
	Done      int      // written, answered by the application, or of an event whose row is gone
	Unchanged []string // ids of rows that were free, and that writing did not change
	Astray    []string // ids of rows that are not in the partition that their id tells
}

// WriteLeftovers returns the SQL that writes these outcomes as far as their rows are
// free by now. What is astray is to be given to WriteLeftoversAnywhere.
func (t Table) WriteLeftovers(leftovers []Leftover, w *LeftoversWritten) checkpoint.Effects {
	var ids, outcomes, reasons []string
	for _, l := range leftovers {
		ids, outcomes, reasons = append(ids, l.ID), append(outcomes, l.Outcome), append(reasons, l.Reason)
	}
	e := checkpoint.Effects{Args: pgx.NamedArgs{}, Dest: []any{&w.Done, &w.Unchanged, &w.Astray}}
	due := t.newList(e.Args, "due", ids)
	due.add("outcome", outcomes)
	due.add("reason", reasons)
	e.CTE = due.with(t.lock()) + fmt.Sprintf(`,
		written as (%[1]s),
		parked as (%[2]s),
		outcomes as (select * from written union all select * from parked),
		orphans as (update %[3]s set waiting = false where slot = @slot
			and id = any (array(select id from due where outcome = 'failed' and %[4]s)) returning 1),
		settled as (delete from %[3]s where slot = @slot
			and id = any (array(select id from outcomes where done
				union all select id from due where status <> 'pending' or %[4]s and outcome = 'published')) returning 1)`,
		t.published(due, "free and outcome = 'published'"), t.failed(due, "free and outcome = 'failed'"), t.leftovers(), due.gone())
	e.Result = `, (select count(*) from settled) + (select count(*) from orphans), array(` + unchanged("due", "outcomes") + `),
		array(select id from due where ` + due.astray() + `)`
	return e
}

// Refused returns the SQL that notes why Postgres does not change these rows, whose
// outcomes go on waiting.
func (t Table) Refused(ids []string, why string) checkpoint.Effects {
	return checkpoint.Effects{
		CTE: `, noted as (update ` + t.leftovers() + ` set refused = @why, refused_at = now()
			where slot = @slot and id = any (@ids::text[]) and exists (select from advanced))`,
		Args: pgx.NamedArgs{"ids": ids, "why": why},
	}
}

// WriteLeftoversAnywhere is WriteLeftovers of a table whose ids tell nothing.
func (t Table) WriteLeftoversAnywhere(leftovers []Leftover, w *LeftoversWritten) checkpoint.Effects {
	return t.anywhere().WriteLeftovers(leftovers, w)
}

// maxKept is how many bytes a value may have to be kept. As hex, or with each byte escaped
// (\u0001), it is still a string that jsonb takes, which has less than 256 MiB, in a message
// that Postgres takes, which has less than 1 GiB.
// Source: JENTRY_OFFLENMASK in src/include/utils/jsonb.h, PQ_LARGE_MESSAGE_LIMIT in
// src/include/libpq/libpq.h.
const maxKept = 32 << 20

// whole returns the event as a JSON object of its columns. A payload of another type
// than jsonb, or one that did not convert, is a string, to the letter; bytea is in hex, as Postgres writes it.
// What is larger than maxKept is left out; "left_out" then has its size in bytes.
func whole(e *event.Event, columns event.Columns) (string, error) {
	object := map[string]any{"commit_lsn": e.Position.Commit.String(), "ordinal": e.Position.Ordinal}
	leftOut := map[string]int{}
	for _, field := range columns.Fields(e) {
		switch value := *field.Value; {
		case value == nil:
		case len(value) > maxKept:
			leftOut[field.Name] = len(value)
		case field.Usual == "payload" && columns.Bytea():
			object[field.Name] = `\x` + hex.EncodeToString(value)
		case (field.Usual == "payload" && (columns.Payload == "" || columns.Payload == "jsonb") || field.Usual == "headers") && json.Valid(value):
			object[field.Name] = json.RawMessage(value)
		default:
			object[field.Name] = string(value)
		}
	}
	if len(leftOut) > 0 {
		object["left_out"] = leftOut
	}
	whole, err := json.Marshal(object)
	if err != nil {
		return "", fmt.Errorf("keep event %s whole: %w", e.ID, err)
	}
	return string(whole), nil
}
