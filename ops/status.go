package ops

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/checkpoint"
	"outbox-relay/internal/fault"
	"outbox-relay/outbox"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// Status is what `status --json` prints. Names and meanings are stable; a later
// release may add members. What is null is not there, or not known. Times are
// RFC 3339 in UTC, by Postgres's clock; LSNs are as Postgres prints them.
type Status struct {
	At           time.Time          `json:"at"`
	Table        string             `json:"table"`
	AfterPublish string             `json:"after_publish"`
	Relay        *RelayStatus       `json:"relay"`      // that of this machine, by OUTBOX_HTTP_ADDR; null: none answers for this slot
	Slot         *SlotStatus        `json:"slot"`       // null: it does not exist
	Checkpoint   *CheckpointStatus  `json:"checkpoint"` // null: there is none
	Stream       StreamStatus       `json:"stream"`
	Rows         RowsStatus         `json:"rows"`
	Failures     []outbox.FailedRow `json:"failures"` // the newest, at most 5
	Leftovers    LeftoversStatus    `json:"leftovers"`
	Batch        *BatchStatus       `json:"batch"`    // rows published from the table, at present or last; null: never any
	Problems     []Problem          `json:"problems"` // none: all is well
}

// RelayStatus is what the relay that runs here says of itself.
type RelayStatus struct {
	State   string `json:"state"`
	Trouble string `json:"trouble"` // what is in its way; empty: nothing
}

// SlotStatus is the replication slot.
type SlotStatus struct {
	Name      string `json:"name"`
	Plugin    string `json:"plugin"`
	Active    bool   `json:"active"`     // a relay reads from it
	ActivePID *int   `json:"active_pid"` // the walsender's
	WALStatus string `json:"wal_status"`
	// InvalidationReason is why it is lost, as Postgres says from 17 on; empty: it is not, or not known.
	InvalidationReason string `json:"invalidation_reason"`
	SafeWALSize        *int64 `json:"safe_wal_size"` // bytes that can be written before it is in danger of being lost; null: no limit
	RestartLSN         string `json:"restart_lsn"`
	ConfirmedLSN       string `json:"confirmed_flush_lsn"`
	LagBytes           int64  `json:"lag_bytes"`  // WAL written since confirmed_flush_lsn, of whatever table
	HeldBytes          int64  `json:"held_bytes"` // WAL that Postgres keeps for it, since restart_lsn
	// InactiveSince is when a relay last read from it, from Postgres 17 on; null: not known.
	InactiveSince *time.Time `json:"inactive_since"`
}

// CheckpointStatus is the relay's checkpoint.
type CheckpointStatus struct {
	Format         int       `json:"format"` // of the row: 2 while a batch is under way
	Phase          string    `json:"phase"`  // creating, backfilling or streaming
	CommitLSN      string    `json:"commit_lsn"`
	Ordinal        int64     `json:"ordinal"`
	ConfirmedLSN   string    `json:"confirmed_lsn"`
	Stream         string    `json:"stream"`
	StreamSequence int64     `json:"stream_sequence"` // of the stream at exactly this position
	ForeignSeen    bool      `json:"foreign_seen"`
	Backfilled     int64     `json:"backfilled"` // rows that the present or last backfill is done with
	UpdatedAt      time.Time `json:"updated_at"`
	AgeSeconds     float64   `json:"age_seconds"` // since updated_at; an idle relay writes nothing
}

// StreamStatus is the stream; the figures are null where NATS can't be asked.
type StreamStatus struct {
	Name         string  `json:"name"`
	Error        *string `json:"error"` // why it can't be asked
	LastSequence *uint64 `json:"last_sequence"`
	Messages     *uint64 `json:"messages"`
	Bytes        *uint64 `json:"bytes"`
	Fault        *string `json:"fault"` // why it can't take the relay's messages at present; null: it can
	remedy       string
}

