// Package repeat logs what lasts or comes back: the first time at once, then
// once a minute with how often it came and for how long, then its end. A cause
// that comes back soon after its end is told as lasting until it has stayed away
// for a minute, so that the end of the log never looks well while it comes and goes.
package repeat

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
)

const (
	// Every is the time between two lines of a cause that lasts, and how long one
	// that came back has to stay away before its end is told.
	Every = time.Minute
	// textsAtOnce is how many different texts of a cause are logged without a pause.
	// Texts can hold what changes each time, such as an LSN.
	textsAtOnce = 5
)

// Cause is one thing that can go wrong again and again, such as the session with
// Postgres. The arguments of its methods are those of a slog.Logger's. Safe for
// concurrent use.
type Cause struct {
	log   *slog.Logger
	texts int // how many different ones are logged without a pause

	mu    sync.Mutex
	state state
	end   *time.Timer // logs the end that state holds back; nil: none is
}

// New returns a cause that has not occurred.
func New(log *slog.Logger) *Cause { return &Cause{log: log, texts: textsAtOnce} }

// First returns a cause of which the first text is the truth, and others that
// follow are echoes.
func First(log *slog.Logger) *Cause { return &Cause{log: log, texts: 1} }

// Again says that the cause has occurred, as a warning.
func (c *Cause) Again(message string, attrs ...any) { c.occur(slog.LevelWarn, message, attrs) }

// Fault is Again for an error.
func (c *Cause) Fault(message string, attrs ...any) { c.occur(slog.LevelError, message, attrs) }

// Mention is Again for what is no warning.
func (c *Cause) Mention(message string, attrs ...any) { c.occur(slog.LevelInfo, message, attrs) }

func (c *Cause) occur(level slog.Level, message string, attrs []any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stop()
	now := time.Now()
	if !c.state.again(now, text(message, attrs), c.texts) {
		return
	}
	if c.state.count > 1 {
		attrs = append(attrs[:len(attrs):len(attrs)], "count", c.state.count, "duration", rounded(now.Sub(c.state.began)))
	}
	c.log.Log(context.Background(), level, message, attrs...)
}

// Over says that the cause has ended. It does nothing where there is none.
func (c *Cause) Over(message string, attrs ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch tell, hold := c.state.end(time.Now()); {
	case tell:
		c.tellEnd(message, attrs)
	case hold:
		c.hold(message, attrs)
	}
}

// Lapse says that the cause has ended unless it occurs again within Every, for
// causes whose end nobody sees. To be called after Again.
func (c *Cause) Lapse(message string, attrs ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if tell, hold := c.state.end(time.Now()); tell || hold {
		c.state.returning = true
		c.hold(message, attrs)
	}
}

// Returning reports whether the cause has come back within Every of its end, and
// has not stayed away for so long since: what looks well now is not to be trusted.
func (c *Cause) Returning() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state.returning
}

// Forget ends the cause without a word.
func (c *Cause) Forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stop()
	c.state = state{}
}

// hold logs the end after Every, unless the cause occurs before. c.mu is held.
func (c *Cause) hold(message string, attrs []any) {
	c.stop()
	var timer *time.Timer
	timer = time.AfterFunc(Every, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.end == timer {
			c.tellEnd(message, attrs)
			c.state, c.end = state{}, nil
		}
	})
	c.end = timer
}

// tellEnd is called with c.mu held.
func (c *Cause) tellEnd(message string, attrs []any) {
	attrs = append(attrs[:len(attrs):len(attrs)], "count", c.state.count, "duration", rounded(c.state.ended.Sub(c.state.began)))
	c.log.Info(message, attrs...)
}

// stop keeps the end from being logged that is held back. c.mu is held.
func (c *Cause) stop() {
	if c.end != nil {
		c.end.Stop()
		c.end = nil
	}
}

// text is what tells one occurrence from another.
func text(message string, attrs []any) string {
	return strings.TrimSuffix(message+": "+fmt.Sprintln(attrs...), "\n")
}

func rounded(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

// state is what is known of a cause.
type state struct {
	count     int
	began     time.Time       // its first occurrence; zero: there was none
	ended     time.Time       // when it seemed to be over; zero: it lasts
	told      time.Time       // when its last line was logged
	texts     map[string]bool // that were logged
	returning bool            // it has come back after its end: the next one is held back
}

// again takes an occurrence, and reports whether it is to be logged; atOnce is how
// many different texts are without a pause.
func (s *state) again(now time.Time, text string, atOnce int) bool {
	lasted := s.ended.IsZero() || s.returning // as far as the log says
	if !s.ended.IsZero() && now.Sub(s.ended) >= Every {
		*s = state{}
	}
	first := s.began.IsZero()
	if first {
		*s = state{began: now, texts: map[string]bool{}}
	}
	returned := !first && !lasted
	s.returning = s.returning || returned
	s.count++
	s.ended = time.Time{}
	news := len(s.texts) < atOnce && !s.texts[text]
	if !first && !returned && !news && now.Sub(s.told) < Every {
		return false
	}
	if news {
		s.texts[text] = true
	}
	s.told = now
	return true
}

// end takes the cause's end, and says whether that is to be logged now, or held
// back; neither where it has ended already, or never was.
func (s *state) end(now time.Time) (tell, hold bool) {
	if s.began.IsZero() || !s.ended.IsZero() {
		return false, false
	}
	s.ended = now
	return !s.returning, s.returning
}

// Quiet returns a handler that leaves out what is no warning while the cause is
// returning: each new attempt would tell anew how well it begins.
func Quiet(next slog.Handler, c *Cause) slog.Handler { return quiet{next, c} }

type quiet struct {
	next  slog.Handler
	cause *Cause
}

func (q quiet) Enabled(ctx context.Context, level slog.Level) bool {
	return q.next.Enabled(ctx, level) && (level >= slog.LevelWarn || !q.cause.Returning())
}

func (q quiet) Handle(ctx context.Context, r slog.Record) error { return q.next.Handle(ctx, r) }

func (q quiet) WithAttrs(attrs []slog.Attr) slog.Handler {
	return quiet{q.next.WithAttrs(attrs), q.cause}
}

func (q quiet) WithGroup(name string) slog.Handler { return quiet{q.next.WithGroup(name), q.cause} }
