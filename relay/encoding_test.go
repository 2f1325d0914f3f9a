package relay_test

import (
	"log/slog"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"outbox-relay/internal/testenv"
	"outbox-relay/migrations"
)

// setupEncoded is setup with a fresh outbox in a database of that encoding.
func setupEncoded(t testing.TB, encoding string) *bundle {
	t.Helper()
	cluster := testenv.Postgres(t)
	b := setupDatabase(t, cluster, testenv.EncodedDatabase(t, cluster, encoding), testenv.NATSOptions{})
	config, err := pgx.ParseConfig(b.url)
	b.must(err)
	b.must(migrations.Up(t.Context(), config, migrations.Target{Schema: "public", Table: "events", Publication: "outbox_relay"},
		slog.New(slog.DiscardHandler)))
	b.exec(`set client_encoding to 'UTF8'`)
	b.grant()
	return b
}

// encodings have bytes that are no character, as literals of Postgres, and "Grüße" in them.
var encodings = map[string]struct{ bad, good string }{
	"WIN1252":   {`a\x81b`, `Gr\xfc\xdfe`},
	"WIN1253":   {`a\xd2\x81b`, `Gr\xce\xc2`}, // bad looks like UTF-8
	"SQL_ASCII": {`a\x81b`, `Gr\xc3\xbc\xc3\x9fe`},
	"EUC_JP":    {`a\xa9\xa1b`, `\xc6\xfc\xcb\xdc`},
}

// goodText is the good ones' text.
var goodText = map[string]string{"WIN1252": "Grüße", "WIN1253": "GrΞΒ", "SQL_ASCII": "Grüße", "EUC_JP": "日本"}

// insertText inserts an event one of whose columns has that text, as a literal of
// Postgres, and returns its id.
func (b *bundle) insertText(column, text string) (id string) {
	b.Helper()
	values := map[string]string{"aggregate_type": `'order'`, "event_type": `'created'`, "aggregate_id": "null", "headers": "null", "payload": `'1'`}
	values[column] = `E'` + text + `'`
	switch column {
	case "payload":
		values[column] = `E'"` + text + `"'`
	case "headers":
		values[column] = `E'{"text": "` + text + `"}'`
	}
	return b.text(`insert into events (aggregate_type, event_type, aggregate_id, headers, payload)
		values (` + values["aggregate_type"] + `, ` + values["event_type"] + `, ` + values["aggregate_id"] + `, ` + values["headers"] + `, ` + values["payload"] + `) returning id`)
}

// insertID inserts an event whose id is this literal.
func (b *bundle) insertID(literal string) {
	b.Helper()
	b.exec(`alter table events disable trigger on_events_create`)
	b.exec(`insert into events (id, aggregate_type, event_type, payload, status, created_at)
		values (E'` + literal + `', 'order', 'created', '1', 'pending', now())`)
	b.exec(`alter table events enable trigger on_events_create`)
}

// rowsThatDoNotConvert inserts rows that have bytes which are no characters, in each
// column, among rows that are well. It returns the ids of both.
func (b *bundle) rowsThatDoNotConvert(encoding string) (good, bad []string) {
	b.Helper()
	texts := encodings[encoding]
	good = b.insert(1)
	for i, column := range []string{"payload", "aggregate_type", "headers", "event_type", "aggregate_id"} {
		if i == 2 {
			b.exec(`begin`)
		}
		bad = append(bad, b.insertText(column, texts.bad))
		good = append(good, b.insertText(column, texts.good))
	}
	b.exec(`commit`)
	return append(good, b.insert(2)...), bad
}

// requireUnconverted waits until the rows are parked for their bytes.
func (b *bundle) requireUnconverted(encoding string, bad []string) {
	b.Helper()
	for _, id := range bad {
		b.requireFailed(id, "0x")
	}
}

// requireGoodText holds messages against what was inserted.
func (b *bundle) requireGoodText(encoding string, messages []message) {
	b.Helper()
	want := goodText[encoding]
	if got := string(messages[1].Data); got != `"`+want+`"` {
		b.Errorf("the payload is %s, want %q", got, want)
	}
	if got := messages[3].Header.Get("text"); got != want {
		b.Errorf("the header is %q, want %q", got, want)
	}
}

