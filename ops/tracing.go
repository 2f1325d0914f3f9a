package ops

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"outbox-relay/internal/repeat"
	"outbox-relay/relay"
)

// Tracing makes one span of each event whose row carries a traceparent, from its
// commit to its ack, and exports them by OTLP over HTTP. It never holds the relay
// up: spans that can't be exported as fast as they come are dropped.
type Tracing struct {
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
	name     string // of the spans
	template string // of the subject
}

// flushing is how long Stop waits for the last spans.
const flushing = 2 * time.Second

// StartTracing starts what the standard OTEL_ variables ask for; nil: nothing.
// ErrUsage where they ask for what there is not. template is OUTBOX_SUBJECT.
func StartTracing(ctx context.Context, version, template string, log *slog.Logger) (*Tracing, error) {
	if wanted, err := tracingWanted(); err != nil || !wanted {
		return nil, err
	}
	otel.SetErrorHandler(exportErrors{repeat.New(log)})
	about, err := resource.New(ctx, resource.WithTelemetrySDK(),
		resource.WithAttributes(semconv.ServiceName("outbox-relay"), semconv.ServiceVersion(version)), resource.WithFromEnv())
	if err != nil {
		return nil, fmt.Errorf("%w: OTEL_RESOURCE_ATTRIBUTES: %w", ErrUsage, err)
	}
	exporter, err := otlptracehttp.New(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: OTEL_EXPORTER_OTLP_: %w", ErrUsage, err)
	}
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(about))
	log.Info("tracing", "exporter", "otlp")
	return &Tracing{provider: provider, name: "publish " + template, template: template,
		tracer: provider.Tracer("outbox-relay", trace.WithInstrumentationVersion(version), trace.WithSchemaURL(semconv.SchemaURL))}, nil
}

// tracingWanted reads the variables that the SDK leaves to the application.
// Source: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
// Other than there, no exporter is the default: one is used when it is named, or an
// endpoint is.
func tracingWanted() (bool, error) {
	endpoint := os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") + os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT")
	exporter := os.Getenv("OTEL_TRACES_EXPORTER")
	protocol := cmp.Or(os.Getenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"), os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL"), "http/protobuf")
	switch {
	case strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true"), exporter == "none", exporter == "" && endpoint == "":
		return false, nil
	case exporter != "" && exporter != "otlp":
		return false, fmt.Errorf("%w: OTEL_TRACES_EXPORTER is %q: it can be otlp or none", ErrUsage, exporter)
	case protocol != "http/protobuf":
		return false, fmt.Errorf("%w: OTEL_EXPORTER_OTLP_PROTOCOL is %q: it can be http/protobuf, to port 4318 of most collectors; "+
			"or unset it, or set OTEL_TRACES_EXPORTER=none", ErrUsage, protocol)
	}
	return true, nil
}

// Done implements relay.Tracer.
func (t *Tracing) Done(done relay.Done) {
	var headers propagation.MapCarrier
	if json.Unmarshal(done.Event.Headers, &headers) != nil {
		return // a header is no string, so the event is parked for that
	}
	ctx := propagation.TraceContext{}.Extract(context.Background(), headers)
	if !trace.SpanContextFromContext(ctx).IsValid() {
		return
	}
	_, span := t.tracer.Start(ctx, t.name, trace.WithSpanKind(trace.SpanKindProducer), trace.WithTimestamp(began(done)))
	if span.IsRecording() {
		t.describe(span, done)
	}
	span.End(trace.WithTimestamp(done.At))
}

// began is the commit, by Postgres's clock. A row that is published from the table
// has none that is known.
func began(done relay.Done) time.Time {
	switch {
	case !done.Event.Commit.IsZero():
		return done.Event.Commit
	case !done.Sent.IsZero():
		return done.Sent
	}
	return done.At
}

func (t *Tracing) describe(span trace.Span, done relay.Done) {
	span.SetAttributes(
		semconv.MessagingSystemKey.String("nats"),
		semconv.MessagingOperationName("publish"), semconv.MessagingOperationTypeSend,
		semconv.MessagingDestinationName(done.Subject), semconv.MessagingDestinationTemplate(t.template),
		semconv.MessagingMessageID(done.Event.MessageID()), semconv.MessagingMessageBodySize(len(done.Event.Payload)),
		attribute.String("outbox_relay.stream", done.Stream),
		attribute.String("outbox_relay.position", done.Event.Position.String()),
	)
	if !done.Sent.IsZero() {
		span.AddEvent("sent", trace.WithTimestamp(done.Sent))
	}
	if done.Reason != "" {
		span.SetAttributes(semconv.ErrorTypeKey.String("rejected"))
		span.SetStatus(codes.Error, done.Reason)
		return
	}
	span.SetAttributes(attribute.Int64("outbox_relay.sequence", int64(done.Sequence)))
}

// Stop exports what is left, as far as that goes at once.
func (t *Tracing) Stop() {
	ctx, cancel := context.WithTimeout(context.Background(), flushing)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		otel.Handle(err)
	}
}

// exportErrors logs the SDK's errors: a collector that is away fails every batch.
type exportErrors struct{ cause *repeat.Cause }

func (e exportErrors) Handle(err error) {
	e.cause.Again("spans are not exported", "error", err, "remedy", "check OTEL_EXPORTER_OTLP_ENDPOINT and the collector")
	e.cause.Lapse("spans are exported again")
}
