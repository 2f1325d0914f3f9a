package config

import (
	"fmt"
	"os"
	"reflect"
	"strings"

	"github.com/kelseyhightower/envconfig"
)

// environment is what envconfig fills: texts only, for it stops at the first
// value it cannot convert, and prints it. The names come from the fields by
// split_words; the envconfig tag would also read the name without the prefix,
// and NATS_URL, LOG_LEVEL or SOURCE may be somebody else's.
//
// needed: one must be given; empty: what an empty value means in place of the
// default.
type environment struct {
	PostgresURL           text `split_words:"true" needed:"true" desc:"URL or DSN of the database; several hosts allowed"`
	PostgresURLFile       text `split_words:"true" desc:"file that holds it instead, read again at each reconnect"`
	Table                 text `split_words:"true" default:"public.events" desc:"the outbox table"`
	ColumnID              text `split_words:"true" desc:"column of the id in an outbox of your own; empty: id"`
	ColumnAggregateType   text `split_words:"true" desc:"column of the aggregate type in an outbox of your own; empty: aggregate_type"`
	ColumnAggregateID     text `split_words:"true" desc:"column of the aggregate id in an outbox of your own; empty: aggregate_id"`
	ColumnEventType       text `split_words:"true" desc:"column of the event type in an outbox of your own; empty: event_type"`
	ColumnPayload         text `split_words:"true" desc:"column of the payload in an outbox of your own; empty: payload"`
	ColumnHeaders         text `split_words:"true" desc:"column of the headers in an outbox of your own; empty: headers"`
	ColumnCreatedAt       text `split_words:"true" desc:"column of the time in an outbox of your own; empty: created_at"`
	Slot                  text `split_words:"true" default:"outbox_relay" desc:"the replication slot, made by the first run"`
	Publication           text `split_words:"true" default:"outbox_relay" desc:"the publication, made by migrate"`
	NatsURL               text `split_words:"true" default:"nats://127.0.0.1:4222" desc:"comma-separated NATS servers"`
	NatsCreds             text `split_words:"true" desc:"path of a NATS credentials file"`
	NatsCA                text `split_words:"true" desc:"path of the CA certificates to trust"`
	NatsCert              text `split_words:"true" desc:"path of the client certificate"`
	NatsKey               text `split_words:"true" desc:"path of the client certificate's key"`
	NatsNkey              text `split_words:"true" desc:"seed of a NATS user nkey"`
	NatsNkeyFile          text `split_words:"true" desc:"file that holds it instead, read again at each reconnect"`
	NatsUser              text `split_words:"true" desc:"NATS user"`
	NatsPassword          text `split_words:"true" desc:"password of the NATS user"`
	NatsPasswordFile      text `split_words:"true" desc:"file that holds it instead, read again at each reconnect"`
	NatsToken             text `split_words:"true" desc:"NATS token"`
	NatsTokenFile         text `split_words:"true" desc:"file that holds it instead, read again at each reconnect"`
	NatsTLSFirst          text `split_words:"true" default:"false" desc:"TLS handshake before the server's INFO"`
	NatsDomain            text `split_words:"true" desc:"JetStream domain"`
	NatsInboxPrefix       text `split_words:"true" default:"_INBOX_outbox" desc:"inbox prefix, for restricted accounts"`
	Stream                text `split_words:"true" default:"EVENTS" desc:"the stream"`
	StreamCreate          text `split_words:"true" default:"true" desc:"create the stream when it is missing"`
	StreamReplicas        text `split_words:"true" default:"1" desc:"replicas, 1 to 5; used at creation only"`
	StreamMaxAge          text `split_words:"true" default:"0" desc:"age limit, 0 for none; used at creation only"`
	StreamDuplicateWindow text `split_words:"true" default:"2m" desc:"duplicate window; used at creation only"`
	Subject               text `split_words:"true" default:"events.{aggregate_type}.{event_type}" desc:"subject; the first token literal, the others literal or {column}"`
	Headers               text `split_words:"true" default:"cloudevents" desc:"cloudevents or minimal"`
	Source                text `split_words:"true" default:"/{database}/{slot}" desc:"the CloudEvents source"`
	AfterPublish          text `split_words:"true" default:"mark" desc:"mark the row published, delete it, or keep it untouched"`
	Retention             text `split_words:"true" default:"0" desc:"remove published rows older than this, in small batches; 0: off"`
	OnReject              text `split_words:"true" default:"park" desc:"park an event that JetStream can never take, or halt before it"`
	RetryAttempts         text `split_words:"true" default:"0" desc:"retry a failed event that can be sent by now so many times, at most 100; 0: off"`
	RetryBackoff          text `split_words:"true" default:"1m" desc:"from a failure to its retry, doubled by each retry; at least 1s"`
	Backfill              text `split_words:"true" default:"true" desc:"publish rows that were pending before the slot was made"`
	MaxInflight           text `split_words:"true" default:"8192" desc:"messages sent and unacknowledged, 1 to 65536"`
	MaxInflightBytes      text `split_words:"true" default:"64MiB" desc:"the same in bytes, at least 1MiB"`
	ConfirmDelay          text `split_words:"true" default:"0" desc:"hold the slot back this long behind the checkpoint: longer than the broker's sync interval"`
	HTTPAddr              text `split_words:"true" default:"127.0.0.1:8080" empty:"off" desc:"address of status page, metrics and health; empty: off"`
	HTTPToken             text `split_words:"true" desc:"token that the status page asks for before it changes anything; unset: it changes nothing"`
	HTTPTokenFile         text `split_words:"true" desc:"file that holds it instead, read again at each use"`
	HTTPDebug             text `split_words:"true" default:"false" desc:"serve profiles under /debug/pprof/, too"`
	LogLevel              text `split_words:"true" default:"info" desc:"debug, info, warn or error"`
	LogFormat             text `split_words:"true" default:"text" desc:"text or json"`
	ShutdownGrace         text `split_words:"true" default:"10s" desc:"time to stop, of which three quarters are to drain"`
}

