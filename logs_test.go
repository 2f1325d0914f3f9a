package main

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the messages into docs/logs.md")

// levels are the methods that log, by how bad what they tell is.
var levels = []string{"Error", "Warn", "Info", "Debug"}

// causes are the methods of a repeat.Cause, and the levels at which they log.
var causes = map[string]string{"Fault": "Error", "Again": "Warn", "Mention": "Info", "Over": "Info", "Lapse": "Info"}

// logLine is a call that logs.
type logLine struct {
	level, message string
	fields         []string
	where          string
}

func (l logLine) row() string {
	return fmt.Sprintf("| %s | %s | `%s` |", strings.ToLower(l.level), l.message, strings.Join(l.fields, "` `"))
}

// logLines are all calls of the relay that log, the worst first, then by message.
func logLines(t *testing.T) []logLine {
	t.Helper()
	var lines []logLine
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && slices.Contains([]string{"internal", "demo", "examples"}, path):
			return filepath.SkipDir // they are not the relay
		case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok {
				if line, ok := readLog(t, set, call); ok {
					lines = append(lines, line)
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(lines, func(a, b logLine) int {
		if a.level != b.level {
			return slices.Index(levels, a.level) - slices.Index(levels, b.level)
		}
		return strings.Compare(a.row(), b.row())
	})
	return lines
}

// readLog reads a call of a method of a *slog.Logger: that of a variable or field
// that is named log.
func readLog(t *testing.T, set *token.FileSet, call *ast.CallExpr) (line logLine, ok bool) {
	t.Helper()
	method, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return line, false
	}
	line = logLine{level: method.Sel.Name, where: set.Position(call.Pos()).String()}
	repeated := causes[method.Sel.Name]
	switch {
	case repeated != "" && len(call.Args) > 0:
		line.level = repeated
	case !slices.Contains(levels, method.Sel.Name) || !isLogger(method.X):
		return line, false
	}
	line.message, ok = text(call.Args[0])
	if !ok || call.Ellipsis.IsValid() || len(call.Args)%2 == 0 {
		t.Fatalf("%s: a message is a literal, and after it come pairs of a field and its value", line.where)
	}
	for i := 1; i < len(call.Args); i += 2 {
		field, ok := text(call.Args[i])
		if !ok {
			t.Fatalf("%s: a field's name is a literal", line.where)
		}
		line.fields = append(line.fields, field)
	}
	if repeated != "" {
		line.fields = append(line.fields, "count", "duration")
	}
	return line, true
}

func isLogger(x ast.Expr) bool {
	switch x := x.(type) {
	case *ast.Ident:
		return x.Name == "log"
	case *ast.SelectorExpr:
		return strings.EqualFold(x.Sel.Name, "log")
	case *ast.CallExpr:
		name, ok := x.Fun.(*ast.Ident)
		return ok && name.Name == "logger"
	}
	return false
}

func text(x ast.Expr) (string, bool) {
	literal, ok := x.(*ast.BasicLit)
	if !ok || literal.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(literal.Value)
	return s, err == nil
}

// docs/logs.md has each line that the relay can log, and each field. After a change:
// go test . -run TestLogsPage -update
func TestLogsPage(t *testing.T) {
	const page, begin = "docs/logs.md", "| level | message | fields |\n|---|---|---|\n"
	lines := logLines(t)
	if len(lines) < 40 {
		t.Fatalf("%d lines are found: is it looked where they are?", len(lines))
	}
	var rows []string
	used := map[string]bool{}
	for _, line := range lines {
		rows = append(rows, strings.ReplaceAll(line.row(), "``", ""))
		for _, field := range line.fields {
			used[field] = true
			if !regexp.MustCompile(`^[a-z]+(_[a-z]+)*$`).MatchString(field) {
				t.Errorf("%s: field %q is not in snake_case", line.where, field)
			}
		}
	}
	rows = slices.Compact(rows)
	about, messages, found := strings.Cut(readFile(t, page), begin)
	if !found {
		t.Fatalf("%s has no table of messages", page)
	}
	want := strings.Join(rows, "\n") + "\n"
	if *update {
		if err := os.WriteFile(page, []byte(about+begin+want), 0o644); err != nil {
			t.Fatal(err)
		}
		messages = want
	}
	if messages != want {
		t.Errorf("%s does not have the lines that are logged (-update writes them):\n%s", page, want)
	}
	explained := map[string]bool{"time": true, "level": true, "msg": true}
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|").FindAllStringSubmatch(about, -1) {
		explained[row[1]] = true
	}
	for _, field := range slices.Sorted(maps.Keys(used)) {
		if !explained[field] {
			t.Errorf("%s does not explain the field %s", page, field)
		}
		delete(explained, field)
	}
	for _, field := range []string{"time", "level", "msg"} {
		delete(explained, field)
	}
	for field := range explained {
		t.Errorf("%s explains the field %s, which no line has", page, field)
	}
}
