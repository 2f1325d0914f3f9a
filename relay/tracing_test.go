package relay_test

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	traces "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"outbox-relay/internal/testenv"
)

// receiver is a collector: it takes spans by OTLP over HTTP.
type receiver struct {
	*httptest.Server
	mu       sync.Mutex
	spans    []*traces.Span
	resource map[string]string
	hang     chan struct{} // not nil: no request is answered before it is closed
	requests int
}

func newReceiver(t *testing.T, hang chan struct{}) *receiver {
	r := &receiver{hang: hang}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		r.mu.Lock()
		r.requests++
		r.mu.Unlock()
		if hang != nil {
			<-hang
		}
		if err := r.take(request); err != nil {
			t.Error(err)
		}
		w.Header().Set("Content-Type", "application/x-protobuf")
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *receiver) take(request *http.Request) error {
	body, err := io.ReadAll(request.Body)
	if err != nil {
		return err
	}
	if request.URL.Path != "/v1/traces" || request.Header.Get("Content-Type") != "application/x-protobuf" {
		return fmt.Errorf("%s %s %s", request.Method, request.URL, request.Header)
	}
	var export collector.ExportTraceServiceRequest
	if err := proto.Unmarshal(body, &export); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, of := range export.ResourceSpans {
		r.resource = attributes(of.Resource.Attributes)
		for _, scope := range of.ScopeSpans {
			r.spans = append(r.spans, scope.Spans...)
		}
	}
	return nil
}

func (r *receiver) asked() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.requests
}

// byID waits for n spans, and returns them by their messages' ids.
func (r *receiver) byID(t *testing.T, n int) map[string]*traces.Span {
	t.Helper()
	var spans []*traces.Span
	testenv.Eventually(t, fmt.Sprintf("%d spans", n), func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		spans = slices.Clone(r.spans)
		return len(spans) >= n
	})
	if len(spans) != n {
		t.Fatalf("%d spans, want %d: %v", len(spans), n, spans)
	}
	byID := map[string]*traces.Span{}
	for _, span := range spans {
		byID[attributes(span.Attributes)["messaging.message.id"]] = span
	}
	return byID
}

func attributes(list []*common.KeyValue) map[string]string {
	m := map[string]string{}
	for _, attribute := range list {
		m[attribute.Key] = strings.Trim(strings.TrimPrefix(attribute.Value.String(), "string_value:"), `"`)
		if i, ok := attribute.Value.Value.(*common.AnyValue_IntValue); ok {
			m[attribute.Key] = fmt.Sprint(i.IntValue)
		}
	}
	return m
}

// traced inserts an event with these headers and returns its id.
func (b *bundle) traced(headers, payload string) (id string) {
	b.Helper()
	b.must(b.sql.QueryRow(b.Context(), `insert into events (aggregate_type, event_type, payload, headers)
		values ('order', 'really placed', to_jsonb($2::text), $1) returning id`, headers, payload).Scan(&id))
	return id
}

const (
	sampledParent   = `{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "vendor=1"}`
	unsampledParent = `{"traceparent": "00-0af7651916cd43dd8448eb211c80319d-b7ad6b7169203331-00"}`
)

