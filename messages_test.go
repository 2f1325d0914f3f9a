package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// Every error and every warning that the program can utter has its entry in
// docs/errors.md, where it can be found by a part of its text that is always the same.
func TestErrorsAreExplained(t *testing.T) {
	page := strings.Join(strings.Fields(readFile(t, filepath.Join("docs", "errors.md"))), " ")
	said := utterances(t)
	if len(said) < 200 {
		t.Fatalf("%d messages were found", len(said))
	}
	for _, text := range slices.Sorted(maps.Keys(said)) {
		if !strings.Contains(page, text) {
			t.Errorf("docs/errors.md does not explain %q (%s)", text, said[text])
		}
	}
}

// utterances finds the messages of the program, and where they are: what is given
// to errors.New, fmt.Errorf, fault.Error, the log's Warn and Error, and the like.
func utterances(t *testing.T) map[string]token.Position {
	t.Helper()
	said := map[string]token.Position{}
	folders, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	dirs := []string{"."}
	for _, folder := range folders {
		// internal/config's faults name their variable, and what to write.
		if name := folder.Name(); folder.IsDir() && !slices.Contains([]string{"internal", "demo", "examples"}, name) {
			dirs = append(dirs, name)
		}
	}
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			// What the doctor says by itself has its remedy with it.
			if !strings.HasSuffix(file, "_test.go") && !strings.HasPrefix(filepath.Base(file), "doctor_") {
				utterancesOf(t, file, said)
			}
		}
	}
	return said
}

func utterancesOf(t *testing.T, file string, said map[string]token.Position) {
	t.Helper()
	set := token.NewFileSet()
	parsed, err := parser.ParseFile(set, file, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(parsed, func(node ast.Node) bool {
		if text, ok := constantText(uttered(node)); ok {
			if part := lastingPart(text); part != "" {
				said[part] = set.Position(node.Pos())
			}
		}
		return true
	})
}

// uttered returns what a user reads of a call, or of a fault.Error; nil: nothing.
func uttered(node ast.Node) ast.Expr {
	switch node := node.(type) {
	case *ast.CallExpr:
		if len(node.Args) > 0 && utters(node.Fun) {
			return sprintf(node.Args[0])
		}
	case *ast.CompositeLit:
		of, ok := node.Type.(*ast.SelectorExpr)
		if !ok || of.Sel.Name != "Error" {
			return nil
		}
		for _, element := range node.Elts {
			if pair, ok := element.(*ast.KeyValueExpr); ok && pair.Key.(*ast.Ident).Name == "What" {
				return sprintf(pair.Value)
			}
		}
	}
	return nil
}

// sprintf returns the format of a call of fmt.Sprintf, and else what it is given.
func sprintf(e ast.Expr) ast.Expr {
	if call, ok := e.(*ast.CallExpr); ok && len(call.Args) > 0 {
		if function, ok := call.Fun.(*ast.SelectorExpr); ok && function.Sel.Name == "Sprintf" {
			return call.Args[0]
		}
	}
	return e
}

// utters reports whether a function's first argument is what a user reads.
func utters(function ast.Expr) bool {
	switch function := function.(type) {
	case *ast.Ident:
		return slices.Contains([]string{"rejected", "fault", "noJetStream"}, function.Name)
	case *ast.SelectorExpr:
		name := function.Sel.Name
		if pkg, ok := function.X.(*ast.Ident); ok && (pkg.Name == "errors" && name == "New" || pkg.Name == "fmt" && name == "Errorf") {
			return true
		}
		return slices.Contains([]string{"Warn", "Error", "Again", "Fault", "anew", "miss", "publicationFault", "migrateFault"}, name)
	}
	return false
}

// constantText returns a string literal, or several that are added up.
func constantText(e ast.Expr) (string, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(e.Value)
		return text, err == nil && e.Kind == token.STRING
	case *ast.BinaryExpr:
		left, ok := constantText(e.X)
		if !ok {
			left = "%s"
		}
		right, ok2 := constantText(e.Y)
		if !ok2 {
			right = "%s"
		}
		return left + right, ok || ok2
	}
	return "", false
}

var formatVerb = regexp.MustCompile(`%(\[\d+\])?[-+#0-9.]*[a-zA-Z]`)

// lastingPart returns what of a message is always the same, enough to find it by:
// the longest such part of its first clause that has one. Empty: it only joins
// others.
func lastingPart(format string) string {
	for clause := range strings.SplitSeq(strings.Join(strings.Fields(format), " "), ": ") {
		longest := ""
		for _, part := range formatVerb.Split(clause, -1) {
			part = strings.Trim(part, ":;.,()' ")
			if len(part) > len(longest) {
				longest = part
			}
		}
		if len(longest) >= 7 {
			return longest
		}
	}
	return ""
}

func TestLastingPart(t *testing.T) {
	for format, want := range map[string]string{
		"%w: %s":                       "",
		"read slot %s: %w":             "read slot",
		"slot %s is temporary: choose": "is temporary",
		"%w: grant the role this: or":  "grant the role this",
	} {
		if got := lastingPart(format); got != want {
			t.Errorf("%q: %q, want %q", format, got, want)
		}
	}
}
