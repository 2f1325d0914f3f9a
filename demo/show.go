package main

import (
	"fmt"
	"io"
	"os"
	"time"
)

// printer writes what the demo shows, in colour on a terminal only.
type printer struct {
	out                    io.Writer
	bold, dim, red, normal string
}

func newPrinter(f *os.File) *printer {
	p := &printer{out: f}
	info, err := f.Stat()
	if err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == "" {
		p.bold, p.dim, p.red, p.normal = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[0m"
	}
	return p
}

func (p *printer) title(text string) { fmt.Fprintf(p.out, "\n%s%s%s\n\n", p.bold, text, p.normal) }

func (p *printer) line(who, format string, args ...any) {
	fmt.Fprintf(p.out, "  %-14s%s\n", who, fmt.Sprintf(format, args...))
}

func (p *printer) step(who, format string, args ...any) { p.line(who, format, args...) }

// detail is what follows from a step.
func (p *printer) detail(who, format string, args ...any) {
	fmt.Fprintf(p.out, "    %s%-14s%s%s\n", p.dim, who, fmt.Sprintf(format, args...), p.normal)
}

func (p *printer) bad(format string, args ...any) {
	fmt.Fprintf(p.out, "\n%s%s%s\n", p.red, fmt.Sprintf(format, args...), p.normal)
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