// text is a value as it was given. Its Decode never fails.
type text struct {
	name      string // of the variable, in full
	value     string
	mandatory bool   // an empty value is a fault
	fallback  string // the default
}

func (t *text) Decode(value string) error {
	t.value = value
	return nil
}

func (t text) given() bool { return t.value != "" }

// name tells each text its variable, as envconfig sees it.
func (e *environment) name() []Variable {
	variables, fields := describe()
	for i, field := range fields {
		t := reflect.ValueOf(e).Elem().FieldByIndex(field.Index).Addr().Interface().(*text)
		t.name = variables[i].Name
		t.fallback = field.Tag.Get("default")
		t.mandatory = field.Tag.Get("needed") != "" || t.fallback != "" && field.Tag.Get("empty") == ""
	}
	return variables
}

// describe lists the variables, named by envconfig itself, and their fields.
func describe() ([]Variable, []reflect.StructField) {
	var names strings.Builder
	const format = `{{range .}}{{.Name}} {{.Key}} {{end}}`
	if err := envconfig.Usagef(prefix, new(environment), &names, format); err != nil {
		panic("config: " + err.Error()) // the format above is wrong
	}
	var variables []Variable
	var fields []reflect.StructField
	words := strings.Fields(names.String())
	for i := 0; i+1 < len(words); i += 2 {
		field, _ := reflect.TypeFor[environment]().FieldByName(words[i])
		v := Variable{Name: words[i+1], Default: field.Tag.Get("default"), Meaning: field.Tag.Get("desc")}
		if field.Tag.Get("needed") != "" {
			v.Default = "required"
		}
		variables, fields = append(variables, v), append(fields, field)
	}
	return variables, fields
}

// faults are collected, never returned one by one.
type faults []error

func (f *faults) add(variable, format string, args ...any) {
	*f = append(*f, &Fault{Variable: variable, Problem: fmt.Sprintf(format, args...)})
}

// read parses a text, white space around it dropped.
func read[T any](f *faults, t text, parse func(string) (T, error)) T {
	var none T
	value := strings.TrimSpace(t.value)
	if value == "" {
		if t.mandatory {
			f.add(t.name, "is empty: set it, or unset it for the default %s", t.fallback)
		}
		return none
	}
	v, err := parse(value)
	if err != nil {
		f.add(t.name, "%s", err)
		return none
	}
	return v
}

// readPath checks that the file can be read. Its name is not printed: who
// mistakes the variable may have put the secret itself there.
func readPath(f *faults, t text) string {
	if !t.given() {
		return ""
	}
	content, err := os.ReadFile(t.value)
	switch {
	case err != nil:
		f.add(t.name, "names a file that cannot be read: %s", reason(err))
	case len(content) == 0:
		f.add(t.name, "names an empty file")
	}
	return t.value
}

// list joins names for a sentence.
func list(names []string) string {
	if len(names) == 1 {
		return names[0]
	}
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " or " + names[last]
}