func eachEncoding(t *testing.T, test func(t *testing.T, encoding string)) {
	for encoding := range encodings {
		t.Run(encoding, func(t *testing.T) {
			t.Parallel()
			test(t, encoding)
		})
	}
}

// A row with bytes that are no characters of the server's encoding is parked, with its
// reason, and all others are published: those that come out of the slot.
func TestSlotBringsRowsThatDoNotConvert(t *testing.T) {
	t.Parallel()
	eachEncoding(t, func(t *testing.T, encoding string) {
		b := setupEncoded(t, encoding)
		r := b.streaming()
		good, bad := b.rowsThatDoNotConvert(encoding)
		b.requireUnconverted(encoding, bad)
		b.requireStatus("published", good)
		b.requireGoodText(encoding, b.requireStream(good))
		b.exec(`select outbox_retry_all()`)
		testenv.Eventually(t, "the second failures", func() bool {
			return b.count(`select count(*) from events where status = 'failed' and failed_attempts = 2`) == len(bad)
		})
		more := b.insert(2)
		b.requireStatus("published", more)
		b.requireStream(append(good, more...))
		if healed := strings.Contains(r.Logs(), "healing"); healed != (encoding == "EUC_JP") {
			t.Errorf("healed is %t", healed)
		}
	})
}

// The same rows, where they were there before the slot.
func TestTableHasRowsThatDoNotConvert(t *testing.T) {
	t.Parallel()
	eachEncoding(t, func(t *testing.T, encoding string) {
		b := setupEncoded(t, encoding)
		good, bad := b.rowsThatDoNotConvert(encoding)
		b.streaming()
		b.requireUnconverted(encoding, bad)
		b.requireStatus("published", good)
		b.requireGoodText(encoding, b.requireStream(good))
	})
}

// An id that has such bytes names no row: the event is kept as a leftover, and others are
// published. A list of pending rows can't have it, and the relay says how to find it.
func TestIDThatDoesNotConvert(t *testing.T) {
	t.Parallel()
	for _, encoding := range []string{"WIN1252", "WIN1253", "SQL_ASCII"} {
		t.Run(encoding, func(t *testing.T) {
			t.Parallel()
			b := setupEncoded(t, encoding)
			r := b.streaming()
			good := b.insert(1)
			b.insertID(encodings[encoding].bad)
			b.insertID(encodings[encoding].good)
			good = append(good, goodText[encoding])
			good = append(good, b.insert(1)...)
			b.requireStatus("published", good)
			b.requireStream(good)
			testenv.Eventually(t, "the event to be kept", func() bool {
				return b.count(`select count(*) from outbox_relay_leftovers where outcome = 'failed' and reason like '%column id has the byte 0x%'`) == 1
			})
			requireLeaves(t, r)
			b.dropSlot()
			requireEnd(t, b.start(), 1, "can't send the id of a pending row", "ctid")
		})
	}
}

// A relay that halts before such a row passes over it once it is parked.
func TestHaltBeforeRowsThatDoNotConvert(t *testing.T) {
	t.Parallel()
	eachEncoding(t, func(t *testing.T, encoding string) {
		b := setupEncoded(t, encoding)
		first := b.insert(1)
		before := b.insertText("payload", encodings[encoding].bad)
		requireEnd(t, b.start("ON_REJECT=halt"), 1, "halted before event "+before, "0x", "outbox-relay park "+before)
		requireEnd(t, testenv.StartRelay(t, b.env, "park", before), 0, before+" is failed now")
		r := b.streaming("ON_REJECT=halt")
		after := b.insertText("payload", encodings[encoding].bad)
		last := b.insert(1)
		if encoding == "EUC_JP" {
			r.WaitLog("halted before event " + after)
		}
		requireEnd(t, r, 1, "halted before event "+after, "0x", "outbox-relay park "+after)
		requireEnd(t, testenv.StartRelay(t, b.env, "park", after), 0, after+" is failed now")
		b.streaming("ON_REJECT=halt")
		b.requireStatus("published", append(first, last...))
		b.requireStream(append(first, last...))
	})
}

