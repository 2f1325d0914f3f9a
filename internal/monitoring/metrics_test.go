package monitoring

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"outbox-relay/internal/testenv"
)

// elsewhere are metrics that count what this relay is spared, and the tests of
// packages relay and ops that see them move.
var elsewhere = map[string]string{
	"outbox_relay_heals_total":              "TestMetricsOfLostSlot",
	"outbox_relay_phantom_events_total":     "TestFailoverThatLosesTransactions",
	"outbox_relay_broker_forgot_total":      "TestBrokerForgetsWhatTheSlotStillHas",
	"outbox_relay_rows_removed_total":       "TestRetention",
	"outbox_relay_partitions_dropped_total": "TestOldPartitionsAreDropped",
	"outbox_relay_automatic_retries_total":  "TestAutomaticRetries",
	"outbox_relay_backfill_rows_left":       "TestBackfillProgress",
	"outbox_relay_slot_lag_seconds":         "TestVitals",
	"outbox_relay_trouble":                  "TestSlowRecordIsToldBeforeItIsAStall",
	"outbox_relay_record_seconds":           "TestSlowRecordIsToldBeforeItIsAStall",
	"outbox_relay_stalled":                  "TestRestartThatDoesNotHelpIsNotRepeated",
}

// live takes the relay through what its metrics tell of, and sees them tell it.
func (o *outbox) live() {
	o.Helper()
	o.await(`outbox_relay_backfill_rows`)
	o.await(`outbox_relay_events_backfilled_total`)

	first := o.insert("order", 5)
	o.insert("invoice", 5)
	o.awaitStatus(first, "published")
	o.await(`outbox_relay_events_published_total{aggregate_type="order"}`)
	o.await(`outbox_relay_events_published_bytes_total{aggregate_type="invoice"}`)

	o.parkAndRetry()
	o.ask(`{"replay": "again", "ids": ["` + first + `"]}`)
	o.await(`outbox_relay_events_replayed_total`)
	o.ask(`no request`)
	o.await(`outbox_relay_requests_unmatched_total`)
	o.exec(`begin; alter table events disable trigger on_events_create;
		insert into events (id, aggregate_type, event_type, payload, status, created_at) values ('ignored', 'order', 'created', '1', 'published', now());
		alter table events enable trigger on_events_create; commit`)
	o.await(`outbox_relay_inserts_ignored_total`)

	o.stall()
	o.loseAnAck()
	o.exec(`select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = split_part(current_database(), ' ', 1)`)
	o.await(`outbox_relay_sessions_lost_total`)
	o.awaitStatus(o.insert("order", 1), "published")

	must(o, o.nc.PublishMsg(&nats.Msg{Subject: "events.order.foreign", Data: []byte("1")}))
	must(o, o.nc.Flush())
	o.insert("order", 1)
	o.await(`outbox_relay_foreign_messages_total`)
	o.await(`outbox_relay_resyncs_total{reason="out_of_sequence"}`)
	o.awaitStatus(o.insert("order", 1), "published")
}

// parkAndRetry has an event that no message can carry, and mends it.
func (o *outbox) parkAndRetry() {
	o.Helper()
	var id string
	must(o, o.sql.QueryRow(o.Context(), `insert into events (aggregate_type, event_type, payload, headers)
		values ('order', 'rejected', '{}', '{"content-type": "no"}') returning id`).Scan(&id))
	o.awaitStatus(id, "failed")
	o.await(`outbox_relay_events_parked_total{aggregate_type="order"}`)
	o.exec(`update events set headers = null where id = $1`, id)
	o.exec(`select outbox_retry($1)`, id)
	o.await(`outbox_relay_events_retried_total{aggregate_type="order"}`)
}

// ask emits a request to publish rows.
func (o *outbox) ask(request string) {
	o.Helper()
	o.exec(`select outbox_relay_ask('events', $1)`, request)
}

