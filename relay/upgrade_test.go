package relay_test

import (
	"log/slog"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/internal/testenv"
	"outbox-relay/migrations"
)

// The statements by which the release before 003, which knows format 1 only,
// writes and reads its checkpoint.
const (
	firstCreate = `insert into outbox_relay_checkpoints (slot, format, phase, system_identifier, timeline,
			commit_lsn, ordinal, confirmed_lsn, stream, stream_created_at, stream_sequence, unrecorded_bound, publication_state)
		select $1::text, 1, 'streaming', (select system_identifier::text from pg_control_system()), 1, confirmed_flush_lsn, 0, confirmed_flush_lsn,
			'EVENTS', $2, 0, 65536, outbox_relay_publication_state('outbox_relay', 'events') from pg_replication_slots where slot_name = $1::text`
	firstRead = `select count(*) from (select epoch, format, phase, system_identifier, timeline, commit_lsn::text, ordinal, confirmed_lsn::text,
			stream, stream_created_at, stream_sequence, coalesce(message_id, ''), unrecorded_bound, foreign_seen, coalesce(publication_state, '')
		from outbox_relay_checkpoints) c where format = 1 and phase = 'streaming' and unrecorded_bound = 0`
	firstAdvance = `with advanced as (
			update outbox_relay_checkpoints set commit_lsn = $1::pg_lsn, ordinal = 1, stream_sequence = stream_sequence + 1,
				message_id = coalesce(nullif($2::text, ''), message_id),
				confirmed_lsn = greatest(confirmed_lsn, $1::pg_lsn), updated_at = now()
			where (commit_lsn, ordinal) <= ($1::pg_lsn, 1::bigint) returning slot)
		update events set status = 'published', published_at = now() from advanced where id = $2`
)

// A relay takes up what the release before it has left, and leaves what that can
// take up again; but not in the middle of what that does not know.
func TestUpgradeAndRollBack(t *testing.T) {
	b := setupEmpty(t, testenv.Postgres(t), testenv.NATSOptions{})
	files, err := migrations.Render(migrations.Target{Schema: "public", Table: "events", Publication: "outbox_relay"})
	b.must(err)
	for _, file := range files[:2] {
		b.exec(file.SQL)
	}

	// Of three events one is published and recorded, one published only.
	b.makeStream(jetstream.StreamConfig{Name: "EVENTS", Subjects: []string{"events.*.*"}})
	b.exec(`select pg_create_logical_replication_slot($1, 'pgoutput')`, b.slot())
	b.exec(firstCreate, b.slot(), b.stream().CachedInfo().Created)
	ids := []string{b.insert(1)[0]}
	first := b.text(`select pg_current_wal_lsn()::text`)
	ids = append(ids, b.insert(2)...)
	for _, id := range ids[:2] {
		b.publish(nats.Header{"Nats-Msg-Id": {id}})
	}
	b.exec(firstAdvance, first, ids[0])

	requireEnd(t, testenv.StartRelay(t, b.with()), 1, "outbox_relay_batches", "outbox-relay migrate")
	config, err := pgx.ParseConfig(b.url)
	b.must(err)
	b.must(migrations.Up(t.Context(), config, migrations.Target{Schema: "public", Table: "events", Publication: "outbox_relay"}, slog.New(slog.DiscardHandler)))
	b.grant()
	r := b.streaming()
	b.requireStatus("published", ids)
	failed := b.reject(3)
	b.requireStatus("failed", failed)
	b.mend()
	b.exec(`select outbox_retry_all()`)
	ids = append(ids, failed...)
	b.requireStatus("published", ids)
	requireLeaves(t, r)
	b.requireStream(ids)
	if b.count(firstRead) != 1 {
		t.Fatal("the release before could not go on from the checkpoint")
	}

	// It does, and the relay takes it up again.
	ids = append(ids, b.insert(1)...)
	b.publish(nats.Header{"Nats-Msg-Id": {ids[len(ids)-1]}})
	b.exec(firstAdvance, b.text(`select pg_current_wal_lsn()::text`), ids[len(ids)-1])
	r = b.streaming()
	ids = append(ids, b.insert(2)...)
	b.requireStream(ids)
	b.requireStatus("published", ids)

	// What the one before must not take up says so by its format.
	failed = b.reject(1)
	b.requireStatus("failed", failed)
	b.mend()
	announcing := b.barred("outbox_relay_batches")
	b.exec(`select outbox_retry_all()`)
	b.awaitBarred("outbox_relay_batches")
	recording := b.barred("events")
	announcing()
	b.awaitBarred("events")
	if n := b.count(`select format from outbox_relay_checkpoints`); n != 2 {
		t.Fatalf("format %d while rows are published from the table", n)
	}
	recording()
	b.requireStatus("published", failed)
	requireLeaves(t, r)
	if b.count(firstRead) != 1 {
		t.Fatal("the release before could not go on from the checkpoint")
	}
	b.exec(`update outbox_relay_checkpoints set format = 3`)
	requireEnd(t, b.start(), 1, "its format is 3", "run the release that wrote it")
}
