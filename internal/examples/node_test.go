package examples

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"outbox-relay/internal/cache"
	"outbox-relay/internal/testenv"
)

// startNode starts examples/node.
func (s *shop) startNode() *testenv.Relay {
	s.Helper()
	node, err := exec.LookPath("node")
	s.must(err)
	dir := s.TempDir()
	script, err := os.ReadFile(filepath.Join(folder, "node", "inbox.mjs"))
	s.must(err)
	s.must(os.WriteFile(filepath.Join(dir, "inbox.mjs"), script, 0o600))
	s.must(os.Symlink(nodeModules(s), filepath.Join(dir, "node_modules")))
	p := testenv.StartBinary(s, node, map[string]string{"DATABASE_URL": s.url, "NATS_URL": s.nats.URL()}, filepath.Join(dir, "inbox.mjs"))
	p.WaitLog("consuming")
	return p
}

// nodeModules returns a folder with what examples/node depends on, fetched by npm
// once.
func nodeModules(t testing.TB) string {
	t.Helper()
	manifest, err := os.ReadFile(filepath.Join(folder, "node", "package.json"))
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("node-example-%x", sha256.Sum256(manifest))[:32]
	modules, err := cache.Folder(t.Context(), name, func(work string) (string, error) {
		return filepath.Join(work, "node_modules"), install(t.Context(), work, manifest, t.Logf)
	})
	if err != nil {
		t.Fatal(err)
	}
	// Modules are looked for in folders of that name.
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "node_modules"), os.DirFS(modules)); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "node_modules")
}

func install(ctx context.Context, dir string, manifest []byte, logf func(string, ...any)) error {
	if err := os.WriteFile(filepath.Join(dir, "package.json"), manifest, 0o600); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "npm", "install", "--no-audit", "--no-fund", "--ignore-scripts")
	cmd.Dir = dir
	return cache.Run(logf, cmd)
}

// The JavaScript consumer, too, does the work for an event once, and passes over
// one that it can never read.
func TestNodeConsumer(t *testing.T) {
	s := setup(t)
	consumer := s.startNode()
	s.publish("first", "event_1", order)
	s.publish("malformed", "event_2", `{"order": `)
	s.publish("second", "event_1", order)
	consumer.WaitLog("handled event_1 again")
	s.awaitAnswered("email", 3)
	s.requireEffects("email")
	if code := consumer.Terminate(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