// RowsStatus counts rows by status at a cost that does not grow with the table:
// the newest ids one by one, those before them by a sample of pages. With
// OUTBOX_AFTER_PUBLISH=keep no row tells whether it is published: all but the
// failed ones are counted as kept, and pending, published and the lag are null.
type RowsStatus struct {
	Pending          *int64     `json:"pending"`
	Published        *int64     `json:"published"`
	Kept             *int64     `json:"kept"`
	Failed           *int64     `json:"failed"`
	Exact            bool       `json:"exact"`              // false: pending, published and kept are estimates for the rows before the newest
	FailedExact      bool       `json:"failed_exact"`       // false: failed is a lower bound
	CountedNewest    int64      `json:"counted_newest"`     // rows with the newest ids, counted one by one
	PendingInNewest  *int64     `json:"pending_in_newest"`  // exact
	SampledEachPages int64      `json:"sampled_each_pages"` // one page of so many was read for the others; 0: there are no others
	OldestPendingAt  *time.Time `json:"oldest_pending_at"`  // created_at; of all that were seen
	LagSeconds       *float64   `json:"lag_seconds"`        // age of the oldest pending row that was seen; 0: none is pending
	Error            *string    `json:"error"`              // why they could not be counted
}

// LeftoversStatus counts the rows of outbox_relay_leftovers, up to 10,000 each.
type LeftoversStatus struct {
	Waiting int     `json:"waiting"` // outcomes to be written later
	Refused int     `json:"refused"` // those of them that Postgres has refused to write
	Refusal *string `json:"refusal"` // why, of one of these
	Kept    int     `json:"kept"`    // rejected events whose row is gone
}

// BatchStatus is rows that are published from the table: of a backfill, a retry
// or a replay.
type BatchStatus struct {
	Kind       string    `json:"kind"`
	Run        *string   `json:"run"` // of a replay
	Rows       int       `json:"rows"`
	Done       int       `json:"done"`
	RecordedAt time.Time `json:"recorded_at"`
	AgeSeconds float64   `json:"age_seconds"`
}

// Problem is what is wrong, and what to do about it.
type Problem struct {
	What   string `json:"what"`
	Remedy string `json:"remedy"`
}

const (
	listedFailures = 5
	streamTimeout  = 5 * time.Second
	relayTimeout   = 2 * time.Second // for the relay of this machine to answer
	// abandonedAfter is how long nobody has to have read from a slot before it may be one
	// that nobody needs.
	abandonedAfter = 24 * time.Hour
	standsAfter    = time.Minute // without an advance, with rows that wait
)

// Status prints how the relay stands, for people or as JSON. Whatever it finds:
// that it could be read is what its error tells.
func (a Admin) Status(ctx context.Context, asJSON bool) error {
	status, err := a.read(ctx)
	if err != nil {
		return err
	}
	if !asJSON {
		_, err = io.WriteString(a.Out, status.text())
		return err
	}
	encoder := json.NewEncoder(a.Out)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	return encoder.Encode(status)
}

func (a Admin) read(ctx context.Context) (Status, error) {
	s := Status{Table: a.Table.Schema + "." + a.Table.Name, AfterPublish: string(a.Table.Mode), Failures: []outbox.FailedRow{}}
	err := a.use(ctx, outbox.CensusSettings(), func(conn *pgx.Conn) error {
		progress, err := a.Table.Progress(ctx, conn)
		if err != nil {
			return err
		}
		s.take(a.Table.Slot, progress)
		if s.Slot != nil && !s.Slot.Active {
			details, err := a.Table.ReadSlotDetails(ctx, conn)
			if err != nil && !errors.Is(err, pgx.ErrNoRows) {
				return err
			}
			s.Slot.InactiveSince = details.InactiveSince
		}
		return a.count(ctx, conn, &s)
	})
	if err != nil {
		return s, err
	}
	s.Relay = a.askRelay(ctx)
	s.Stream = a.readStream(ctx)
	if ctx.Err() != nil {
		return s, context.Cause(ctx)
	}
	s.Problems = s.problems()
	return s, nil
}

