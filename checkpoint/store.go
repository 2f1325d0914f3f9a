package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/lsn"
	"outbox-relay/outbox/event"
)

// Format is the newest version of the checkpoint row that this release knows. A
// row of a newer one is refused, never guessed at. A row says the oldest format
// that has all it says, so that a release can be rolled back: 2 has the phase
// backfilling, and rows that are published from the table, and is written only
// while these are under way.
const Format = 2

var (
	// ErrNone says that the slot has no checkpoint row.
	ErrNone = errors.New("no checkpoint row")
	// ErrSuperseded says that another relay, or a newer connection of this one,
	// has claimed the checkpoint. Who gets it must stop publishing and recording.
	ErrSuperseded = errors.New("the checkpoint was claimed by another relay")
	// ErrNotReplicated says that a commit is only local: Postgres gave up
	// waiting for its synchronous standby. Whether it lasts is unknown.
	ErrNotReplicated = errors.New("commit not acknowledged by the synchronous standby")
)

// Phase tells how far a slot's life has come.
type Phase string

const (
	Creating    Phase = "creating"    // the row is written, the slot may not exist yet
	Backfilling Phase = "backfilling" // the slot exists; the rows that do not come out of it are being published
	Streaming   Phase = "streaming"   // events flow from the slot
)

// Checkpoint is the durable state of one slot: a row in Postgres, in the
// database that the events come from, so that it is restored, rolled back and
// failed over together with them.
type Checkpoint struct {
	Phase         Phase
	SystemID      string // of the Postgres cluster, by IDENTIFY_SYSTEM
	Timeline      int32
	Position      event.Position // every event up to it is stored or parked
	Confirmed     pglogrepl.LSN  // the highest LSN ever confirmed to the slot
	Stream        string
	StreamCreated time.Time // microseconds
	Sequence      uint64    // the stream's sequence at exactly Position
	MessageID     string    // of the message at Sequence; empty where it was not ours
	Bound         int       // how many events may be stored and not recorded; 0 after a clean stop
	Foreign       bool      // a message that is not ours was seen in the stream
	Publication   string    // fingerprint of the publication; empty: to be taken anew
	Backfilled    int64     // rows that this backfill, or the last one, has published or parked
}

// Store reads and writes the checkpoint of one slot. It uses, and does not own,
// a connection with synchronous_commit on. A write returns ErrNotReplicated
// where its commit may not last. Not safe for concurrent use.
type Store struct {
	conn    *pgx.Conn
	table   string // quoted
	history string // quoted
	batches string // quoted
	backlog string // quoted
	slot    string
	epoch   int64  // ours, once claimed
	claimed string // the publication's fingerprint then: migrate may carry it over since
	// version is the row's ctid after the last advance; empty: not known. While somebody
	// holds a snapshot for long, no version of the row goes away, and a look-up by the slot
	// goes through all of them.
	version string

	notReplicated bool
}

// NewStore returns the store of slot's row in schema.outbox_relay_checkpoints.
func NewStore(conn *pgx.Conn, schema, slot string) *Store {
	s := &Store{
		conn:    conn,
		table:   pgx.Identifier{schema, "outbox_relay_checkpoints"}.Sanitize(),
		history: pgx.Identifier{schema, "outbox_relay_history"}.Sanitize(),
		batches: pgx.Identifier{schema, "outbox_relay_batches"}.Sanitize(),
		backlog: pgx.Identifier{schema, "outbox_relay_backlog"}.Sanitize(),
		slot:    slot,
	}
	return s
}

const columns = `format, phase, system_identifier, timeline, commit_lsn::text, ordinal, confirmed_lsn::text,
	stream, stream_created_at, stream_sequence, coalesce(message_id, ''), unrecorded_bound, foreign_seen,
	coalesce(publication_state, ''), backfilled`

