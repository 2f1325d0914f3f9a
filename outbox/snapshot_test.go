package outbox_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"outbox-relay/outbox"
)

// visible asks Postgres, which knows xids of 64 bits only.
const visible = `select array_agg(pg_visible_in_snapshot(x::text::xid8, $1::pg_snapshot) order by n)
	from unnest($2::bigint[]) with ordinality as u (x, n)`

// normal passes over the xids that no transaction gets: 0 to 2 in each epoch.
func normal(xid int64) int64 {
	if low := xid & (1<<32 - 1); low < 3 {
		return xid + 3 - low
	}
	return xid
}

// What Visible says of xids around a snapshot is what Postgres says.
func TestVisibleAgainstPostgres(t *testing.T) {
	t.Parallel()
	b := setup(t)
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	const epoch = int64(1) << 32
	for range 300 {
		// Around an epoch's turn as well as far from it.
		xmin := normal(epoch*int64(1+r.IntN(3)) - 50 + int64(r.IntN(100)))
		xmax := normal(xmin + int64(r.IntN(40)))
		text, sep := fmt.Sprintf("%d:%d:", xmin, xmax), ""
		for xip := xmin; xip < xmax; xip++ {
			if r.IntN(3) == 0 && xip == normal(xip) {
				text += fmt.Sprint(sep, xip)
				sep = ","
			}
		}
		snapshot, err := outbox.ParseSnapshot(text)
		b.must(err)
		xids := []int64{xmin - 2_000_000_000, xmax + 2_000_000_000, xmin, xmax, xmin - 1, xmax - 1}
		for range 200 {
			xids = append(xids, xmin-20+r.Int64N(xmax-xmin+40))
		}
		for i, want := range get[[]bool](b, visible, text, xids) {
			if got := snapshot.Visible(uint32(xids[i])); got != want {
				t.Fatalf("seed %d: snapshot %s, xid %d: visible %v, want %v", seed, text, xids[i], got, want)
			}
		}
	}
}

// A running transaction's rows are not visible to the relay's snapshot; its
// commit's are.
func TestVisibleFollowsACommit(t *testing.T) {
	t.Parallel()
	b := setup(t)
	sees := func(xid int64) bool {
		s, err := b.table.State(t.Context(), b.relay)
		b.must(err)
		return s.Snapshot.Visible(uint32(xid))
	}
	const insert = `insert into events (aggregate_type, event_type, payload) values ('a', 'b', '{}')
		returning pg_current_xact_id()::text::bigint`
	tx, err := b.sql.Begin(t.Context())
	b.must(err)
	var xid, later int64
	b.must(tx.QueryRow(t.Context(), insert).Scan(&xid))
	if sees(xid) {
		t.Error("visible before its commit")
	}
	b.must(b.connect().QueryRow(t.Context(), insert).Scan(&later))
	if sees(xid) || !sees(later) {
		t.Errorf("the running one visible %v, the later one, which has committed, %v", sees(xid), sees(later))
	}
	b.must(tx.Commit(t.Context()))
	if !sees(xid) {
		t.Error("not visible after its commit")
	}
}

func TestParseSnapshotRefuses(t *testing.T) {
	for _, text := range []string{"", "1", "1:2", "1:2:3:4", "a:2:", "1:b:", "1:2:x", "-1:2:", "1:2:1,,y", "18446744073709551616:2:"} {
		if s, err := outbox.ParseSnapshot(text); err == nil {
			t.Errorf("%q: taken for %+v", text, s)
		}
	}
}
