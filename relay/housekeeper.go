package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/prometheus/client_golang/prometheus"

	"outbox-relay/internal/repeat"
	"outbox-relay/internal/wait"
	"outbox-relay/outbox"
	"outbox-relay/outbox/event"
)

// Housekeeping is what the relay does to the table beside publishing. The zero
// value is nothing.
type Housekeeping struct {
	Retention time.Duration  // published rows that are older go; 0: they stay
	Retries   outbox.Retries // of rows that failed and could be sent by now; no attempts: none
}

const (
	// Rows that one statement of the retention looks at: a commit beside it can wait
	// as long as that takes (docs/costs.md).
	removeStep = 200
	retryStep  = 100 // failed rows that are looked at before any is retried
	// restShare is how much longer than its work the housekeeper rests after each
	// step, so that it never takes more than a fifth of a connection's time.
	restShare = 4
	// A pass begins again after a tenth of the time that it is about.
	minPause, maxPause = time.Second, time.Minute
	// unfitPause is how long a failed row that can't be sent yet is left alone:
	// to know that takes its whole payload. So many are remembered at most.
	unfitPause, maxUnfit = 10 * time.Minute, 10_000
	tellEvery            = 10 * time.Minute // between two lines that say what was removed
	refreshLimit         = 10 * time.Second // for the stream to tell its limits
	streamingPause       = time.Second      // between two looks whether the relay streams
)

// housekeepingMetrics are what the housekeeper counts.
type housekeepingMetrics struct {
	removed, dropped, retried prometheus.Counter
}

func newHousekeepingMetrics(counter func(name, help string) prometheus.Counter) housekeepingMetrics {
	return housekeepingMetrics{
		removed: counter("rows_removed_total", "Published rows that OUTBOX_RETENTION has removed."),
		dropped: counter("partitions_dropped_total", "Partitions that OUTBOX_RETENTION has dropped with all their rows."),
		retried: counter("automatic_retries_total", "Failed events that OUTBOX_RETRY_ATTEMPTS has put back to pending."),
	}
}

// limits tells what can be sent: sink.Chain does.
type limits interface {
	Refresh(context.Context) error // asks for the limits as they are now
	Fits(*event.Event) error       // nil: by the limits of the last answer it can be sent
}

// housekeeper keeps the table while the relay streams, on a connection of its
// own that it opens when there is something to do. It is never in the way of
// publishing and recording: what goes wrong is logged and tried again, and ends
// nothing.
type housekeeper struct {
	relay  *Relay
	config Housekeeping
	table  outbox.Table
	layout outbox.Layout
	limits limits
	record sync.Locker // locked: the recorder does nothing, and has no lock in Postgres
	log    *slog.Logger

	chores []*chore
	conn   *pgx.Conn // nil: none
	failed int       // attempts to connect, in a row

	byTime  *bool  // retention: whether partitions go, not rows; nil: not known yet
	after   string // id up to which this pass has looked
	step    int    // rows that the next step looks at; 0: removeStep
	removed int    // rows, since that was last told
	told    time.Time
	noticed bool // there was one since partitions were last dropped

	place outbox.Failure       // retries: up to which this pass has looked
	unfit map[string]time.Time // ids of failed rows that could not be sent, and when that was seen
}

// chore is something to be done again and again.
type chore struct {
	name   string
	do     func(context.Context) (rest time.Duration, err error)
	due    time.Time
	failed int // times in a row
	cause  *repeat.Cause
}

// newHousekeeper returns the housekeeper of a session; nothing runs before run.
func newHousekeeper(s *session, limits limits, record sync.Locker) *housekeeper {
	h := &housekeeper{relay: s.relay, config: s.relay.config.Housekeeping, table: s.table, layout: s.layout, limits: limits,
		record: record, log: s.log, unfit: map[string]time.Time{}}
	if h.config.Retention > 0 {
		h.chores = append(h.chores, &chore{name: "retention", do: h.retain, cause: s.relay.causes.retention})
	}
	if h.config.Retries.Attempts > 0 {
		h.chores = append(h.chores, &chore{name: "retries", do: h.retry, cause: s.relay.causes.retries})
	}
	return h
}

// run does what is due until ctx ends, or returns nil at once where nothing is
// switched on.
func (h *housekeeper) run(ctx context.Context) error {
	defer h.close()
	for len(h.chores) > 0 {
		next := slices.MinFunc(h.chores, func(a, b *chore) int { return a.due.Compare(b.due) })
		if err := wait.For(ctx, time.Until(next.due)); err != nil {
			return err
		}
		rest := h.attempt(ctx, next)
		next.due = time.Now().Add(rest)
	}
	return nil
}

