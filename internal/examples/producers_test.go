package examples

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// patience is the limit of every wait.
const patience = time.Minute

// The trigger fills in what GORM leaves out, and GORM reads the id back.
func TestGORM(t *testing.T) {
	s := setup(t)
	cmd := exec.Command(build(t, "gorm"))
	cmd.Env = append(os.Environ(), "DATABASE_URL="+s.url)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	s.require(1, `select count(*) from orders as o join events as e on e.aggregate_id = o.id::text
		where e.aggregate_type = 'order' and e.event_type = 'placed' and e.status = 'pending' and e.id = $1
			and e.payload = jsonb_build_object('order', o.id, 'customer', 'Ada', 'product', 'tea pot', 'quantity', 1)`,
		strings.TrimSpace(string(out)))
}

// The README's transaction does what it shows.
func TestReadmeTransaction(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join("..", "..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)```sql\n(BEGIN;\n.*?)```").FindSubmatch(readme)
	if block == nil {
		t.Fatal("README.md shows no transaction")
	}
	s := setup(t)
	s.exec(`drop table stock; create table stock (sku text primary key, count int); insert into stock values ('A-1', 10)`)
	s.exec(string(block[1]))
	s.require(9, `select count from stock`)
	s.require(1, `select count(*) from events where aggregate_id = 'o-42' and id like 'event%' and status = 'pending'`)
}
