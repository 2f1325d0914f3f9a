package checkpoint

import (
	"context"
	"math"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/lsn"
	"outbox-relay/outbox/event"
)

// keptApart is into how many parts the kept checkpoints divide their time.
const keptApart = 16

// keeping is the part of an advance that keeps it as an older checkpoint, once
// in a while, where a message, or none, tells whether the stream bears it out, and forgets those that are too old to go back to.
func (s *Store) keeping(a Advance) string {
	if a.Keep == 0 || a.Batch.Rows > 0 {
		return ""
	}
	return `, kept as (
			insert into ` + s.history + ` (slot, commit_lsn, ordinal, confirmed_lsn, stream_sequence, message_id)
			select slot, commit_lsn, ordinal, @confirm::pg_lsn, stream_sequence, message_id from advanced where (message_id is not null or stream_sequence = 0) and not exists (
				select from ` + s.history + ` where slot = @slot and recorded_at > now() - make_interval(secs => @apart::float8))
		), forgotten as (
			delete from ` + s.history + ` where slot = @slot and exists (select from advanced)
				and recorded_at < now() - 2 * make_interval(secs => @keep::float8))`
}

// Earlier is an older checkpoint.
type Earlier struct {
	Position  event.Position
	Confirmed pglogrepl.LSN // as it was then: a slot that is not beyond has every event after Position
	Sequence  uint64
	MessageID string
}

// Earlier lists the kept checkpoints that stand at a lower sequence than the
// present one, the newest first.
func (s *Store) Earlier(ctx context.Context) ([]Earlier, error) {
	rows, err := s.conn.Query(ctx, `select h.commit_lsn::text, h.ordinal, h.confirmed_lsn::text, h.stream_sequence, coalesce(h.message_id, '')
		from `+s.history+` h join `+s.table+` c using (slot)
		where slot = $1 and h.stream_sequence < c.stream_sequence
		order by h.stream_sequence desc`, s.slot)
	if err != nil {
		return nil, s.explain("read older", err)
	}
	earlier, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (e Earlier, err error) {
		var commit, confirmed string
		if err = row.Scan(&commit, &e.Position.Ordinal, &confirmed, &e.Sequence, &e.MessageID); err != nil {
			return e, err
		}
		if e.Position.Commit, err = lsn.Parse(commit); err != nil {
			return e, err
		}
		e.Confirmed, err = lsn.Parse(confirmed)
		return e, err
	})
	return earlier, s.explain("read older", err)
}

// GoBack makes an older checkpoint the current one. What was stored behind it
// and is still in the stream is matched like what a crash left.
func (s *Store) GoBack(ctx context.Context, now *Checkpoint, e Earlier) error {
	to := *now
	to.Position, to.MessageID = e.Position, e.MessageID
	to.Bound = min(to.Bound+int(now.Sequence-e.Sequence), math.MaxInt32) // its column has no more
	to.Sequence = e.Sequence
	err := s.changeClaimed(ctx, "go back with the", `commit_lsn = @commit::pg_lsn, ordinal = @ordinal, stream_sequence = @sequence,
			message_id = nullif(@message::text, ''), unrecorded_bound = @bound, updated_at = now()`,
		`, later as (delete from `+s.history+` h using changed where h.slot = changed.slot and h.stream_sequence > @sequence)`,
		pgx.NamedArgs{"commit": to.Position.Commit.String(), "ordinal": to.Position.Ordinal,
			"sequence": to.Sequence, "message": to.MessageID, "bound": to.Bound})
	if err == nil {
		*now = to
	}
	return err
}
