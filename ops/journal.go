package ops

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"
)

const (
	journalEntries = 30
	journalText    = 600 // bytes of an entry
)

// Journal is a slog.Handler that keeps the last warnings and errors for the
// status page, and hands everything on. It shows what the log shows, and so no
// secret. Safe for concurrent use.
type Journal struct {
	next  slog.Handler
	attrs string // of With, written out
	group string // prefix of what comes
	kept  *kept
}

// kept is what all handlers that come of one Journal share.
type kept struct {
	mu      sync.Mutex
	entries []entry
	number  int64
}

// entry is one record of the log.
type entry struct {
	Number int64     `json:"number"` // counts up
	At     time.Time `json:"at"`
	Level  string    `json:"level"`
	Text   string    `json:"text"`
}

// NewJournal returns a journal that hands on to next.
func NewJournal(next slog.Handler) *Journal { return &Journal{next: next, kept: &kept{}} }

// Enabled implements slog.Handler: warnings are kept whatever the log's level.
func (j *Journal) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn || j.next.Enabled(ctx, level)
}

// Handle implements slog.Handler.
func (j *Journal) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		j.keep(r)
	}
	if !j.next.Enabled(ctx, r.Level) {
		return nil
	}
	return j.next.Handle(ctx, r)
}

func (j *Journal) keep(r slog.Record) {
	var text strings.Builder
	text.WriteString(r.Message + j.attrs)
	r.Attrs(func(a slog.Attr) bool {
		text.WriteString(written(j.group, a))
		return true
	})
	j.kept.mu.Lock()
	defer j.kept.mu.Unlock()
	j.kept.number++
	e := entry{Number: j.kept.number, At: r.Time.UTC(), Level: strings.ToLower(r.Level.String()), Text: short(text.String())}
	if len(j.kept.entries) == journalEntries {
		j.kept.entries = append(j.kept.entries[:0], j.kept.entries[1:]...)
	}
	j.kept.entries = append(j.kept.entries, e)
}

// written is an attribute as the page shows it.
func written(group string, a slog.Attr) string {
	value := a.Value.Resolve()
	if value.Kind() != slog.KindGroup {
		return "\n" + group + a.Key + ": " + value.String()
	}
	var text strings.Builder
	for _, inner := range value.Group() {
		text.WriteString(written(group+a.Key+".", inner))
	}
	return text.String()
}

func short(text string) string {
	text = strings.ToValidUTF8(text, "\ufffd")
	if len(text) <= journalText {
		return text
	}
	return strings.ToValidUTF8(text[:journalText], "") + "…"
}

// WithAttrs implements slog.Handler.
func (j *Journal) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *j
	with.next = j.next.WithAttrs(attrs)
	for _, a := range attrs {
		with.attrs += written(j.group, a)
	}
	return &with
}

// WithGroup implements slog.Handler.
func (j *Journal) WithGroup(name string) slog.Handler {
	with := *j
	with.next = j.next.WithGroup(name)
	if name != "" {
		with.group += name + "."
	}
	return &with
}

// after returns the entries with a higher number, oldest first.
func (j *Journal) after(number int64) []entry {
	later := []entry{}
	if j == nil {
		return later
	}
	j.kept.mu.Lock()
	defer j.kept.mu.Unlock()
	for _, e := range j.kept.entries {
		if e.Number > number {
			later = append(later, e)
		}
	}
	return later
}