// What an operator looks at shows such rows.
func TestRowsThatDoNotConvertAreShown(t *testing.T) {
	t.Parallel()
	for _, encoding := range []string{"WIN1252", "SQL_ASCII"} {
		t.Run(encoding, func(t *testing.T) {
			t.Parallel()
			b := setupEncoded(t, encoding)
			r := b.streaming("RETRY_ATTEMPTS=3", "RETRY_BACKOFF=1s", "RETENTION=1h")
			b.insertText("aggregate_type", encodings[encoding].bad)
			testenv.Eventually(t, "the row to fail", func() bool { return b.count(`select count(*) from events where status = 'failed'`) == 1 })
			requireEnd(t, testenv.StartRelay(t, b.env, "status"), 0, `a\201b`)
			b.requireStatus("published", b.insert(1))
			b.exec(`update events set status = 'published', published_at = now() where status = 'failed'`)
			requireEnd(t, testenv.StartRelay(t, b.env, "replay", "--event-type", "created", "--dry-run"), 0, `a\201b`)
			b.requireStatus("published", b.insert(1))
			if strings.Contains(r.Logs(), "housekeeping waits") {
				t.Error("the rows keep the housekeeper from its work")
			}
		})
	}
}

// Names of table and columns are text of the server's encoding.
func TestNamesInAnotherEncoding(t *testing.T) {
	t.Parallel()
	for _, encoding := range []string{"WIN1252", "SQL_ASCII", "UTF8"} {
		t.Run(encoding, func(t *testing.T) {
			t.Parallel()
			b := setupEncoded(t, encoding)
			table := []string{"TABLE=für", "COLUMN_ID=id", "COLUMN_AGGREGATE_TYPE=größe"}
			b.exec(`create table "für" (id text primary key, "größe" text not null, event_type text not null, payload jsonb not null)`)
			b.migrate(table...)
			r := b.streaming(table...)
			b.exec(`insert into "für" values ('1', 'maß', 'created', '"süß"')`)
			b.requireStream([]string{"1"})
			if m := b.messages()[0]; m.Subject != "events.ma=C3=9F.created" || string(m.Data) != `"süß"` {
				t.Errorf("the message is %s: %s", m.Subject, m.Data)
			}
			requireLeaves(t, r)
			if encoding != "UTF8" {
				table = append(table, "PUBLICATION=veröffentlicht", "SLOT="+b.slot()+"_other", "STREAM=OTHER", "SUBJECT=other.{event_type}")
				b.migrate(table...)
				requireEnd(t, b.start(table...), 1, "OUTBOX_PUBLICATION", "ASCII")
			}
		})
	}
}

// Whatever else Postgres can't print is found by its row: an enum's value without a
// label stands for it, which the output function refuses as it does a value that is too
// large to be printed.
func TestRowsThatPostgresCannotPrint(t *testing.T) {
	t.Parallel()
	for _, before := range []bool{true, false} {
		name := "from the slot"
		if before {
			name = "from the table"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.exec(`create type mood as enum ('good', 'bad')`)
			b.exec(`alter table events add column mood mood not null default 'good'`)
			b.exec(`create table unprintable as select 'bad'::mood as mood`)
			b.exec(`delete from pg_catalog.pg_enum where enumlabel = 'bad'`)
			b.migrate("SUBJECT=events.{mood}.{event_type}")
			b.grant()
			var r *testenv.Relay
			if !before {
				r = b.streaming("SUBJECT=events.{mood}.{event_type}")
			}
			want := b.insert(2)
			bad := b.text(`insert into events (aggregate_type, event_type, payload, mood) select 'order', 'created', '1', mood from unprintable returning id`)
			want = append(want, b.insert(2)...)
			if before {
				r = b.streaming("SUBJECT=events.{mood}.{event_type}")
			}
			b.requireFailed(bad, "invalid internal value for enum")
			b.requireStatus("published", want)
			b.requireStream(want)
			if !before {
				r.WaitLog("can't be read from the slot")
			}
		})
	}
}
