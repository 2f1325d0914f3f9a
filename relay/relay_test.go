package relay_test

import "testing"

func TestEventsArriveInOrderAndAreMarked(t *testing.T) {
	b := setup(t)
	r := b.streaming()
	ids := append(b.insert(3), b.insert(100)...)
	b.requireStream(ids)
	b.requireStatus("published", ids)
	if code := r.Terminate(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
}
