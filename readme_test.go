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

// The README shows a consumer that compiles: that of the examples.
func TestReadmeConsumer(t *testing.T) {
	block := regexp.MustCompile("(?s)```go\n(.*?)```").FindStringSubmatch(readFile(t, "README.md"))
	if block == nil {
		t.Fatal("README.md has no consumer")
	}
	if !strings.Contains(readFile(t, filepath.Join("examples", "consumer", "main.go")), block[1]) {
		t.Errorf("the consumer of README.md is not that of the examples:\n%s", block[1])
	}
	vet := exec.Command("go", "vet", "./...")
	vet.Dir = "examples"
	if out, err := vet.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// Every folder that the README names is there.
func TestReadmeFolders(t *testing.T) {
	rows := regexp.MustCompile("(?m)^\\| (`[a-z`, ]+) \\|").FindAllStringSubmatch(readFile(t, "README.md"), -1)
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
