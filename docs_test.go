package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"
)

// Every link of a Markdown file that leads into the project leads to something:
// a file, and a heading or a named place in it.
func TestLinksInTheProject(t *testing.T) {
	pages := markdown(t)
	if len(pages) < 8 {
		t.Fatalf("the project has %d pages", len(pages))
	}
	links := 0
	for _, page := range pages {
		for _, link := range pageLinks(readFile(t, page)) {
			if strings.Contains(link, "://") || strings.HasPrefix(link, "mailto:") {
				continue
			}
			links++
			if fault := linkFault(t, page, link); fault != "" {
				t.Errorf("%s links to %s: %s", page, link, fault)
			}
		}
	}
	if links < 50 {
		t.Errorf("the project's pages have %d links", links)
	}
}

// The index of docs names every page of it.
func TestDocsIndex(t *testing.T) {
	index := readFile(t, filepath.Join("docs", "README.md"))
	pages, err := filepath.Glob(filepath.Join("docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range pages {
		if name := filepath.Base(page); name != "README.md" && !strings.Contains(index, "]("+name) {
			t.Errorf("docs/README.md does not name %s", name)
		}
	}
}

func markdown(t *testing.T) []string {
	t.Helper()
	var pages []string
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		name := entry.Name()
		switch {
		case err != nil:
			return err
		case entry.IsDir() && path != "." && (strings.HasPrefix(name, ".") || name == "node_modules" || name == "testdata"):
			return fs.SkipDir
		case filepath.Ext(name) == ".md":
			pages = append(pages, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return pages
}

var (
	fence     = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
	codeSpan  = regexp.MustCompile("`[^`\n]*`")
	inline    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading   = regexp.MustCompile(`(?m)^#{1,6} +(.*?) *#*$`)
	namedSpot = regexp.MustCompile(`<a (?:name|id)="([^"]+)">`)
	linkText  = regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`)
)

func pageLinks(page string) []string {
	var links []string
	for _, match := range inline.FindAllStringSubmatch(codeSpan.ReplaceAllString(fence.ReplaceAllString(page, ""), ""), -1) {
		links = append(links, match[1])
	}
	return links
}

// linkFault says what is wrong with a link of a page; empty: nothing.
func linkFault(t *testing.T, page, link string) string {
	path, anchor, _ := strings.Cut(link, "#")
	target := page
	if path != "" {
		target = filepath.Join(filepath.Dir(page), path)
	}
	if _, err := os.Stat(target); err != nil {
		return err.Error()
	}
	if anchor == "" || filepath.Ext(target) != ".md" {
		return ""
	}
	if !anchors(readFile(t, target))[anchor] {
		return fmt.Sprintf("%s has no #%s", target, anchor)
	}
	return ""
}

// anchors are the places of a page that a link can lead to, named as GitHub and
// GitLab do.
func anchors(page string) map[string]bool {
	places := map[string]bool{}
	for _, match := range namedSpot.FindAllStringSubmatch(page, -1) {
		places[match[1]] = true
	}
	for _, match := range heading.FindAllStringSubmatch(fence.ReplaceAllString(page, ""), -1) {
		name := anchor(match[1])
		for unique, n := name, 1; ; n++ {
			if !places[unique] {
				places[unique] = true
				break
			}
			unique = fmt.Sprintf("%s-%d", name, n)
		}
	}
	return places
}

func anchor(heading string) string {
	heading = linkText.ReplaceAllString(heading, "$1")
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
			return unicode.ToLower(r)
		}
		return -1
	}, heading)
}

func TestAnchor(t *testing.T) {
	for heading, want := range map[string]string{
		"Run it beside your Postgres":  "run-it-beside-your-postgres",
		"The promise, and its limits":  "the-promise-and-its-limits",
		"`outbox_relay` and [a](b.md)": "outbox_relay-and-a",
	} {
		if got := anchor(heading); got != want {
			t.Errorf("%q: %q, want %q", heading, got, want)
		}
	}
}

// What docs/consuming.md shows of the examples is theirs, word for word.
func TestConsumingShowsTheExamples(t *testing.T) {
	page := readFile(t, filepath.Join("docs", "consuming.md"))
	for language, file := range map[string]string{"js": "node/inbox.mjs", "sql": "orders/tables.sql"} {
		block := regexp.MustCompile("(?ms)^```" + language + "\n(.*?)^```$").FindStringSubmatch(page)
		if block == nil || !strings.Contains(readFile(t, filepath.Join("examples", file)), block[1]) {
			t.Errorf("docs/consuming.md shows what is not in examples/%s:\n%s", file, block)
		}
	}
}
