package relay_test

import (
	"math/rand/v2"
	"testing"
)

// The duplicate window is so short that it can't help.
const noWindow = "STREAM_DUPLICATE_WINDOW=100ms"

func TestKilledAtRandomMoments(t *testing.T) {
	for _, mode := range []string{"mark", "delete", "keep"} {
		t.Run(mode, func(t *testing.T) {
			b := setup(t)
			after := "AFTER_PUBLISH=" + mode
			r := b.streaming(noWindow, after)
			o := b.oracle()
			w := b.write(8)
			for range 20 {
				w.await(50 + rand.IntN(1500))
				r.Kill()
				r = b.start(noWindow, after)
			}
			w.stop()
			ids := o.committed()
			b.requireStream(ids)
			switch mode {
			case "mark":
				b.requireStatus("published", ids)
			case "delete":
				b.requireNoRows(ids)
			}
			if code := r.Terminate(); code != 0 {
				t.Fatalf("exit code %d", code)
			}
		})
	}
}
