package relay

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"outbox-relay/checkpoint"
	"outbox-relay/outbox"
)

// The rows belong to the application, and so do its constraints, triggers and foreign keys.
// One of them can refuse what the relay writes to a row, for as long as it likes. Such an
// outcome is kept in the leftovers and tried again by itself: the checkpoint goes on, and
// with it the rows beside it.

// refuses reports whether the error is Postgres's refusal to change rows: it then holds
// for some rows, or for as long as a trigger is there, and for no other statement of the
// relay. Where names the function that raised it.
// Source: https://www.postgresql.org/docs/current/errcodes-appendix.html
func refuses(err error) bool {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || passesInPostgres(pgErr.Code) {
		return false
	}
	if pgErr.Where != "" {
		return true
	}
	for _, class := range []string{
		"0A",    // feature not supported: a rule
		"22",    // data exception: a generated column, a counter that overflows
		"23",    // integrity constraint violation
		"27",    // triggered data change violation
		"44",    // with check option violation
		"54",    // program limit exceeded: the row of an index
		"55000", // not in prerequisite state: another publication wants a replica identity
		"42P10", // or does not publish it
		"P0",    // raised by PL/pgSQL
	} {
		if strings.HasPrefix(pgErr.Code, class) {
			return true
		}
	}
	return false
}

// because is what Postgres says of an error in one line: what, of which object, and in
// which function.
func because(err error) string {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return err.Error()
	}
	text := fmt.Sprintf("%s (SQLSTATE %s)", pgErr.Message, pgErr.Code)
	if pgErr.Detail != "" {
		text += ": " + pgErr.Detail
	}
	if pgErr.Where != "" {
		text += ", in " + raisedIn(pgErr)
	}
	return text
}

// raisedIn is the innermost function or statement that raised an error which has one.
func raisedIn(pgErr *pgconn.PgError) string {
	where, _, _ := strings.Cut(pgErr.Where, "\n")
	return where
}

// unchanged is why an outcome waits whose writing no error has refused.
const unchanged = "the row is the same after it was written: a trigger or a policy of the table swallows the write, or takes it back"

// leastBatch is how many events have their outcomes kept at once, where Postgres refuses
// to change one of their rows.
const leastBatch = 8

// maxHolding is how long rows are left alone where Postgres has refused one after the other.
const maxHolding = 30 * time.Second

// refusals says how many outcomes the next statement is to write. After a refusal it
// writes fewer, until the row that is refused has only a few others beside it. The zero
// value is that of a table that has refused nothing.
type refusals struct {
	limit  int       // of the next statement; 0: recordLimit
	inARow int       // least batches that were refused one after the other
	until  time.Time // rows are left alone: all outcomes are kept
}

// next returns how many outcomes the next statement takes, and whether it keeps them all.
func (f *refusals) next(now time.Time) (limit int, keep bool) {
	if now.Before(f.until) || f.limit == 0 {
		return recordLimit, now.Before(f.until)
	}
	return f.limit, false
}

// refused notes the refusal of so many outcomes, and reports whether they are to be kept;
// otherwise fewer are to be tried.
func (f *refusals) refused(n int, now time.Time) (keep bool) {
	if n > leastBatch {
		f.limit = max(n/8, leastBatch)
		return false
	}
	f.limit = leastBatch
	if f.inARow++; f.inARow > 2 {
		f.until = now.Add(min(time.Second<<min(f.inARow-3, 8), maxHolding))
	}
	return true
}

// written notes that as many outcomes as were to be written were.
func (f *refusals) written() {
	f.inARow = 0
	if f.limit *= 2; f.limit >= recordLimit {
		f.limit = 0
	}
}

// keeping carries out the outcomes of these events by apply, or, where Postgres refuses to
// change their rows, keeps them in the leftovers.
func (s *session) keeping(items []checkpoint.Item, apply func(checkpoint.Effects) error) error {
	effects, err := s.table.Outcomes(items, &outbox.Recorded{})
	if err != nil {
		return err
	}
	if err = apply(effects); !refuses(err) {
		return err
	}
	s.tellRefusal(err)
	return s.hold(items, apply)
}

// hold keeps the outcomes of these events in the leftovers, by apply.
func (s *session) hold(items []checkpoint.Item, apply func(checkpoint.Effects) error) error {
	effects, err := s.table.Held(items)
	if err != nil {
		return err
	}
	return apply(effects)
}

func (s *session) tellRefusal(err error) {
	s.relay.causes.unwritten.Again("Postgres refuses to write outcomes to rows: they are kept in outbox_relay_leftovers, and tried again", "error", because(err))
	s.relay.causes.unwritten.Lapse("Postgres refuses no more outcomes")
}
