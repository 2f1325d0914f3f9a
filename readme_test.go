package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func readFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// The Go that the README and the guides show is that of the examples, word for
// word, and they compile.
func TestReadmeShowsTheExamples(t *testing.T) {
	var examples strings.Builder
	for _, folder := range []string{"examples/consumer", "examples/gorm", "examples/orders/shop", "examples/orders/inbox", "internal/examples"} {
		examples.WriteString(sources(t, filepath.FromSlash(folder)))
	}
	for page, number := range map[string]int{"README.md": 1, "docs/producing.md": 2, "docs/consuming.md": 2} {
		blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(readFile(t, filepath.FromSlash(page)), -1)
		if len(blocks) != number {
			t.Errorf("%s has %d blocks of Go, want %d", page, len(blocks), number)
		}
		for _, block := range blocks {
			if !strings.Contains(examples.String(), block[1]) {
				t.Errorf("%s shows what is not in the examples:\n%s", page, block[1])
			}
		}
	}
	vet := exec.Command("go", "vet", "./...")
	vet.Dir, vet.Env = "examples", append(os.Environ(), "GOWORK=off", "CGO_ENABLED=0")
	if out, err := vet.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// A library that both modules need is of the same version in both.
func TestExamplesUseTheSameVersions(t *testing.T) {
	required := regexp.MustCompile(`(?m)^\s(\S+) (v\S+)`)
	versions := map[string]string{}
	for _, line := range required.FindAllStringSubmatch(readFile(t, "go.mod"), -1) {
		versions[line[1]] = line[2]
	}
	for _, line := range required.FindAllStringSubmatch(readFile(t, filepath.Join("examples", "go.mod")), -1) {
		if want := versions[line[1]]; want != "" && want != line[2] {
			t.Errorf("examples/go.mod has %s %s, go.mod %s", line[1], line[2], want)
		}
	}
}

// Every folder that the README names is there.
func TestReadmeFolders(t *testing.T) {
	_, table, _ := strings.Cut(readFile(t, "README.md"), "| folder | what it is |")
	rows := regexp.MustCompile("(?m)^\\| (`[a-z`, ]+) \\|").FindAllStringSubmatch(table, -1)
	if len(rows) < 9 {
		t.Fatalf("README.md names %d folders", len(rows))
	}
	for _, row := range rows {
		for _, name := range regexp.MustCompile("`([a-z]+)`").FindAllStringSubmatch(row[1], -1) {
			if info, err := os.Stat(name[1]); err != nil || !info.IsDir() {
				t.Errorf("README.md names the folder %s, and there is none", name[1])
			}
		}
	}
}

// Each test and each fault of the suite that docs/faults.md names is there.
func TestFaultsAreProved(t *testing.T) {
	text := readFile(t, filepath.Join("docs", "faults.md"))
	folders := map[string]string{"chaos": filepath.Join("internal", "chaos")}
	tests := regexp.MustCompile("`([a-z]+)\\.(Test[A-Za-z]+)`").FindAllStringSubmatch(text, -1)
	if len(tests) < 50 {
		t.Fatalf("%d tests are named", len(tests))
	}
	for _, test := range tests {
		folder := test[1]
		if folders[folder] != "" {
			folder = folders[folder]
		}
		if !strings.Contains(sources(t, folder), "func "+test[2]+"(") {
			t.Errorf("%s has no %s", folder, test[2])
		}
	}
	suite := sources(t, folders["chaos"])
	link := regexp.MustCompile("^link to (Postgres|NATS) ")
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "|") {
			continue
		}
		for _, fault := range strings.Split(line, "chaos: ")[1:] {
			fault = link.ReplaceAllString(strings.TrimRight(fault, ", |\n"), "")
			if !strings.Contains(suite, `"`+fault+`"`) {
				t.Errorf("the suite has no fault %q", fault)
			}
		}
	}
}

// sources are all Go files of a folder.
func sources(t *testing.T, folder string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(folder, "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%s has no Go files: %v", folder, err)
	}
	var all strings.Builder
	for _, file := range files {
		all.WriteString(readFile(t, file))
	}
	return all.String()
}
