package sink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"outbox-relay/decoder"
	"outbox-relay/internal/discard"
	"outbox-relay/internal/lsn"
	"outbox-relay/internal/testenv"
	"outbox-relay/migrations"
	"outbox-relay/outbox/event"
	"outbox-relay/replication"
)

// modes are what OUTBOX_HEADERS can be, in the order of their cost.
var modes = []struct {
	name        string
	cloudEvents bool
}{{"minimal", false}, {"cloudevents", true}}

// typical is an event of 200 bytes of payload.
func typical() *event.Event {
	e := sample()
	e.ID, e.AggregateID = []byte("event_01M84GZK0V5X0J000000000000"), []byte("order-42")
	e.Payload = fmt.Appendf(nil, `{"line": 1, "text": "%0160d"}`, 0)
	return e
}

// BenchmarkBuild makes the bytes of a publish.
func BenchmarkBuild(b *testing.B) {
	for _, mode := range modes {
		b.Run(mode.name, func(b *testing.B) {
			config := messageConfig
			config.CloudEvents = mode.cloudEvents
			builder, e := newBuilder(config), typical()
			var out []byte
			b.ReportAllocs()
			for b.Loop() {
				if err := builder.build(e, anyLimit); err != nil {
					b.Fatal(err)
				}
				out = builder.appendPublish(out[:0], []byte("_INBOX_outbox.x.1.2"), 1234567)
			}
			b.SetBytes(int64(len(out)))
		})
	}
}

// BenchmarkPublish publishes through a chain to a nats-server process, to the last
// ack. Its allocations are those of the NATS client for the acks.
func BenchmarkPublish(b *testing.B) {
	server := testenv.NATSProcesses(b, testenv.NATSBinary(b, ""), 1)[0]
	for _, mode := range modes {
		b.Run(mode.name, func(b *testing.B) {
			config := Config{Servers: []string{server.URL()}, Stream: owner, Message: messageConfig, MaxInflight: 8192, MaxBytes: 64 << 20}
			config.Stream.Create, config.Message.CloudEvents = true, mode.cloudEvents
			chain, stop := runChain(b, connectTo(b, config), Heritage{}, indifferent{})
			e, ids := typical(), fmt.Sprint(mode.name, b.N, "-") // no duplicates
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				e.ID = strconv.AppendInt(append(e.ID[:0], ids...), int64(i), 10)
				if err := chain.Publish(b.Context(), uint64(i), e); err != nil {
					b.Fatal(err)
				}
			}
			if err := chain.Drain(b.Context()); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			if err := stop(); !errors.Is(err, context.Canceled) {
				b.Fatal(err)
			}
		})
	}
}

// backlog is an outbox with a slot for each reader, on a real Postgres.
type backlog struct {
	*testing.B
	url    string
	sql    *pgx.Conn
	events int
}

func newBacklog(b *testing.B, events int) *backlog {
	cluster := testenv.OwnPostgres(b, map[string]string{"shared_buffers": "256MB", "max_wal_size": "8GB", "autovacuum": "off", "fsync": "off"})
	l := &backlog{B: b, url: testenv.Database(b, cluster), events: events}
	config, err := pgx.ParseConfig(l.url)
	l.must(err)
	l.must(migrations.Up(b.Context(), config, migrations.Target{Schema: "public", Table: "events", Publication: "outbox_relay"},
		slog.New(slog.DiscardHandler)))
	l.sql, err = pgx.Connect(b.Context(), l.url)
	l.must(err)
	b.Cleanup(func() { l.sql.Close(context.Background()) })
	return l
}

func (l *backlog) must(err error) {
	if err != nil {
		l.Helper()
		l.Fatal(err)
	}
}

func (l *backlog) exec(sql string, args ...any) {
	l.Helper()
	_, err := l.sql.Exec(l.Context(), sql, args...)
	l.must(err)
}

// write makes both slots anew and puts the events behind them, 100 a transaction.
func (l *backlog) write() {
	testenv.Eventually(l, "the slots to be free", func() bool {
		var active int
		l.must(l.sql.QueryRow(l.Context(), `select count(*) from pg_replication_slots where active`).Scan(&active))
		return active == 0
	})
	l.exec(`select pg_drop_replication_slot(slot_name) from pg_replication_slots`)
	l.exec(`select pg_create_logical_replication_slot(name, 'pgoutput') from unnest(array['best', 'relay']) name`)
	l.exec(`create or replace procedure fill(transactions int) language plpgsql as $$
		begin
			for t in 1..transactions loop
				insert into events (aggregate_type, aggregate_id, event_type, payload)
				select 'order', 'order-' || t, 'created', jsonb_build_object('order', t, 'line', i, 'text', repeat('x', 150)) from generate_series(1, 100) i;
				commit;
			end loop;
		end $$`)
	l.exec(fmt.Sprintf(`call fill(%d)`, l.events/100))
	l.exec(`checkpoint`)
}

