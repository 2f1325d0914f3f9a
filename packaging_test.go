package main

import (
	"debug/buildinfo"
	"debug/elf"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"

	"outbox-relay/internal/config"
)

// compose loads docker-compose.yml as Docker Compose does: it refuses a
// misspelt key.
func compose(t *testing.T) *types.Project {
	t.Helper()
	options, err := cli.NewProjectOptions([]string{"docker-compose.yml"})
	if err != nil {
		t.Fatal(err)
	}
	project, err := options.LoadProject(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return project
}

func TestComposeFile(t *testing.T) {
	project := compose(t)
	if got := slices.Sorted(maps.Keys(project.Services)); !slices.Equal(got, []string{"migrate", "nats", "postgres", "relay"}) {
		t.Fatalf("services %v", got)
	}
	if !slices.Contains(project.Services["postgres"].Command, "wal_level=logical") {
		t.Error("Postgres is not set to wal_level=logical")
	}
	for name, service := range project.Services {
		if name != "migrate" && service.HealthCheck == nil {
			t.Errorf("service %s has no health check", name)
		}
		for dependency := range service.DependsOn {
			if _, ok := project.Services[dependency]; !ok {
				t.Errorf("service %s depends on %s, which is none", name, dependency)
			}
		}
	}
	relay := project.Services["relay"]
	if got := strings.Join(relay.HealthCheck.Test, " "); got != "CMD /outbox-relay healthcheck" {
		t.Errorf("the relay's health check is %q", got)
	}
	if !relay.ReadOnly {
		t.Error("the relay's root file system can be written")
	}
	if project.Services["migrate"].Build == nil || project.Services["migrate"].Image != relay.Image {
		t.Error("the relay does not run the image that is built")
	}
}

func TestComposeConfiguresTheRelay(t *testing.T) {
	for _, name := range []string{"relay", "migrate"} {
		environment := compose(t).Services[name].Environment
		for variable, value := range environment {
			t.Setenv(variable, *value)
		}
		cfg, err := config.Load()
		if err != nil {
			t.Fatalf("service %s: %v", name, err)
		}
		if cfg.HTTPAddr != ":8080" {
			t.Errorf("service %s serves on %q", name, cfg.HTTPAddr)
		}
	}
}

// The binary runs in an image that has nothing else, and has no NATS server in
// it, which demo and tests embed.
func TestStaticBinary(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "outbox-relay")
	build := exec.Command("go", "build", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	file, err := elf.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, program := range file.Progs {
		if program.Type == elf.PT_INTERP {
			t.Error("the binary is linked dynamically")
		}
	}
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	for _, module := range info.Deps {
		if strings.HasPrefix(module.Path, "github.com/nats-io/nats-server") {
			t.Errorf("the binary links %s", module.Path)
		}
	}
}

// The image is made of what .dockerignore lets through: it must hold all that
// the build embeds.
func TestDockerignoreKeepsTheBuildWhole(t *testing.T) {
	ignore, err := os.ReadFile(".dockerignore")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("go", "list", "-deps", "-f", "{{if .Module}}{{if .Module.Main}}{{range .EmbedFiles}}{{$.ImportPath}}/{{.}}\n{{end}}{{end}}{{end}}", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range strings.Fields(string(out)) {
		pattern := "!" + strings.TrimPrefix(filepath.Dir(file), "outbox-relay/") + "/*" + filepath.Ext(file)
		if !slices.Contains(strings.Fields(string(ignore)), pattern) {
			t.Errorf("%s is embedded, and .dockerignore has no %s", file, pattern)
		}
	}
}
