package ops

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/progress"
	"outbox-relay/internal/wait"
	"outbox-relay/outbox"
)

// Replay asks the running relay to publish rows once more that are still in the
// table.
type Replay struct {
	outbox.Selection        // To: empty means now, so that a replay ends
	All              bool   // every row is meant: a selection that chooses nothing is a slip
	Run              string // its name; empty: one is made. The same name gives a message the same id
	DryRun           bool
	Yes              bool // do not ask
}

// replayRows is how many rows one message names: the most that a relay takes.
const replayRows = 1000

// runName is what goes into a header and a message's id, and needs no quotes in a
// shell.
var runName = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

func (r *Replay) check() error {
	narrowed := !r.From.IsZero() || !r.To.IsZero() || r.AggregateType != "" || r.EventType != "" || len(r.IDs) > 0
	switch {
	case !narrowed && !r.All:
		return fmt.Errorf("%w: replay takes --from, --to, --aggregate-type, --event-type or --id; to publish every row of the table once more, say --all", ErrUsage)
	case narrowed && r.All:
		return fmt.Errorf("%w: --all means every row: leave it out, or the other choices (--after only goes on with a run)", ErrUsage)
	case !r.From.IsZero() && !r.To.IsZero() && !r.From.Before(r.To):
		return fmt.Errorf("%w: --from is not before --to", ErrUsage)
	case r.Run != "" && !runName.MatchString(r.Run):
		return fmt.Errorf("%w: --run %q: 1 to 64 of letters, digits, dot, hyphen and underscore", ErrUsage, r.Run)
	}
	return nil
}

// newRun names a run by its time, and by something random beside it.
func newRun(now time.Time) string {
	return "replay-" + now.UTC().Format("20060102T150405Z") + "-" + strings.ToLower(rand.Text()[:4])
}

// Replay chooses the rows and asks for them, at most 1000 at a time, in the order
// of their ids. It goes on asking only as the relay follows: at most two requests
// are not done. When ctx ends it says how to go on, and returns an error.
func (a Admin) Replay(ctx context.Context, r Replay) error {
	if err := r.check(); err != nil {
		return err
	}
	return a.use(ctx, nil, func(conn *pgx.Conn) error {
		if r.To.IsZero() {
			if err := conn.QueryRow(ctx, `select pg_catalog.clock_timestamp()`).Scan(&r.To); err != nil {
				return fmt.Errorf("ask Postgres for the time: %w", err)
			}
		}
		if r.Run == "" {
			r.Run = newRun(r.To)
		}
		r.IDs = unique(r.IDs)
		layout, err := a.Table.ReadLayout(ctx, conn)
		if err != nil {
			return err
		}
		a.Table = a.Table.As(layout)
		total, err := a.tellChosen(ctx, conn, r)
		if err != nil {
			return err
		}
		if err := a.tellMissing(ctx, conn, r); err != nil || r.DryRun || total == 0 {
			return err
		}
		if !r.Yes {
			if err := a.confirm(ctx, "Publish "+rows(total)+" once more?"); err != nil {
				return err
			}
		}
		return (&replaying{Admin: a, Replay: r, conn: conn, total: total, began: time.Now()}).run(ctx)
	})
}

// tellChosen prints what is chosen, and returns how many rows that are.
func (a Admin) tellChosen(ctx context.Context, conn *pgx.Conn, r Replay) (total int64, err error) {
	kinds, err := a.Table.Chosen(ctx, conn, r.Selection)
	if err != nil {
		return 0, err
	}
	for _, k := range kinds {
		total += k.Rows
		fmt.Fprintf(a.Out, "%12s  %s %s\n", grouped(k.Rows), printable(k.AggregateType), printable(k.EventType))
	}
	fmt.Fprintf(a.Out, "%12s  %s\n", grouped(total), "in all, created before "+r.To.UTC().Format(time.RFC3339Nano))
	if total == 0 {
		return 0, nil
	}
	first, last, err := a.Table.Bounds(ctx, conn, r.Selection)
	fmt.Fprintf(a.Out, "%12s  %s\n%12s  %s\n", "first", first, "last", last)
	return total, err
}

// tellMissing names ids that were asked for and are not chosen.
func (a Admin) tellMissing(ctx context.Context, conn *pgx.Conn, r Replay) error {
	if len(r.IDs) == 0 {
		return nil
	}
	statuses, err := a.Table.Statuses(ctx, conn, r.IDs)
	if err != nil {
		return err
	}
	for _, id := range r.IDs {
		switch status, there := statuses[id]; {
		case !there:
			fmt.Fprintf(a.Err, "%s: there is no such row\n", id)
		case status == "failed":
			fmt.Fprintf(a.Err, "%s: is failed: `outbox-relay retry %[1]s` publishes it\n", id)
		}
	}
	return nil
}

// replaying is one replay under way.
type replaying struct {
	Admin
	Replay
	conn  *pgx.Conn
	total int64
	began time.Time

	asked    int64 // rows
	done     int64 // rows
	open     []outbox.Asked
	progress outbox.Progress
	moved    time.Time // when the relay last did
	told     time.Time
	bar      *progress.Bar // nil: not on a terminal
}

// Pauses of a replay.
const (
	replayPoll  = 25 * time.Millisecond
	replayTell  = 3 * time.Second  // between plain lines
	replayStall = 10 * time.Second // without a move: something is wrong
)

