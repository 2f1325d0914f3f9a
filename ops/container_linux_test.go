package ops_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/testenv"
)

// contained runs the relay as an engine would run its image: what it sees is
// the binary alone, on a file system that it can't write to, and it is nobody.
type contained struct {
	*testing.T
	root string
	env  map[string]string
}

// contain needs root, or a kernel that lets everybody make user namespaces:
// then the relay is who runs the test.
func contain(t *testing.T, env map[string]string) *contained {
	t.Helper()
	c := &contained{t, filepath.Join(t.TempDir(), "root"), env}
	binary, err := os.ReadFile(testenv.RelayBinary(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(c.root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.root, "outbox-relay"), binary, 0o755); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *contained) start(args ...string) *testenv.Relay {
	c.Helper()
	namespaces, chroot := []string{"--mount"}, "chroot --userspec=65534:65534 --groups="
	if os.Getuid() != 0 {
		namespaces, chroot = append(namespaces, "--user", "--map-root-user"), "chroot"
	}
	script := `root=$1; shift; mount --bind "$root" "$root" && mount -o remount,bind,ro "$root" && exec ` + chroot + ` "$root" /outbox-relay "$@"`
	return testenv.StartBinary(c, "/usr/bin/unshare", c.env, append(append(namespaces, "sh", "-c", script, "sh", c.root), args...)...)
}

// requireContained looks at the process.
func (c *contained) requireContained(r *testenv.Relay) {
	c.Helper()
	about := fmt.Sprintf("/proc/%d/", r.Pid())
	status, err := os.ReadFile(about + "status")
	if err != nil {
		c.Fatal(err)
	}
	for _, want := range []string{"Uid:\t65534\t65534\t65534\t65534\n", "Gid:\t65534\t65534\t65534\t65534\n", "Groups:\t \n", "CapEff:\t0000000000000000\n"} {
		if os.Getuid() == 0 && !strings.Contains(string(status), want) {
			c.Errorf("the process is not %q:\n%s", want, status)
		}
	}
	mounts, err := os.ReadFile(about + "mountinfo")
	if err != nil {
		c.Fatal(err)
	}
	if fields := strings.Fields(string(mounts)); len(fields) < 6 || fields[4] != "/" || !strings.HasPrefix(fields[5], "ro,") {
		c.Errorf("the root is not mounted read-only:\n%s", mounts)
	}
	seen, err := os.ReadDir(about + "root")
	if err != nil || len(seen) != 1 {
		c.Errorf("it sees %v (%v), want the binary alone", seen, err)
	}
}

func TestRunsInAContainer(t *testing.T) {
	url := testenv.SeasonedDatabase(t, testenv.Postgres(t))
	testenv.GrantRoles(t, url)
	c := contain(t, map[string]string{
		"OUTBOX_POSTGRES_URL": testenv.AsRelay(t, url), "OUTBOX_SLOT": testenv.SlotName(t, url),
		"OUTBOX_NATS_URL": testenv.NATS(t, testenv.NATSOptions{}).URL(), "OUTBOX_NATS_USER": testenv.RelayName, "OUTBOX_NATS_PASSWORD": testenv.RelayName,
		"OUTBOX_HTTP_ADDR": fmt.Sprintf(":%d", testenv.FreePort(t)),
	})
	probe := func() int { return c.start("healthcheck").Wait(time.Minute) }
	if code := probe(); code != 1 {
		t.Errorf("the probe of a relay that does not run ends with %d", code)
	}
	r := c.start("run")
	r.WaitLog("msg=streaming")
	c.requireContained(r)
	if code := probe(); code != 0 {
		t.Errorf("the probe ends with %d", code)
	}
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var id string
	err = conn.QueryRow(t.Context(), `insert into events (aggregate_type, event_type, payload) values ('order', 'placed', '{}') returning id`).Scan(&id)
	if err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, "the event published", func() (published bool) {
		err := conn.QueryRow(t.Context(), `select status = 'published' from events where id = $1`, id).Scan(&published)
		return err == nil && published
	})
	if code := r.Terminate(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