// stall holds NATS's answers back, and meanwhile locks the row that waits for one.
func (o *outbox) stall() {
	o.Helper()
	o.link.StallDirection(testenv.Downstream, true)
	id := o.insert("order", 1)
	for _, gauge := range []string{"inflight_events", "inflight_bytes", "unrecorded_events"} {
		o.await(`outbox_relay_` + gauge)
	}
	o.exec(`begin`)
	o.exec(`select from events where id = $1 for update`, id)
	o.link.StallDirection(testenv.Downstream, false)
	o.await(`outbox_relay_rows_locked_total`)
	o.await(`outbox_relay_rows_waiting`)
	o.exec(`commit`)
	o.awaitStatus(id, "published")
}

// loseAnAck cuts the link to NATS once a message is stored whose ack is not here.
func (o *outbox) loseAnAck() {
	o.Helper()
	o.link.StallDirection(testenv.Downstream, true)
	before := o.last()
	id := o.insert("order", 1)
	testenv.Eventually(o, "the message stored", func() bool { return o.last() > before })
	o.link.Cut() // first: what is held back is forwarded when the stall ends
	o.link.StallDirection(testenv.Downstream, false)
	o.await(`outbox_relay_nats_reconnects_total`)
	o.await(`outbox_relay_resyncs_total{reason="disconnected"}`)
	o.awaitStatus(id, "published")
	o.await(`outbox_relay_events_already_stored_total{aggregate_type="order"}`)
}

// requireMetrics holds what the relay exports in the end against what it lived
// through: each metric is above 0 here, or a test elsewhere sees it so.
func (o *outbox) requireMetrics() {
	o.Helper()
	scrape := o.scrape()
	for _, match := range regexp.MustCompile(`(?m)^# TYPE (outbox_relay_\w+) (\w+)$`).FindAllStringSubmatch(scrape, -1) {
		name := match[1]
		if match[2] == "histogram" {
			name += "_count"
		}
		if samples(o, scrape)[name] <= 0 && elsewhere[name] == "" && !slices.Contains(atRest, name) {
			o.Errorf("%s is not above 0", name)
		}
	}
	for _, want := range exported {
		if !strings.Contains(scrape, "\n"+want) {
			o.Errorf("there is no %s", want)
		}
	}
}

// atRest are gauges that were seen above 0 and are 0 again.
var atRest = []string{"outbox_relay_inflight_events", "outbox_relay_inflight_bytes", "outbox_relay_unrecorded_events", "outbox_relay_rows_waiting"}

// exported are the beginnings of lines that no step of live looks for.
var exported = []string{
	`outbox_relay_state{state="streaming"} 1`, `outbox_relay_build_info{goversion="go1.`, `outbox_relay_outbox_info{after_publish="mark",slot="`,
	`outbox_relay_slot_wal_status{status="reserved"} 1`, `outbox_relay_slot_wal_status{status="lost"} 0`,
	`outbox_relay_slot_lag_bytes `, `outbox_relay_slot_lag_seconds `, `outbox_relay_slot_retained_bytes `, `outbox_relay_slot_safe_wal_bytes `,
	`outbox_relay_checkpoint_timestamp_seconds `, `outbox_relay_inflight_events_limit 8192`, `outbox_relay_inflight_bytes_limit 6.7108864e+07`,
	`outbox_relay_resyncs_total{reason="refused"} 0`, `outbox_relay_events_parked_total{aggregate_type="other"} 0`,
	`outbox_relay_publish_duration_seconds_count `, `outbox_relay_commit_to_ack_seconds_count `, `outbox_relay_events_recorded_total `,
	`outbox_relay_received_lsn_bytes `, `outbox_relay_confirmed_lsn_bytes `,
}

// promtool check metrics knows Prometheus's conventions.
func (o *outbox) checkConventions() {
	o.Helper()
	check := exec.Command(program(o.T, "promtool"), "check", "metrics")
	check.Stdin = strings.NewReader(o.scrape())
	if out, err := check.CombinedOutput(); err != nil {
		o.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// Every test that elsewhere names is there.
func TestElsewhere(t *testing.T) {
	files, err := filepath.Glob("../../*/*_test.go")
	must(t, err)
	var tests strings.Builder
	for _, file := range files {
		tests.WriteString(read(t, file))
	}
	for name, test := range elsewhere {
		if !strings.Contains(tests.String(), "\nfunc "+test+"(t *testing.T)") {
			t.Errorf("%s: there is no test %s", name, test)
		}
	}
}
