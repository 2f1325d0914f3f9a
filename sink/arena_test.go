package sink

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// However parts come and go, each stays as it was written until it is released,
// and the memory follows what is in use.
func TestArena(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var a arena
	var parts [][]byte
	used, most := 0, 0
	for i := range 50_000 {
		growing := i/5000%2 == 0
		if len(parts) > 0 && random.IntN(4) < 1 == growing {
			requireSame(t, parts[0])
			used -= len(parts[0])
			parts = parts[1:]
			a.release()
		} else {
			part := write(a.take(size(random)), byte(i))
			parts = append(parts, part)
			used += len(part)
		}
		most = max(most, used)
		// What a chunk has left is less than the part that began the next one.
		if held := a.held(); held > 2*used+(spareLimit+4)*chunkSize {
			t.Fatalf("step %d: %d bytes are held for %d in use", i, held, used)
		}
	}
	for _, part := range parts {
		requireSame(t, part)
		a.release()
	}
	if held := a.held(); held > spareLimit*chunkSize {
		t.Errorf("%d bytes are held for nothing, after %d in use", held, most)
	}
}

// size is mostly of small events, at times of one that needs a chunk of its own.
func size(random *rand.Rand) int {
	switch random.IntN(100) {
	case 0:
		return chunkSize + random.IntN(chunkSize)
	case 1:
		return 0
	default:
		return random.IntN(1 << 11)
	}
}

func write(part []byte, mark byte) []byte {
	return append(part, bytes.Repeat([]byte{mark}, cap(part))...)
}

func requireSame(t *testing.T, part []byte) {
	t.Helper()
	for _, b := range part {
		if b != part[0] {
			t.Fatal("a part was written over before it was released")
		}
	}
}

func (a *arena) held() (n int) {
	for _, c := range a.chunks {
		n += cap(c.bytes)
	}
	return n + len(a.spare)*chunkSize
}

// A window that is filled and emptied costs no allocation for an event.
func TestArenaAllocatesNothing(t *testing.T) {
	var a arena
	allocations := testing.AllocsPerRun(100, func() {
		for range 1000 {
			a.take(700)
		}
		for range 1000 {
			a.release()
		}
	})
	if allocations != 0 {
		t.Errorf("%v allocations for 1000 events", allocations)
	}
}