// take fills in how far the relay has come.
func (s *Status) take(slot string, p outbox.Progress) {
	s.At = p.At.UTC()
	s.Leftovers = LeftoversStatus{Waiting: p.Waiting, Refused: p.Refused, Kept: p.Kept}
	if p.Refused > 0 {
		s.Leftovers.Refusal = &p.Refusal
	}
	if p.Slot != nil {
		s.Slot = &SlotStatus{Name: slot, Plugin: p.Slot.Plugin, Active: p.Slot.Active, WALStatus: p.Slot.WALStatus, InvalidationReason: p.Slot.Invalidation,
			SafeWALSize: p.Slot.SafeWALSize, RestartLSN: p.Slot.RestartLSN, ConfirmedLSN: p.Slot.ConfirmedLSN,
			LagBytes: p.Slot.Lag, HeldBytes: p.Slot.Held}
		if p.Slot.PID != 0 {
			s.Slot.ActivePID = &p.Slot.PID
		}
	}
	if c := p.Checkpoint; c != nil {
		s.Checkpoint = &CheckpointStatus{Format: c.Format, Phase: c.Phase, CommitLSN: c.CommitLSN, Ordinal: c.Ordinal,
			ConfirmedLSN: c.ConfirmedLSN, Stream: c.Stream, StreamSequence: c.Sequence, ForeignSeen: c.Foreign,
			Backfilled: c.Backfilled, UpdatedAt: c.UpdatedAt.UTC(), AgeSeconds: p.At.Sub(c.UpdatedAt).Seconds()}
	}
	if b := p.Batch; b != nil {
		s.Batch = &BatchStatus{Kind: b.Kind, Rows: b.Rows, Done: b.Done, RecordedAt: b.RecordedAt.UTC(), AgeSeconds: p.At.Sub(b.RecordedAt).Seconds()}
		if b.Run != "" {
			s.Batch.Run = &b.Run
		}
	}
}

// count fills in the rows. A count that takes too long is left out, and says so.
func (a Admin) count(ctx context.Context, conn *pgx.Conn, s *Status) error {
	census, err := a.Table.Census(ctx, conn)
	if err == nil {
		s.Rows.take(census, a.Table.Mode, s.At)
		var failed int64
		failed, s.Rows.FailedExact, s.Failures, err = a.Table.Failures(ctx, conn, listedFailures)
		s.Rows.Failed = &failed
	}
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == "57014" && ctx.Err() == nil { // query_canceled: statement_timeout
		text := "it takes longer than " + outbox.CensusSettings()["statement_timeout"]
		s.Rows, s.Failures = RowsStatus{Error: &text}, []outbox.FailedRow{}
		return nil
	}
	for i := range s.Failures {
		s.Failures[i].FailedAt = s.Failures[i].FailedAt.UTC()
	}
	return err
}

func (r *RowsStatus) take(c outbox.Census, mode outbox.Mode, now time.Time) {
	r.Exact, r.CountedNewest, r.SampledEachPages = c.Exact, c.Newest, c.Step
	if mode == outbox.Keep {
		kept := c.Pending + c.Published
		r.Kept = &kept
		return
	}
	r.Pending, r.Published, r.PendingInNewest = &c.Pending, &c.Published, &c.NewestPending
	lag := 0.0
	if c.OldestPending != nil {
		oldest := c.OldestPending.UTC()
		r.OldestPendingAt = &oldest
		lag = max(0, now.Sub(oldest).Seconds())
	}
	r.LagSeconds = &lag
}