func (l *backlog) readByBest() time.Duration {
	f, err := discard.Read(l.Context(), discard.Reading{URL: l.url, Slot: "best", Publication: "outbox_relay", Events: l.events})
	l.must(err)
	return f.Took
}

// readByRelay reads, decodes and builds with the relay's own parts, from the first
// event to the last.
func (l *backlog) readByRelay() time.Duration {
	config, err := pgx.ParseConfig(l.url)
	l.must(err)
	conn, err := replication.Connect(l.Context(), &config.Config)
	l.must(err)
	defer conn.Close()
	var table uint32
	var confirmed string
	l.must(l.sql.QueryRow(l.Context(), `select 'events'::regclass::oid, confirmed_flush_lsn::text from pg_replication_slots
		where slot_name = 'relay'`).Scan(&table, &confirmed))
	from, err := lsn.Parse(confirmed)
	l.must(err)
	session, err := conn.Start(l.Context(), "relay", "outbox_relay", from)
	l.must(err)
	ctx, stop := context.WithCancel(l.Context())
	defer stop()
	builder := &discardingSink{decoder: decoder.New(table, event.Columns{}, event.Proof{}), builder: newBuilder(messageConfig), left: l.events, done: stop}
	if err := session.Run(ctx, builder); !errors.Is(err, replication.ErrStopped) {
		l.Fatal(err)
	}
	return builder.took
}

// discardingSink is a replication.Handler that does everything up to the bytes
// that would go to NATS.
type discardingSink struct {
	decoder *decoder.Decoder
	builder *builder
	out     []byte
	left    int
	first   time.Time
	took    time.Duration
	done    func()
}

func (s *discardingSink) Data(_ pglogrepl.LSN, data []byte) error {
	kind, err := s.decoder.Decode(data)
	if err != nil || kind != decoder.Insert || s.left == 0 {
		return err
	}
	if s.first.IsZero() {
		s.first = time.Now()
	}
	if err := s.builder.build(&s.decoder.Event, anyLimit); err != nil {
		return err
	}
	s.out = s.builder.appendPublish(s.out, []byte("_INBOX_outbox.ABCDEFGHIJKLMNOPQRSTUV.1.abcde"), uint64(s.left))
	if len(s.out) >= writeSize {
		_, _ = io.Discard.Write(s.out)
		s.out = s.out[:0]
	}
	if s.left--; s.left == 0 {
		s.took = time.Since(s.first)
		s.done()
	}
	return nil
}

func (*discardingSink) Keepalive(pglogrepl.LSN, bool) error { return nil }
func (*discardingSink) Notice(string)                       {}
func (*discardingSink) Idle()                               {}
func (*discardingSink) Lost(error)                          {}

// BenchmarkDiscarding compares reading, decoding and building messages, which
// go nowhere, with the best reader that is known, which only counts: on the same
// backlog of a real slot, who comes first alternates. Give it rounds rather than
// time: -benchtime 9x.
func BenchmarkDiscarding(b *testing.B) {
	l := newBacklog(b, 100_000)
	var ratios, rates []float64
	b.ResetTimer()
	for i := range b.N {
		b.StopTimer()
		l.write()
		b.StartTimer()
		var best, relay time.Duration
		if i%2 == 0 {
			best, relay = l.readByBest(), l.readByRelay()
		} else {
			relay, best = l.readByRelay(), l.readByBest()
		}
		ratios = append(ratios, best.Seconds()/relay.Seconds())
		rates = append(rates, float64(l.events)/relay.Seconds())
		b.Logf("best reader %.0f events/s, of which reading, decoding and building %.2f", float64(l.events)/best.Seconds(), ratios[i])
	}
	slices.Sort(ratios)
	slices.Sort(rates)
	b.ReportMetric(0, "ns/op") // its time is that of two readers
	b.ReportMetric(rates[len(rates)/2], "events/s")
	b.ReportMetric(ratios[len(ratios)/2], "of_best_median")
	b.ReportMetric(ratios[0], "of_best_least")
	b.ReportMetric(ratios[len(ratios)-1], "of_best_greatest")
}