// One span an event whose row has a traceparent that is sampled: a child of it,
// from the commit to the ack. The message's own traceparent is the row's.
func TestTracing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	receiver := newReceiver(t, nil)
	maps.Copy(b.env, map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.URL, "OTEL_SERVICE_NAME": "shop-outbox", "OTEL_BSP_SCHEDULE_DELAY": "50"})
	r := b.streaming()
	before := time.Now()
	stored := b.traced(sampledParent, "x")
	plain := b.insert(1)[0]
	others := []string{b.traced(unsampledParent, "x"), b.traced(`{"traceparent": "no"}`, "x"), b.traced(`{"x": "\"traceparent\""}`, "x")}
	large := b.traced(sampledParent, strings.Repeat("x", 2_000_000))
	last := b.traced(sampledParent, "x")
	messages := b.requireStream(append(append([]string{stored, plain}, others...), last))
	if got := messages[0].Header.Get("traceparent"); !strings.Contains(sampledParent, got) || got == "" {
		t.Errorf("the message's traceparent is %q", got)
	}

	spans := receiver.byID(t, 3)
	span := spans[stored]
	if span == nil || spans[large] == nil || spans[last] == nil {
		t.Fatalf("spans of %v", spans)
	}
	got := fmt.Sprintf("%s %x %x %s %s %s", span.Name, span.TraceId, span.ParentSpanId, span.TraceState, span.Kind, span.Status.GetCode())
	const want = "publish events.{aggregate_type}.{event_type} 0af7651916cd43dd8448eb211c80319c b7ad6b7169203331 vendor=1 SPAN_KIND_PRODUCER STATUS_CODE_UNSET"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	attributes := attributes(span.Attributes)
	for key, want := range map[string]string{"messaging.system": "nats", "messaging.operation.name": "publish", "messaging.operation.type": "send",
		"messaging.destination.name": "events.order.really=20placed", "messaging.destination.template": "events.{aggregate_type}.{event_type}",
		"messaging.message.body.size": "3", "outbox_relay.stream": "EVENTS", "outbox_relay.sequence": "1"} {
		if attributes[key] != want {
			t.Errorf("%s is %q, want %q", key, attributes[key], want)
		}
	}
	begin, end := time.Unix(0, int64(span.StartTimeUnixNano)), time.Unix(0, int64(span.EndTimeUnixNano))
	if position := messages[0].Header.Get("Outbox-Position"); !strings.HasSuffix(position, attributes["outbox_relay.position"]) {
		t.Errorf("position is %s, and the message's is %s", attributes["outbox_relay.position"], position)
	}
	if begin.Before(before) || !end.After(begin) || len(span.Events) != 1 || span.Events[0].Name != "sent" {
		t.Errorf("from %s to %s, inserted after %s, with the events %v", begin, end, before, span.Events)
	}
	if status := spans[large].Status; status.GetCode() != traces.Status_STATUS_CODE_ERROR || !strings.Contains(status.GetMessage(), "bytes") {
		t.Errorf("the parked event's status is %v", status)
	}
	if receiver.resource["service.name"] != "shop-outbox" || receiver.resource["service.version"] == "" {
		t.Errorf("resource %v", receiver.resource)
	}

	unsent := b.traced(sampledParent, "x") // the last spans are exported at the end
	b.requireStream(append(append([]string{stored, plain}, others...), last, unsent))
	if code := r.Terminate(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	receiver.byID(t, 4)
}

// A collector that takes spans and never answers holds up neither the events nor
// the end of the relay.
func TestTracingNeverBlocks(t *testing.T) {
	t.Parallel()
	b := setup(t)
	answer := make(chan struct{})
	receiver := newReceiver(t, answer)
	t.Cleanup(func() { close(answer) }) // before the receiver is closed
	maps.Copy(b.env, map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.URL, "OTEL_BSP_MAX_QUEUE_SIZE": "64", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "32"})
	r := b.streaming()
	b.exec(`insert into events (aggregate_type, event_type, payload, headers) select 'order', 'placed', '1', $1 from generate_series(1, 20000)`, sampledParent)
	testenv.Eventually(t, "all to be stored, and the collector to be asked", func() bool { return b.last() == 20000 && receiver.asked() > 0 })
	if code := r.Terminate(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if !strings.Contains(r.Logs(), "spans are not exported") {
		t.Errorf("the log does not tell:\n%s", r.Logs())
	}
}

// Off by default, and by the standard ways; what the relay can't do is a fault.
func TestTracingVariables(t *testing.T) {
	t.Parallel()
	b := setup(t)
	receiver := newReceiver(t, nil)
	for name, c := range map[string]struct {
		env   map[string]string
		fault string
	}{
		"another exporter": {map[string]string{"OTEL_TRACES_EXPORTER": "zipkin"}, `OTEL_TRACES_EXPORTER is "zipkin": it can be otlp or none`},
		"another protocol": {map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, `OTEL_EXPORTER_OTLP_PROTOCOL is "grpc"`},
		"resource":         {map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.URL, "OTEL_RESOURCE_ATTRIBUTES": "novalue"}, "OTEL_RESOURCE_ATTRIBUTES"},
	} {
		env := maps.Clone(b.env)
		maps.Copy(env, c.env)
		r := testenv.StartRelay(t, env)
		if code := r.Wait(20 * time.Second); code != 2 || !strings.Contains(r.Logs(), c.fault) {
			t.Errorf("%s: exit code %d, and not %q:\n%s", name, code, c.fault, r.Logs())
		}
	}
	var ids []string
	for _, off := range []map[string]string{
		nil,
		{"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.URL, "OTEL_TRACES_EXPORTER": "none"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.URL, "OTEL_SDK_DISABLED": "true"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.URL, "OTEL_TRACES_SAMPLER": "always_off"},
	} {
		env := maps.Clone(b.env)
		maps.Copy(env, off)
		r := testenv.StartRelay(t, env)
		r.WaitLog("msg=streaming")
		ids = append(ids, b.traced(sampledParent, "x"))
		b.requireStream(ids)
		if code := r.Terminate(); code != 0 {
			t.Errorf("%v: exit code %d", off, code)
		}
	}
	if n := receiver.asked(); n != 0 {
		t.Errorf("the collector was asked %d times", n)
	}
}