// readStream asks the stream's leader, for a few seconds.
func (a Admin) readStream(ctx context.Context) StreamStatus {
	s := StreamStatus{Name: a.Sink.Stream.Name}
	limited, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	usage, err := a.usage(limited)
	if err != nil {
		text := err.Error()
		if errors.Is(err, context.DeadlineExceeded) {
			text = fmt.Sprintf("NATS does not answer within %s: start it, or correct OUTBOX_NATS_URL", streamTimeout)
		}
		s.Error = &text
		return s
	}
	s.LastSequence, s.Messages, s.Bytes = &usage.Last, &usage.Messages, &usage.Bytes
	if usage.Fault != nil {
		f := fault.Of(usage.Fault)
		s.Fault, s.remedy = &f.What, f.Remedy
	}
	return s
}

// askRelay asks the relay that serves on OUTBOX_HTTP_ADDR how it is; nil: none does, or it
// is another slot's.
func (a Admin) askRelay(ctx context.Context) *RelayStatus {
	ctx, cancel := context.WithTimeout(ctx, relayTimeout)
	defer cancel()
	const nothingOld = "/api/status?history=9000000000000000000&log=9000000000000000000"
	body, code, err := get(ctx, a.HTTP, nothingOld)
	var at pageStatus
	if err != nil || code != http.StatusOK || json.Unmarshal(body, &at) != nil || at.Slot != a.Table.Slot || at.State == "" {
		return nil
	}
	return &RelayStatus{State: at.State, Trouble: at.Trouble}
}

func (a Admin) usage(ctx context.Context) (sink.Usage, error) {
	client, err := sink.Connect(ctx, a.Sink, slog.New(slog.DiscardHandler))
	if err != nil {
		return sink.Usage{}, err
	}
	defer client.Close()
	return client.Usage(ctx, a.Sink.Stream)
}

// problems names what is wrong, the gravest first.
func (s *Status) problems() []Problem {
	found := []Problem{}
	add := func(what, remedy string) { found = append(found, Problem{What: what, Remedy: remedy}) }
	s.relayProblems(add)
	streaming := s.Checkpoint != nil && s.Checkpoint.Phase == string(checkpoint.Streaming)
	switch {
	case s.Slot == nil && s.Checkpoint == nil:
		add("the slot does not exist: no relay has run yet", "start it: `outbox-relay run` makes the slot")
	case s.Slot == nil && streaming:
		add("the slot is gone: events committed since then come through no slot", "start the relay: it takes them from the table, or says how to go on")
	case s.Slot == nil:
		add("the slot is not made yet", "it waits for open transactions: see the relay's log, or start the relay")
	case s.Slot.Plugin != "pgoutput":
		add("the slot's plugin is "+s.Slot.Plugin+", not pgoutput: it is no relay's", "choose another OUTBOX_SLOT")
	case s.Slot.WALStatus == "lost":
		loosen, _ := loosened(s.Slot.InvalidationReason)
		add("the slot is lost: "+replication.Why(s.Slot.InvalidationReason), loosen+", and start the relay: it takes what was missed from the table, or says how to go on")
	case s.Checkpoint == nil:
		add("the slot has no checkpoint: it was not made by this relay, or the row was deleted", "start the relay: it says how to go on")
	}
	if s.Slot != nil && s.Slot.WALStatus == "unreserved" {
		add("the slot is about to be lost: Postgres may remove WAL that it needs", "let the relay catch up now; raise max_slot_wal_keep_size")
	}
	if s.Slot != nil && !s.Slot.Active {
		add("no relay reads from the slot: Postgres keeps "+size(s.Slot.HeldBytes)+" of WAL for it, and ever more", s.startOne())
	}
	s.streamProblems(add)
	s.rowProblems(add)
	return found
}

// relayProblems are what the relay itself says, and what shows that it does not get on.
func (s *Status) relayProblems(add func(what, remedy string)) {
	if r := s.Relay; r != nil && r.Trouble != "" {
		add("the relay of this machine is "+r.State+": "+r.Trouble, "its log has more; /readyz says when it is over")
	}
	if stands := s.stands(); stands > 0 {
		add("rows have been pending for "+span(stands)+", and the checkpoint has not moved: the relay that holds the slot does not get on",
			"see /readyz and the log of the relay that holds the slot")
	}
}