// Create writes the row of a slot that does not exist yet, and forgets the batch
// and the history of an earlier life. It does nothing where the row is there already.
func (s *Store) Create(ctx context.Context, c Checkpoint) error {
	_, err := s.exec(ctx, "create", `with created as (insert into `+s.table+` (slot, format, phase, system_identifier, timeline,
			commit_lsn, ordinal, confirmed_lsn, stream, stream_created_at, stream_sequence, unrecorded_bound, publication_state)
		values (@slot, 1, 'creating', @system, @timeline, '0/0', 0, '0/0', @stream, @created, @sequence, 0, nullif(@publication, ''))
		on conflict (slot) do nothing returning slot),
		batch as (delete from `+s.batches+` b using created where b.slot = created.slot)
		delete from `+s.history+` h using created where h.slot = created.slot`,
		pgx.NamedArgs{"slot": s.slot, "system": c.SystemID, "timeline": c.Timeline, "stream": c.Stream, "created": c.StreamCreated,
			"sequence": c.Sequence, "publication": c.Publication})
	return err
}

// Read returns the checkpoint, or ErrNone.
func (s *Store) Read(ctx context.Context) (Checkpoint, error) {
	c, _, err := scan(s.conn.QueryRow(ctx, `select epoch, `+columns+` from `+s.table+` where slot = $1`, s.slot))
	return c, s.explain("read", err)
}

// Claim takes a new epoch and returns the checkpoint as it stood, in one
// statement: from here on no older connection can move it. To be called after
// START_REPLICATION was accepted, so that two relays never claim in turn.
func (s *Store) Claim(ctx context.Context) (Checkpoint, error) {
	s.notReplicated, s.version = false, ""
	c, epoch, err := scan(s.conn.QueryRow(ctx,
		`update `+s.table+` set epoch = epoch + 1 where slot = $1 returning epoch, `+columns, s.slot))
	s.epoch, s.claimed = epoch, c.Publication
	return c, s.explain("claim", s.durable(err))
}

// Renew puts a checkpoint whose slot is lost back to the beginning: the next slot
// begins behind the stream's sequence, with a backfill.
func (s *Store) Renew(ctx context.Context, c Checkpoint) error {
	return s.changeClaimed(ctx, "renew", `phase = 'creating', format = 1, timeline = @timeline, commit_lsn = '0/0', ordinal = 0, confirmed_lsn = '0/0',
			stream_sequence = @sequence, message_id = nullif(@message::text, ''), unrecorded_bound = 0,
			foreign_seen = foreign_seen or @foreign, publication_state = nullif(@publication::text, ''),
			stream_created_at = @created, backfilled = 0, backlog_end = null, updated_at = now()`,
		`, batch as (delete from `+s.batches+` b using changed where b.slot = changed.slot),
		older as (delete from `+s.history+` h using changed where h.slot = changed.slot)`,
		pgx.NamedArgs{"timeline": c.Timeline, "created": c.StreamCreated, "sequence": c.Sequence,
			"message": c.MessageID, "foreign": c.Foreign, "publication": c.Publication})
}

// Begin records that the relay starts to publish behind the claimed
// checkpoint, in its phase: where the slot starts, what the publication looks
// like, and how many events may from now on be stored without being recorded.
func (s *Store) Begin(ctx context.Context, c Checkpoint) error {
	return s.execClaimed(ctx, "begin", `update `+s.table+` set phase = @phase, format = `+s.format("@phase")+`,
			timeline = @timeline, commit_lsn = @commit::pg_lsn, ordinal = @ordinal, confirmed_lsn = @confirmed::pg_lsn,
			unrecorded_bound = @bound, foreign_seen = foreign_seen or @foreign,
			publication_state = case when publication_state is not distinct from nullif(@claimed::text, '') then @publication else publication_state end,
			backfilled = @backfilled,
			stream_created_at = @created, updated_at = now()
		where slot = @slot and epoch = @epoch`,
		pgx.NamedArgs{"slot": s.slot, "epoch": s.epoch, "claimed": s.claimed, "phase": string(c.Phase), "timeline": c.Timeline, "created": c.StreamCreated,
			"commit": c.Position.Commit.String(), "ordinal": c.Position.Ordinal, "confirmed": c.Confirmed.String(),
			"bound": c.Bound, "foreign": c.Foreign, "publication": c.Publication, "backfilled": c.Backfilled})
}

