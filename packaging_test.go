package main

import (
	"debug/buildinfo"
	"debug/elf"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
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
	if got := slices.Sorted(maps.Keys(project.Services)); !slices.Equal(got, []string{"migrate", "nats", "postgres", "relay", "roles"}) {
		t.Fatalf("services %v", got)
	}
	if !slices.Contains(project.Services["postgres"].Command, "wal_level=logical") {
		t.Error("Postgres is not set to wal_level=logical")
	}
	for name, service := range project.Services {
		ends := name == "migrate" || name == "roles"
		if !ends && service.HealthCheck == nil {
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
	if url := relay.Environment["OUTBOX_POSTGRES_URL"]; !strings.HasPrefix(*url, "postgres://relay:") {
		t.Errorf("the relay connects by %s, not as the role that deploy/postgres/roles.sql makes", *url)
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
		if cfg.HTTP.Addr != ":8080" {
			t.Errorf("service %s serves on %q", name, cfg.HTTP.Addr)
		}
	}
}

// dockerfile returns the command that builds the binary, and the instructions of
// the last stage, each in one line.
func dockerfile(t *testing.T) (build string, image []string) {
	t.Helper()
	text := strings.ReplaceAll(readFile(t, "Dockerfile"), "\\\n", " ")
	stages := strings.Split(text, "\nFROM ")
	if len(stages) != 3 {
		t.Fatalf("the Dockerfile has %d stages, want 2", len(stages)-1)
	}
	build = regexp.MustCompile(`(?m)^RUN .*?(CGO_ENABLED=.* go build .*) -o /outbox-relay \.$`).FindStringSubmatch(stages[1])[1]
	for line := range strings.Lines("FROM " + stages[2]) {
		image = append(image, strings.Join(strings.Fields(line), " "))
	}
	return build, image
}

func TestDockerfile(t *testing.T) {
	_, image := dockerfile(t)
	for _, want := range []string{
		"FROM scratch",
		"USER 65534:65534", // in numbers: Kubernetes can't tell whether a name is root
		"ENV OUTBOX_HTTP_ADDR=:8080",
		`ENTRYPOINT ["/outbox-relay"]`,
		`CMD ["run"]`,
	} {
		if !slices.Contains(image, want) {
			t.Errorf("the image has no %s", want)
		}
	}
	all := strings.Join(image, "\n")
	if !regexp.MustCompile(`(?m)^HEALTHCHECK .*CMD \["/outbox-relay", "healthcheck"\]$`).MatchString(all) {
		t.Error("the image has no health check")
	}
	for _, label := range []string{"title", "description", "licenses", "version", "revision"} {
		if !strings.Contains(all, "org.opencontainers.image."+label+"=") {
			t.Errorf("the image has no label %s", label)
		}
	}
}

// What the Dockerfile's command builds runs in an image that has nothing else, has
// no NATS server in it, which demo and tests embed, and tells its version.
func TestStaticBinary(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "outbox-relay")
	command, _ := dockerfile(t)
	build := exec.Command("sh", "-c", command+` -o "$BINARY" .`)
	build.Env = append(os.Environ(), "BINARY="+binary, "VERSION=v9.8.7", "COMMIT=0123abcd", "TARGETOS=linux", "TARGETARCH="+runtime.GOARCH)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if runtime.GOOS == "linux" {
		want := fmt.Sprintf("outbox-relay v9.8.7\ncommit 0123abcd\n%s linux/%s\n", runtime.Version(), runtime.GOARCH)
		if out, err := exec.Command(binary, "version").Output(); err != nil || string(out) != want {
			t.Errorf("version: %q, %v, want %q", out, err, want)
		}
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