// stands returns for how long rows wait that were inserted since the checkpoint last moved,
// with a relay at work; 0: none do, or not for long. Older ones may be those that
// OUTBOX_BACKFILL=false leaves alone, or that the application holds locked.
func (s *Status) stands() time.Duration {
	oldest, c := s.Rows.OldestPendingAt, s.Checkpoint
	if s.Slot == nil || !s.Slot.Active || c == nil || oldest == nil || s.Leftovers.Waiting > 0 ||
		s.At.Sub(c.UpdatedAt) < standsAfter || s.At.Sub(*oldest) < standsAfter || oldest.Before(c.UpdatedAt.Add(-standsAfter)) {
		return 0
	}
	return s.At.Sub(*oldest)
}

// startOne is what to do about a slot that nobody reads from.
func (s *Status) startOne() string {
	var written, left time.Duration = abandonedAfter, abandonedAfter
	if s.Checkpoint != nil {
		written = time.Duration(s.Checkpoint.AgeSeconds * float64(time.Second))
	}
	if s.Slot.InactiveSince != nil {
		left = s.At.Sub(*s.Slot.InactiveSince)
	}
	if mayBeAbandoned(written, left) {
		return "start one; if it is not to come back: `outbox-relay drop " + s.Slot.Name + "`"
	}
	return "start one: `outbox-relay run`; the log of the one that ran says why it does not any more"
}

// mayBeAbandoned reports whether it is so long ago that a relay wrote its checkpoint, and
// left the slot, that it may never come back. An idle relay writes no checkpoint.
func mayBeAbandoned(written, left time.Duration) bool {
	return min(written, left) >= abandonedAfter
}

func (s *Status) streamProblems(add func(what, remedy string)) {
	switch c := s.Checkpoint; {
	case s.Stream.Error != nil:
		add("the stream could not be asked", "see the line above; what is committed meanwhile waits in the slot")
	case c != nil && c.Stream != s.Stream.Name:
		add("the checkpoint belongs to stream "+c.Stream+", not "+s.Stream.Name, "correct OUTBOX_STREAM")
	case c != nil && *s.Stream.LastSequence < uint64(c.StreamSequence):
		add("the stream ends before the checkpoint: the broker has lost messages, or this is another stream", "see the relay's log: it goes back as far as it can, or says what is missing")
	}
	if s.Stream.Fault != nil {
		add(*s.Stream.Fault, s.Stream.remedy)
	}
	if s.Checkpoint != nil && s.Checkpoint.ForeignSeen {
		add("others have published on the relay's subjects", "deny it to them")
	}
}

func (s *Status) rowProblems(add func(what, remedy string)) {
	if s.Rows.Error != nil {
		add("the rows were not counted: "+*s.Rows.Error, "VACUUM (ANALYZE) "+s.Table+" is due")
	}
	if failed := s.Rows.Failed; failed != nil && *failed > 0 {
		add(atLeast(s.Rows.FailedExact)+rowsAre(*failed)+" failed", "mend the cause, then `outbox-relay retry ID…` or `outbox-relay retry --all`")
	}
	if s.Leftovers.Kept > 0 {
		add(fmt.Sprintf("%s of rejected events stand in outbox_relay_leftovers: their rows were deleted", rows(int64(s.Leftovers.Kept))), "look at them, then delete them there")
	}
	if l := s.Leftovers; l.Refusal != nil {
		add(fmt.Sprintf("Postgres refuses to write the outcome of %s: %s", rows(int64(l.Refused)), *l.Refusal),
			"change the trigger, constraint or foreign key that refuses it: the relay tries again once a minute")
	}
	if n := s.Leftovers.Waiting - s.Leftovers.Refused; n > 0 {
		add(rowsAre(int64(n))+" locked by the application: their outcome is written later", "end the transactions that hold them")
	}
}

func atLeast(exact bool) string {
	if exact {
		return ""
	}
	return "at least "
}
