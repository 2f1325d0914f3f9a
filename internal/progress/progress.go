// Package progress shows at a terminal how far something long has come.
package progress

import (
	"io"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// IsTerminal reports whether somebody sees, or types, what goes through stream.
func IsTerminal(stream any) bool {
	file, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}

// Terminal is a terminal that has at most one bar, in its last line. What is
// written to it meanwhile, such as a log, stands whole above the bar. Safe for
// concurrent use.
type Terminal struct {
	out io.Writer

	mu  sync.Mutex
	bar *progressbar.ProgressBar // nil: none
}

// Open returns the terminal that out is, or nil: nobody sees a bar there.
func Open(out io.Writer) *Terminal {
	if !IsTerminal(out) {
		return nil
	}
	return &Terminal{out: out}
}

// Write implements io.Writer.
func (t *Terminal) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.bar == nil {
		return t.out.Write(p)
	}
	_ = t.bar.Clear()
	n, err := t.out.Write(p)
	_ = t.bar.RenderBlank()
	return n, err
}

// Bar draws a bar, from 0 to total, in place of the one before. total is more
// than 0.
func (t *Terminal) Bar(what string, total int) *Bar {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.bar = progressbar.NewOptions(total, progressbar.OptionSetWriter(t.out), progressbar.OptionSetDescription(what),
		progressbar.OptionShowCount(), progressbar.OptionShowIts(), progressbar.OptionFullWidth(), progressbar.OptionUseANSICodes(true),
		progressbar.OptionThrottle(0), progressbar.OptionSetRenderBlankState(true))
	return &Bar{terminal: t, what: what, total: total}
}

// Bar is a bar. One goroutine at a time uses it.
type Bar struct {
	terminal    *Terminal
	what, shown string
	total       int
	drawn       time.Time
}

// pace is how often a bar is drawn at most.
const pace = 100 * time.Millisecond

// Set says how far it is.
func (b *Bar) Set(done int) {
	b.terminal.mu.Lock()
	defer b.terminal.mu.Unlock()
	if b.terminal.bar != nil && done < b.total && time.Since(b.drawn) >= pace { // the end is End's
		b.drawn = time.Now()
		_ = b.terminal.bar.Set(done)
	}
}

// Note says what it waits for; empty: it does not wait.
func (b *Bar) Note(text string) {
	if text != "" {
		text = ": " + text
	}
	b.terminal.mu.Lock()
	defer b.terminal.mu.Unlock()
	if b.terminal.bar != nil && text != b.shown {
		b.shown = text
		b.terminal.bar.Describe(b.what + text)
	}
}

// End removes the bar from the terminal.
func (b *Bar) End() {
	b.terminal.mu.Lock()
	defer b.terminal.mu.Unlock()
	if b.terminal.bar != nil {
		_ = b.terminal.bar.Exit()
		_ = b.terminal.bar.Clear()
		b.terminal.bar = nil
	}
}
