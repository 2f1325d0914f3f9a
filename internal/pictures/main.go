// Command pictures draws what a program writes to a terminal: docs/demo.svg.
//
//	go run ./internal/pictures FILE.svg PROGRAM ARG…
package main

import (
	"bytes"
	"fmt"
	"html"
	"io"
	"os"
	"os/exec"
	"strings"

	"github.com/creack/pty"
)

// A terminal of so many characters, and their size in the picture.
const (
	columns          = 112
	charWidth        = 8 // of a font of 13
	lineHeight, edge = 18, 24
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: pictures FILE.svg PROGRAM ARG…")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(file string, program []string) error {
	text, err := written(program)
	if err != nil {
		return err
	}
	return os.WriteFile(file, picture("$ "+strings.Join(program, " ")+"\n"+text), 0o644)
}

// written runs the program at a terminal and returns what it wrote.
func written(program []string) (string, error) {
	cmd := exec.Command(program[0], program[1:]...)
	terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 60, Cols: columns})
	if err != nil {
		return "", err
	}
	defer terminal.Close()
	var text bytes.Buffer
	_, _ = io.Copy(io.MultiWriter(&text, os.Stdout), terminal) // EIO when nobody has the terminal any more
	if err := cmd.Wait(); err != nil {
		return "", fmt.Errorf("%s: %w", program[0], err)
	}
	return strings.ReplaceAll(text.String(), "\r\n", "\n"), nil
}

// picture draws the text, dark whatever the reader prefers, as terminals are.
func picture(text string) []byte {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	width, height := columns*charWidth+2*edge, len(lines)*lineHeight+2*edge
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" role="img" aria-label="Output of go run ./demo">
<style>text{font:13px ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#dcdad0;white-space:pre}.b{font-weight:700;fill:#4fd0b2}.d{fill:#a3a095}.r{fill:#ff8a85}</style>
<rect width="100%%" height="100%%" rx="8" fill="#12140f"/>
`, width, height)
	for i, line := range lines {
		fmt.Fprintf(&b, "<text x=\"%d\" y=\"%d\" xml:space=\"preserve\">%s</text>\n", edge, edge+(i+1)*lineHeight-4, spans(line))
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// spans turns the sequences for bold, dim, red and normal into spans.
func spans(line string) string {
	classes := map[string]string{"1": "b", "2": "d", "31": "r", "0": ""}
	var b strings.Builder
	for i, part := range strings.Split(line, "\x1b[") {
		class, text := "", part
		if i > 0 {
			code, rest, _ := strings.Cut(part, "m")
			class, text = classes[code], rest
		}
		if text == "" {
			continue
		}
		fmt.Fprintf(&b, `<tspan class="%s">%s</tspan>`, class, html.EscapeString(text))
	}
	return b.String()
}