// Backfilled records that all rows which do not come out of the slot are done.
func (s *Store) Backfilled(ctx context.Context) error {
	return s.changeClaimed(ctx, "end the backfill of the", `phase = 'streaming', format = 1, backlog_end = null, updated_at = now()`,
		`, batch as (delete from `+s.batches+` b using changed where b.slot = changed.slot),
		listed as (delete from `+s.backlog+` b using changed where b.slot = changed.slot)`, pgx.NamedArgs{})
}

// changeClaimed changes our row under our epoch, and carries out what depends on
// the expression "changed", which has a row only then: an epoch that goes while the
// statement waits is seen by the update alone.
func (s *Store) changeClaimed(ctx context.Context, verb, set, more string, args pgx.NamedArgs) error {
	args["slot"], args["epoch"] = s.slot, s.epoch
	s.notReplicated, s.version = false, ""
	var changed int
	err := s.conn.QueryRow(ctx, `with changed as (update `+s.table+` set `+set+` where slot = @slot and epoch = @epoch returning slot)`+
		more+` select count(*) from changed`, args).Scan(&changed)
	if err = s.durable(err); err == nil && changed == 0 {
		err = ErrSuperseded
	}
	return s.explain(verb, err)
}

// format is the expression for a row's format; phase is one for its phase.
func (s *Store) format(phase string) string {
	return `case when ` + phase + ` = 'backfilling' or exists (select from ` + s.batches + ` b
		where b.slot = @slot and b.done < cardinality(b.ids)) then 2 else 1 end`
}

// Settle records that nothing is stored beyond the checkpoint: a clean stop. A
// message that is gone by the next start was then not ours.
func (s *Store) Settle(ctx context.Context) error {
	return s.execClaimed(ctx, "settle", `update `+s.table+` set unrecorded_bound = 0 where slot = $1 and epoch = $2`,
		s.slot, s.epoch)
}

// NoteForeign records that a message which is not ours was seen in the stream.
func (s *Store) NoteForeign(ctx context.Context) error {
	return s.execClaimed(ctx, "note a foreign message in the", `update `+s.table+` set foreign_seen = true where slot = $1 and epoch = $2`,
		s.slot, s.epoch)
}

// execClaimed runs a statement that changes our row only under our epoch.
func (s *Store) execClaimed(ctx context.Context, verb, sql string, args ...any) error {
	rows, err := s.exec(ctx, verb, sql, args...)
	if err == nil && rows == 0 {
		err = s.explain(verb, ErrSuperseded)
	}
	return err
}

func (s *Store) exec(ctx context.Context, verb, sql string, args ...any) (rows int64, err error) {
	s.notReplicated, s.version = false, ""
	tag, err := s.conn.Exec(ctx, sql, args...)
	return tag.RowsAffected(), s.explain(verb, s.durable(err))
}

// durable adds what a statement's own error does not tell: that its commit is
// only local.
func (s *Store) durable(err error) error {
	if err == nil && s.notReplicated {
		return ErrNotReplicated
	}
	return err
}

// Advance is one step of the checkpoint.
type Advance struct {
	Position  event.Position
	Sequence  uint64
	MessageID string        // empty: unchanged
	Confirm   pglogrepl.LSN // up to it everything is done; below what was confirmed once, where the checkpoint went back
	Keep      time.Duration // older checkpoints are kept so long; 0: none is
	Batch     BatchStep
}

// Effects is SQL that is carried out together with an advance or not at all.
// CTE is a list of common table expressions, each of which must depend on the
// expression "advanced" (one row if the checkpoint moved, else none), and may
// use the arguments @slot and @epoch beside its own. Result is a select list
// of the values that Dest takes.
type Effects struct {
	CTE    string
	Result string
	Args   pgx.NamedArgs
	Dest   []any
}

// Advance moves the checkpoint and applies the effects in one statement. One
// statement holds no lock between two messages of a client: a relay that
// freezes can't bar its successor. It returns ErrSuperseded where the epoch is
// gone; after that, after ErrNotReplicated, and after a lost connection, the
// caller must claim and read again.
func (s *Store) Advance(ctx context.Context, a Advance, e Effects) error {
	known := s.version != ""
	moved, err := s.advance(ctx, a, e, s.version)
	if err == nil && !moved && known { // somebody else, such as migrate, has changed the row
		moved, err = s.advance(ctx, a, e, "")
	}
	if err == nil && !moved {
		err = ErrSuperseded
	}
	return s.explain("advance", err)
}

