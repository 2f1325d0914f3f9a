package decoder_test

import (
	"fmt"
	"strings"
	"testing"

	"outbox-relay/decoder"
	"outbox-relay/outbox/event"
)

// typical is an event as it comes out of the usual publication.
func typical(number int) []byte {
	return insert(table, text(fmt.Sprintf("event_01M84GZK0V5X0J%012d", number)), text("0"), text("order"), text("order-42"), text("created"),
		text(`{"line": 1, "text": "`+strings.Repeat("x", 160)+`"}`), null(), text("pending"), text("2026-11-24 12:00:00.123456+00"))
}

func benchmark(b *testing.B, messages [][]byte, events int) {
	d := decoder.New(table, event.Columns{}, event.Proof{})
	decode(b, d, relation(table, usual...))
	b.ReportAllocs()
	at := uint64(1000)
	for b.Loop() {
		at += 1000 // each transaction commits behind the one before
		order.PutUint64(messages[0][1:], at)
		order.PutUint64(messages[len(messages)-1][2:], at)
		order.PutUint64(messages[len(messages)-1][10:], at+500)
		for _, m := range messages {
			if _, err := d.Decode(m); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(events), "ns/event")
}

// Begin, so many inserts, Commit.
func BenchmarkDecode(b *testing.B) {
	for _, events := range []int{1, 100} {
		b.Run(fmt.Sprint(events, "-a-transaction"), func(b *testing.B) {
			messages := [][]byte{begin(10, 7)}
			for i := range events {
				messages = append(messages, typical(i))
			}
			benchmark(b, append(messages, commit(10, 20)), events)
		})
	}
}
