package migrations_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

const crockford = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

// ulids generates n in a session of its own, one call after the other.
func ulids(ctx context.Context, config *pgx.ConnConfig, n int) ([]string, error) {
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	defer conn.Close(ctx)
	rows, err := conn.Query(ctx, "select gen_random_ulid() from generate_series(1, $1)", n)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

func TestULID(t *testing.T) {
	t.Parallel()
	config := migrated(t, usual)
	before := time.Now().Add(-time.Second)
	ids, err := ulids(t.Context(), config, 100_000)
	if err != nil {
		t.Fatal(err)
	}
	after := time.Now().Add(time.Second)
	for i, id := range ids {
		if len(id) != 26 || strings.Trim(id, crockford) != "" || id[0] > '7' {
			t.Fatalf("%q is not a ULID", id)
		}
		if i > 0 && id <= ids[i-1] {
			t.Fatalf("%q came after %q", id, ids[i-1])
		}
		if at := ulidTime(id); at.Before(before) || at.After(after) {
			t.Fatalf("%q says it was made at %v", id, at)
		}
	}
	requireRandomTail(t, ids)
}

func ulidTime(id string) time.Time {
	var ms int64
	for _, c := range id[:10] {
		ms = ms<<5 | int64(strings.IndexRune(crockford, c))
	}
	return time.UnixMilli(ms)
}

// requireRandomTail wants every value at each of the last 12 places about as
// often as another, and no two places that go together.
func requireRandomTail(t *testing.T, ids []string) {
	t.Helper()
	even := len(ids) / len(crockford)
	for i := 14; i < 26; i++ {
		count := map[byte]int{}
		same := make([]int, 26)
		for _, id := range ids {
			count[id[i]]++
			for j := i + 1; j < 26; j++ {
				if id[i] == id[j] {
					same[j]++
				}
			}
		}
		for _, c := range []byte(crockford) {
			if count[c] < even*8/10 || count[c] > even*12/10 {
				t.Errorf("place %d is %c %d times of %d", i, c, count[c], len(ids))
			}
		}
		if slices.Max(same) > even*12/10 {
			t.Errorf("place %d goes with another: %v", i, same)
		}
	}
}

func TestULIDsOfSessionsDiffer(t *testing.T) {
	t.Parallel()
	config := migrated(t, usual)
	const sessions, each = 8, 20_000
	made := make([][]string, sessions)
	g, ctx := errgroup.WithContext(t.Context())
	for i := range made {
		g.Go(func() (err error) {
			made[i], err = ulids(ctx, config, each)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	all := slices.Concat(made...)
	slices.Sort(all)
	if distinct := len(slices.Compact(all)); distinct != sessions*each {
		t.Errorf("%d distinct of %d", distinct, sessions*each)
	}
}

// It prints the time of a call; measured in a loop of plpgsql, as a trigger
// calls it.
func BenchmarkULID(b *testing.B) {
	conn := connect(b, migrated(b, usual))
	b.ResetTimer()
	_, err := conn.Exec(b.Context(), "select set_config('bench.n', $1::int::text, false)", b.N)
	if err != nil {
		b.Fatal(err)
	}
	_, err = conn.Exec(b.Context(), `do $$ declare id text; begin
		for i in 1..current_setting('bench.n')::int loop id := gen_random_ulid(); end loop; end $$`)
	if err != nil {
		b.Fatal(err)
	}
}