func (r *replaying) run(ctx context.Context) error {
	fmt.Fprintf(r.Err, "run %s\n", r.Run)
	r.moved, r.told = r.began, r.began
	if terminal := progress.Open(r.Err); terminal != nil {
		r.bar = terminal.Bar("replaying", int(r.total))
	}
	err := r.ask(ctx)
	for err == nil && len(r.open) > 0 {
		err = r.follow(ctx)
	}
	if r.bar != nil {
		r.bar.End()
	}
	if err != nil {
		return r.interrupted(ctx, err)
	}
	fmt.Fprintf(r.Out, "run %s: the relay is done with %s, in %s\n", r.Run, rows(r.done), span(time.Since(r.began)))
	return nil
}

// ask sends request after request, as far as the relay follows.
func (r *replaying) ask(ctx context.Context) error {
	for {
		ids, err := r.Table.NextChosen(ctx, r.conn, r.Selection, replayRows)
		if err != nil || len(ids) == 0 {
			return err
		}
		asked, err := r.Table.AskReplay(ctx, r.conn, r.Run, ids)
		if err != nil {
			return err
		}
		r.After = asked.Last
		r.asked += int64(asked.Rows)
		r.open = append(r.open, asked)
		for len(r.open) > 1 {
			if err := r.follow(ctx); err != nil {
				return err
			}
		}
	}
}

// follow looks how far the relay is, and waits a moment if it has not moved.
func (r *replaying) follow(ctx context.Context) error {
	before := r.progress
	var err error
	if r.progress, err = r.Table.Progress(ctx, r.conn); err != nil {
		return err
	}
	if r.progress.MovedSince(before) {
		r.moved = time.Now()
	}
	passed := 0
	for i, asked := range r.open {
		done, err := r.progress.Passed(r.Run, asked)
		if err != nil {
			return err
		}
		if done { // and so are those before it
			passed = i + 1
		}
	}
	for _, asked := range r.open[:passed] {
		r.done += int64(asked.Rows)
	}
	r.open = slices.Delete(r.open, 0, passed)
	r.tell()
	if passed > 0 {
		return nil
	}
	return wait.For(ctx, replayPoll)
}

// tell shows the progress: on a terminal by a bar, elsewhere in a line every few
// seconds.
func (r *replaying) tell() {
	if r.bar != nil {
		r.bar.Set(int(r.published()))
		r.bar.Note(r.waiting())
		return
	}
	if time.Since(r.told) >= replayTell {
		r.told = time.Now()
		fmt.Fprintln(r.Err, r.line())
	}
}

// line says how far the replay is, how fast, and how long it will take; or what
// it waits for.
func (r *replaying) line() string {
	done := r.published()
	line := fmt.Sprintf("%s of %s", grouped(done), rows(r.total))
	if why := r.waiting(); why != "" {
		return line + "; " + why
	}
	if elapsed := time.Since(r.began); done > 0 && elapsed > time.Second {
		rate := float64(done) / elapsed.Seconds()
		line += fmt.Sprintf(", %s/s", grouped(int64(rate)))
		if left := r.total - done; left > 0 {
			line += ", " + span(time.Duration(float64(left)/rate*float64(time.Second))) + " left"
		}
	}
	return line
}

// published is how many rows the relay is done with, as far as was seen.
func (r *replaying) published() int64 {
	if b := r.progress.Batch; b != nil && b.Run == r.Run && b.Done < b.Rows {
		return r.done + int64(b.Done)
	}
	return r.done
}

// waiting says why the relay gets nowhere; empty: it does.
func (r *replaying) waiting() string {
	p := r.progress
	stalled := time.Since(r.moved)
	switch {
	case p.Slot == nil:
		return "waiting: slot " + r.Table.Slot + " does not exist: start the relay"
	case !p.Slot.Active:
		return "waiting: no relay reads from slot " + r.Table.Slot + ": start it"
	case p.Checkpoint != nil && p.Checkpoint.Phase == "backfilling":
		return "waiting: the relay publishes the rows from before its slot first"
	case stalled > replayStall:
		return "waiting: the relay has got nowhere for " + span(stalled) + ": see its log"
	}
	return ""
}

// interrupted adds how to go on.
func (r *replaying) interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = errors.New("stopped")
	}
	if r.asked == 0 {
		return err
	}
	if r.asked >= r.total {
		return fmt.Errorf("%w: all %s were asked for, and the relay was seen to be done with %s of them; it publishes the others when it gets to them", err, rows(r.asked), grouped(r.done))
	}
	return fmt.Errorf("%w: %s of %s were asked for; the relay publishes those when it gets to them. To go on:\n  %s",
		err, grouped(r.asked), rows(r.total), r.command())
}

// command is what goes on with the run.
func (r *replaying) command() string {
	args := []string{"outbox-relay", "replay", "--run", r.Run}
	add := func(flag, value string) {
		if value != "" {
			args = append(args, flag, quoteShell(value))
		}
	}
	if !r.From.IsZero() {
		add("--from", r.From.UTC().Format(time.RFC3339Nano))
	}
	add("--to", r.To.UTC().Format(time.RFC3339Nano))
	add("--aggregate-type", r.AggregateType)
	add("--event-type", r.EventType)
	for _, id := range r.IDs {
		add("--id", id)
	}
	add("--after", r.After)
	return strings.Join(args, " ")
}

var plainWord = regexp.MustCompile(`^[A-Za-z0-9._:/+-]+$`)

func quoteShell(word string) string {
	if plainWord.MatchString(word) {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}
