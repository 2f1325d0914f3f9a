package progress

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/creack/pty"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// terminal is a real pseudo-terminal of 80 columns; shown ends it, and returns all
// that was written.
func terminal(t *testing.T) (tty *os.File, shown func() string) {
	t.Helper()
	master, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	if err := pty.Setsize(tty, &pty.Winsize{Rows: 24, Cols: 80}); err != nil {
		t.Fatal(err)
	}
	text := make(chan string, 1)
	go func() {
		all, _ := io.ReadAll(master) // EIO when the other end is closed
		text <- string(all)
	}()
	t.Cleanup(func() { tty.Close(); master.Close() })
	return tty, func() string { tty.Close(); return <-text }
}

func TestBarOnATerminal(t *testing.T) {
	tty, shown := terminal(t)
	term := Open(tty)
	if term == nil {
		t.Fatal("a terminal is taken for none")
	}
	bar := term.Bar("replaying", 1000)
	bar.Set(250)
	fmt.Fprintln(term, "a line of the log")
	bar.Note("waiting for the relay")
	bar.End()
	bar.End()
	fmt.Fprintln(term, "done")
	text := shown()
	for _, want := range []string{"replaying   0%", "(250/1000", "25%", "replaying: waiting for the relay", "█"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in %q", want, text)
		}
	}
	for line := range strings.Lines(text) {
		if visible := screen(line); len([]rune(visible)) > 80 {
			t.Errorf("a line of %d characters: %q", len([]rune(visible)), visible)
		}
	}
	if got, want := screen(text), "a line of the log\ndone\n"; got != want {
		t.Errorf("what stays is %q, want %q", got, want)
	}
}

// A log line that comes while there is a bar stands alone in its line, and the bar
// is drawn again behind it.
func TestLogIsNotTorn(t *testing.T) {
	tty, shown := terminal(t)
	term := Open(tty)
	bar := term.Bar("publishing", 3)
	for i := range 3 {
		fmt.Fprintf(term, "line %d\n", i)
		bar.Set(i)
	}
	text := shown()
	if got := screen(text); !strings.HasPrefix(got, "line 0\nline 1\nline 2\npublishing") {
		t.Errorf("the screen shows %q", got)
	}
}

func TestNoTerminal(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0) // a character device, and no terminal
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, out := range []io.Writer{&bytes.Buffer{}, null} {
		if Open(out) != nil || IsTerminal(out) {
			t.Errorf("%T is taken for a terminal", out)
		}
	}
}

var clearing = regexp.MustCompile(`\x1b\[2K|\x1b\[K`)

// screen is what is left to be seen of what was written: a carriage return goes
// back to the line's begin, and the sequence that clears a line does.
func screen(text string) string {
	var lines []string
	for _, line := range strings.Split(strings.ReplaceAll(text, "\r\n", "\n"), "\n") {
		var seen []rune
		for _, part := range strings.Split(line, "\r") {
			if at := clearing.FindAllStringIndex(part, -1); at != nil {
				seen, part = nil, part[at[len(at)-1][1]:]
			}
			written := []rune(part)
			if len(written) < len(seen) {
				written = append(written, seen[len(written):]...)
			}
			seen = written
		}
		lines = append(lines, string(seen))
	}
	return strings.Join(lines, "\n")
}