func (h *housekeeper) close() {
	h.tell()
	h.disconnect()
}

// attempt does a chore once, and returns how long to rest before the next time.
func (h *housekeeper) attempt(ctx context.Context, c *chore) time.Duration {
	if h.relay.State() != Streaming {
		return streamingPause
	}
	if err := h.connect(ctx); err != nil {
		return h.fail(ctx, &h.failed, h.relay.causes.housework, c, err)
	}
	h.succeed(&h.failed, h.relay.causes.housework, c)
	h.relay.housework.begin(c.name)
	rest, err := c.do(ctx)
	h.relay.housework.end()
	if err != nil {
		return h.fail(ctx, &c.failed, c.cause, c, err)
	}
	h.succeed(&c.failed, c.cause, c)
	return rest
}

func (h *housekeeper) succeed(failed *int, cause *repeat.Cause, c *chore) {
	*failed = 0
	cause.Over("housekeeping goes on", "chore", c.name)
}

// fail says what went wrong, and returns how long to wait.
func (h *housekeeper) fail(ctx context.Context, failed *int, cause *repeat.Cause, c *chore, err error) time.Duration {
	if h.conn != nil && h.conn.IsClosed() {
		h.disconnect()
	}
	if ctx.Err() == nil {
		cause.Again("housekeeping waits: publishing goes on", "chore", c.name, "error", withGrants(err))
	}
	*failed++
	return min(time.Minute, time.Second<<min(*failed-1, 6))
}

// connect opens the connection unless it stands. Statements that have to wait
// for a lock give up soon: whoever came later would wait behind them.
func (h *housekeeper) connect(ctx context.Context) error {
	if h.conn != nil {
		return nil
	}
	config, err := h.relay.sqlConfig("outbox-relay housekeeper", outbox.LookupSettings())
	if err != nil {
		return err
	}
	config.RuntimeParams["lock_timeout"] = "1s"
	config.OnNotice = func(_ *pgconn.PgConn, notice *pgconn.Notice) {
		h.noticed = true
		h.relay.causes.partitions.Mention("Postgres has a word about housekeeping", "notice", notice.Message)
		h.relay.causes.partitions.Lapse("Postgres has no more to say about housekeeping")
	}
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return ExplainConnect(err)
	}
	h.conn = conn
	return nil
}

func (h *housekeeper) disconnect() {
	closeSQL(h.conn)
	h.conn = nil
}

// retain takes away what is old: partitions where time makes them, else rows.
func (h *housekeeper) retain(ctx context.Context) (time.Duration, error) {
	if h.byTime == nil {
		byTime, err := h.table.TimePartitioned(ctx, h.conn)
		if err != nil {
			return 0, err
		}
		h.byTime = &byTime
	}
	if *h.byTime {
		return h.drop(ctx)
	}
	return h.remove(ctx)
}

// drop drops old partitions. The function that does so locks a partition, reads it,
// and then locks the table. Meanwhile the recorder locks the table and waits for the
// partition, always so where events come steadily: the table is in use, for ever.
// The function notices only what could go otherwise; then the recorder is held back
// the next time, and has no lock at all.
func (h *housekeeper) drop(ctx context.Context) (time.Duration, error) {
	if h.noticed {
		h.record.Lock()
		defer h.record.Unlock()
	}
	h.noticed = false
	dropped, err := h.table.DropPartitions(ctx, h.conn, h.config.Retention)
	if err != nil {
		return 0, err
	}
	h.relay.metrics.housekeeping.dropped.Add(float64(len(dropped)))
	if len(dropped) > 0 {
		h.log.Info("dropped partitions of published rows", "partitions", dropped, "older_than", h.config.Retention)
	}
	return between(h.config.Retention), nil
}

// remove takes a pass through the table one step further. Each begins at the
// first id: rows are published, or retried, at any time after they were made.
func (h *housekeeper) remove(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	limit := cmp.Or(h.step, removeStep)
	step, err := h.table.RemovePublished(ctx, h.conn, h.after, h.config.Retention, limit)
	switch {
	case refuses(err) && limit > 1: // some row of these
		h.step = max(1, limit/8)
		return restShare * time.Since(began), nil
	case refuses(err):
		return restShare * time.Since(began), h.passOver(ctx, err)
	case err != nil:
		return 0, err
	}
	if step.Unchanged > 0 {
		h.tellUnremoved(step.Last, errors.New(unchanged))
	}
	if h.step = 2 * limit; h.step >= removeStep {
		h.step = 0
	}
	h.after = step.Last
	h.removed += step.Removed
	h.relay.metrics.housekeeping.removed.Add(float64(step.Removed))
	if !step.End {
		return restShare * time.Since(began), nil
	}
	h.after = ""
	if time.Since(h.told) >= tellEvery {
		h.tell()
	}
	return between(h.config.Retention), nil
}

