package relay

import (
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	maxTypes     = 100 // aggregate types that are counted each
	maxTypeBytes = 100 // of one in a label
	otherTypes   = "other"
)

// typeCounters counts the events of one aggregate type.
type typeCounters struct {
	published, bytes, parked, retried, alreadyStored prometheus.Counter
}

// byType has counters for the first aggregate types that come, and one for all
// others together. Safe for concurrent use; to look a type up takes no lock and
// allocates nothing.
type byType struct {
	published, bytes, parked, retried, alreadyStored *prometheus.CounterVec

	mu    sync.Mutex // of whoever adds a type
	known atomic.Pointer[map[string]*typeCounters]
	other *typeCounters
}

func newByType(registry prometheus.Registerer) *byType {
	vector := func(name, help string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help}, []string{"aggregate_type"})
		registry.MustRegister(v)
		return v
	}
	b := &byType{
		published:     vector("events_published_total", "Events that the stream acknowledged."),
		bytes:         vector("events_published_bytes_total", "Bytes of these events, payload and columns."),
		parked:        vector("events_parked_total", "Events that can never be stored, recorded as failed."),
		retried:       vector("events_retried_total", "Events that failed, and are stored since they were asked for again."),
		alreadyStored: vector("events_already_stored_total", "Events that were found in the stream and not sent again."),
	}
	b.known.Store(&map[string]*typeCounters{})
	b.other = b.counters(otherTypes)
	return b
}

// of returns the counters of an aggregate type.
func (b *byType) of(aggregateType []byte) *typeCounters {
	known := *b.known.Load()
	if c := known[string(aggregateType)]; c != nil {
		return c
	}
	if len(known) >= maxTypes || len(aggregateType) == 0 {
		return b.other
	}
	return b.add(string(aggregateType))
}

func (b *byType) add(aggregateType string) *typeCounters {
	b.mu.Lock()
	defer b.mu.Unlock()
	known := maps.Clone(*b.known.Load())
	if c := known[aggregateType]; c != nil {
		return c
	}
	if len(known) >= maxTypes {
		return b.other
	}
	c := b.counters(label(aggregateType))
	known[aggregateType] = c
	b.known.Store(&known)
	return c
}

func (b *byType) counters(label string) *typeCounters {
	return &typeCounters{
		published: b.published.WithLabelValues(label), bytes: b.bytes.WithLabelValues(label), parked: b.parked.WithLabelValues(label),
		retried: b.retried.WithLabelValues(label), alreadyStored: b.alreadyStored.WithLabelValues(label),
	}
}

// label makes a value that Prometheus takes: long ones are cut. A database whose
// encoding is SQL_ASCII can hold what is not UTF-8.
func label(aggregateType string) string {
	if len(aggregateType) > maxTypeBytes {
		end := maxTypeBytes
		for end > 0 && !utf8.RuneStart(aggregateType[end]) {
			end--
		}
		aggregateType = aggregateType[:end] + "…"
	}
	return strings.ToValidUTF8(aggregateType, "\uFFFD")
}
