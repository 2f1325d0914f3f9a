package ops_test

import (
	"encoding/json"
	"slices"
	"testing"

	"outbox-relay/internal/testenv"
	"outbox-relay/migrations"
	"outbox-relay/ops"
	"outbox-relay/relay"
	"outbox-relay/replication"
	"outbox-relay/sink"
)

// doctor is one that examines the desk, with a configuration of its own.
func (d *desk) doctor(changes ...func(*relay.Config)) ops.Doctor {
	table := d.admin.Table
	config := relay.Config{
		Postgres: d.admin.Postgres, Table: table, Backfill: true,
		Sink: func(system replication.System) sink.Config {
			c := d.admin.Sink
			c.Stream = sink.StreamConfig{Name: "EVENTS", Create: true, Subjects: "events.*.*", Replicas: 1, SystemID: system.ID, Slot: table.Slot}
			return c
		},
	}
	for _, change := range changes {
		change(&config)
	}
	return ops.Doctor{Config: config, Out: &d.out,
		Migrate: migrations.Target{Schema: config.Table.Schema, Table: config.Table.Name, Publication: config.Table.Publication}}
}

// diagnose runs the doctor, and returns its lines by group and name.
func (d *desk) diagnose(doctor ops.Doctor) map[string]ops.Check {
	d.Helper()
	d.out.take()
	err := doctor.Run(d.Context(), true)
	var diagnosis ops.Diagnosis
	d.must(json.Unmarshal([]byte(d.out.take()), &diagnosis))
	if (err != nil) != (diagnosis.Faults > 0) {
		d.Fatalf("%d faults, and the error is %v", diagnosis.Faults, err)
	}
	lines := map[string]ops.Check{}
	for _, c := range diagnosis.Checks {
		lines[c.Group+"."+c.Name] = c
	}
	if len(lines) != len(diagnosis.Checks) {
		d.Fatalf("a check has two lines: %+v", diagnosis.Checks)
	}
	return lines
}

// requireAll requires that no line but those named is other than ok.
func requireAll(d *desk, lines map[string]ops.Check, but ...string) {
	d.Helper()
	for name, c := range lines {
		if c.State != "ok" && !slices.Contains(but, name) {
			d.Errorf("%s is %s: %s", name, c.State, c.Found)
		}
	}
}

// usual are warnings of a test's servers.
var usual = []string{"postgres.slot_limits", "nats.stream_durability"}

// Before the first run, and beside a relay that runs.
func TestDoctorFindsNothingWrong(t *testing.T) {
	t.Parallel()
	d := setup(t)
	lines := d.diagnose(d.doctor())
	requireAll(d, lines, slices.Concat(usual, []string{"postgres.slot_wal", "postgres.slot_reader", "postgres.slot_failover"}, streamLines)...)
	r := d.relay()
	d.insert(10, "order", "placed")
	testenv.Eventually(d, "10 rows published", func() bool {
		return ask[int](d, `select count(*) from events where status = 'published' and aggregate_type <> 'history'`) == 10
	})
	lines = d.diagnose(d.doctor())
	requireAll(d, lines, usual...)
	r.Terminate()
}

var streamLines = []string{"nats.stream_kind", "nats.stream_subjects", "nats.stream_owner", "nats.stream_retention", "nats.stream_limits",
	"nats.stream_message_size", "nats.duplicate_window", "nats.may_publish", "nats.may_read", "nats.stream_checkpoint"}
