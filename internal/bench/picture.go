package main

import (
	"encoding/xml"
	"fmt"
	"os"
	"strings"
)

// Measures of the picture, in pixels.
const (
	left   = 130 // where bars begin
	right  = 610 // where the largest ends
	row    = 30
	bar    = 14
	top    = 70
	bottom = 30
)

// draw writes the picture, if a file is named.
func (r Report) draw(path string) error {
	if path == "" {
		return nil
	}
	return os.WriteFile(path, []byte(r.picture()), 0o644)
}

// picture shows, for each workload, the relay's rate as a bar with its spread, the
// best reader and publishing without Postgres as marks; pg_recvlogical is 1.
func (r Report) picture() string {
	var rows []Throughput
	largest := 1.0
	for _, t := range r.Throughput {
		if len(t.Rounds) > 0 {
			rows = append(rows, t)
			largest = max(largest, t.ratio().greatest, t.best().median, t.raw().median)
		}
	}
	x := func(ratio float64) float64 { return left + ratio/largest*(right-left) }
	height := top + row*len(rows) + bottom
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="12" fill="#333">`+"\n", right+60, height)
	b.WriteString(`<rect width="100%" height="100%" fill="#fff"/>` + "\n")
	text(&b, 10, 20, "Events a second, as ratios: pg_recvlogical, which writes the same backlog to a file, is 1")
	legend(&b)
	fmt.Fprintf(&b, `<path d="M%.1f %d V%d" stroke="#999" stroke-dasharray="4 3"/>`+"\n", x(1), top-8, height-bottom+4)
	text(&b, x(1)-3, height-10, "1")
	for i, t := range rows {
		t.drawRow(&b, top+row*i, x)
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func legend(b *strings.Builder) {
	fmt.Fprintf(b, `<rect x="%d" y="36" width="24" height="%d" fill="#3b7dd8"/>`+"\n", left, bar)
	text(b, left+30, 47, "relay (median; least to greatest)")
	mark(b, left+250, 36, "#d9822b")
	text(b, left+258, 47, "reader that discards")
	mark(b, left+400, 36, "#3a9d5d")
	text(b, left+408, 47, "without Postgres")
}

func (t Throughput) drawRow(b *strings.Builder, y int, x func(float64) float64) {
	ratio := t.ratio()
	text(b, 10, y+11, t.Workload.Name)
	fmt.Fprintf(b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="#3b7dd8"/>`+"\n", left, y, x(ratio.median)-left, bar)
	fmt.Fprintf(b, `<path d="M%.1f %d H%.1f" stroke="#123" stroke-width="2"/>`+"\n", x(ratio.least), y+bar/2, x(ratio.greatest))
	mark(b, x(t.best().median), y, "#d9822b")
	mark(b, x(t.raw().median), y, "#3a9d5d")
	text(b, right+16, y+11, fmt.Sprintf("%.2f", ratio.median))
}

func mark(b *strings.Builder, x float64, y int, colour string) {
	fmt.Fprintf(b, `<path d="M%.1f %d v%d" stroke="%s" stroke-width="3"/>`+"\n", x, y-2, bar+4, colour)
}

func text(b *strings.Builder, x float64, y int, s string) {
	fmt.Fprintf(b, `<text x="%.1f" y="%d">`, x, y)
	_ = xml.EscapeText(b, []byte(s)) // a Builder takes everything
	b.WriteString("</text>\n")
}