// advance moves the row if it is this version, or any version where that is empty.
func (s *Store) advance(ctx context.Context, a Advance, e Effects, version string) (moved bool, err error) {
	args := pgx.NamedArgs{"slot": s.slot, "epoch": s.epoch, "commit": a.Position.Commit.String(), "version": version,
		"ordinal": a.Position.Ordinal, "sequence": a.Sequence, "message": a.MessageID, "confirm": a.Confirm.String(),
		"keep": a.Keep.Seconds(), "apart": (a.Keep / keptApart).Seconds(), "rows": a.Batch.Rows}
	for name, value := range e.Args {
		args[name] = value
	}
	is := ""
	if version != "" {
		is = "ctid = @version::text::tid and "
	}
	query := `with advanced as (
			update ` + s.table + ` set commit_lsn = @commit::pg_lsn, ordinal = @ordinal, stream_sequence = @sequence,
				message_id = coalesce(nullif(@message::text, ''), message_id),
				confirmed_lsn = greatest(confirmed_lsn, @confirm::pg_lsn), updated_at = now()` + s.stepping(a.Batch) + `
			where ` + is + `slot = @slot and epoch = @epoch and (commit_lsn, ordinal) <= (@commit::pg_lsn, @ordinal::bigint)
			returning slot, commit_lsn, ordinal, stream_sequence, message_id, ctid)` + s.steps(a.Batch) + s.keeping(a) + e.CTE + `
		select coalesce((select ctid::text from advanced), '')` + e.Result
	s.notReplicated, s.version = false, ""
	err = s.conn.QueryRow(ctx, query, args).Scan(append([]any{&s.version}, e.Dest...)...)
	return s.version != "", s.durable(err)
}

// Guarded carries effects out outside an advance, and only under our epoch: the
// expression "advanced" has one row then.
func (s *Store) Guarded(ctx context.Context, e Effects) error {
	args := pgx.NamedArgs{"slot": s.slot, "epoch": s.epoch}
	for name, value := range e.Args {
		args[name] = value
	}
	query := `with advanced as (select slot from ` + s.table + ` where slot = @slot and epoch = @epoch)` +
		e.CTE + ` select (select count(*) from advanced)` + e.Result
	var held int
	err := s.conn.QueryRow(ctx, query, args).Scan(append([]any{&held}, e.Dest...)...)
	if err == nil && held == 0 {
		err = ErrSuperseded
	}
	return s.explain("use", err)
}

// NotReplicated is to be called for the warning that Postgres sends when a
// commit stopped waiting for its synchronous standby.
// Source: SyncRepWaitForLSN in src/backend/replication/syncrep.c.
func (s *Store) NotReplicated() { s.notReplicated = true }

func (s *Store) explain(verb string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, pgx.ErrNoRows):
		return ErrNone
	default:
		return fmt.Errorf("%s checkpoint of slot %s: %w", verb, s.slot, err)
	}
}

func scan(row pgx.Row) (c Checkpoint, epoch int64, err error) {
	var commit, confirmed string
	var format int
	err = row.Scan(&epoch, &format, &c.Phase, &c.SystemID, &c.Timeline, &commit, &c.Position.Ordinal, &confirmed,
		&c.Stream, &c.StreamCreated, &c.Sequence, &c.MessageID, &c.Bound, &c.Foreign, &c.Publication, &c.Backfilled)
	if err != nil {
		return c, epoch, err
	}
	switch {
	case format < 1 || format > Format:
		return c, epoch, fmt.Errorf("its format is %d and this release knows %d: run the release that wrote it, or a newer one", format, Format)
	case c.Phase != Creating && c.Phase != Backfilling && c.Phase != Streaming:
		return c, epoch, fmt.Errorf("its phase is %q, which this release does not know", c.Phase)
	}
	if c.Position.Commit, err = lsn.Parse(commit); err != nil {
		return c, epoch, err
	}
	c.Confirmed, err = lsn.Parse(confirmed)
	return c, epoch, err
}