// passOver leaves alone, in this pass, the next row, which Postgres refuses to remove.
func (h *housekeeper) passOver(ctx context.Context, refusal error) error {
	id, err := h.table.NextID(ctx, h.conn, h.after)
	if err != nil {
		return err
	}
	h.after = id
	h.tellUnremoved(id, refusal)
	return nil
}

// tellUnremoved reports that rows stay which were to be removed, up to that id.
func (h *housekeeper) tellUnremoved(id string, refusal error) {
	h.relay.causes.unremoved.Again("Postgres refuses to remove published rows: they stay", "id", id, "error", because(refusal))
	h.relay.causes.unremoved.Lapse("no more published rows are kept from being removed")
}

// between is the pause between two passes that look for what is so old.
func between(age time.Duration) time.Duration { return min(max(age/10, minPause), maxPause) }

func (h *housekeeper) tell() {
	if h.removed == 0 {
		return
	}
	h.log.Info("removed published rows", "rows", h.removed, "older_than", h.config.Retention)
	h.removed, h.told = 0, time.Now()
}

// retry looks at some of the failures that are due, and asks for those again that
// can be sent by now.
func (h *housekeeper) retry(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	due, err := h.config.Retries.Due(ctx, h.conn, h.table, h.place, slices.Collect(maps.Keys(h.unfit)), retryStep)
	if err != nil {
		return 0, err
	}
	ids, err := h.fitting(ctx, due)
	if err != nil {
		return 0, err
	}
	if err := h.ask(ctx, ids); err != nil {
		return 0, err
	}
	if len(due) == retryStep {
		h.place = due[len(due)-1]
		return restShare * time.Since(began), nil
	}
	h.place = outbox.Failure{}
	maps.DeleteFunc(h.unfit, func(_ string, seen time.Time) bool { return time.Since(seen) > unfitPause })
	return between(h.config.Retries.Backoff), nil
}

// fitting returns the ids of those failures that could be sent. It reads one row
// at a time: what failed may be large.
func (h *housekeeper) fitting(ctx context.Context, due []outbox.Failure) ([]string, error) {
	if len(due) == 0 {
		return nil, nil
	}
	asking, cancel := context.WithTimeout(ctx, refreshLimit)
	defer cancel()
	if err := h.limits.Refresh(asking); err != nil {
		return nil, fmt.Errorf("ask for the limits of what can be sent: %w", err)
	}
	var ids []string
	for _, failure := range due {
		rows, err := h.table.Rows(ctx, h.conn, h.layout, []string{failure.ID})
		if err != nil {
			return nil, err
		}
		switch row := rows[failure.ID]; {
		case row == nil: // gone
		case row.Unprintable == "" && h.limits.Fits(&row.Event) == nil:
			ids = append(ids, failure.ID)
		case len(h.unfit) < maxUnfit:
			h.unfit[failure.ID] = time.Now()
		}
	}
	return ids, nil
}

// leaveAlone keeps failed rows for a while from being retried, which Postgres refuses.
func (h *housekeeper) leaveAlone(ids []string, refusal error) {
	for _, id := range ids {
		if len(h.unfit) < maxUnfit {
			h.unfit[id] = time.Now()
		}
	}
	h.relay.causes.unretried.Again("Postgres refuses to retry failed rows: they are left alone for a while", "ids", ids, "error", because(refusal))
	h.relay.causes.unretried.Lapse("no more failed rows are kept from being retried")
}

// ask puts the rows back to pending, for the relay to publish them in the order
// of commits.
func (h *housekeeper) ask(ctx context.Context, ids []string) error {
	if len(ids) == 0 {
		return nil
	}
	retried, err := h.table.Retry(ctx, h.conn, ids)
	switch {
	case refuses(err) && len(ids) > 1: // one of them
		for _, id := range ids {
			if err := h.ask(ctx, []string{id}); err != nil {
				return err
			}
		}
		return nil
	case err == nil && retried == 0:
		err = errors.New(unchanged)
		fallthrough
	case refuses(err):
		h.leaveAlone(ids, err)
		return nil
	case err != nil:
		return err
	}
	h.relay.metrics.housekeeping.retried.Add(float64(retried))
	h.log.Info("failed events can be sent by now: retrying them", "events", retried)
	return nil
}
