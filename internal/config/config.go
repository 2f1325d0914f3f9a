// Package config reads the relay's configuration from the environment.
//
// It reports every fault at once, each with its variable's name and what to do
// about it, and never a secret: neither a fault nor a printed Config shows one.
//
// White space around a value is dropped, except where it may belong to it: in
// NATS_USER, NATS_PASSWORD, NATS_TOKEN and in paths. A variable that is set
// but empty is a fault where it has a default, but HTTP_ADDR, which that turns
// off; elsewhere it counts as unset.
package config

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/kelseyhightower/envconfig"
)

const prefix = "OUTBOX"

// Config is the whole configuration of a relay. Every field is valid.
type Config struct {
	Postgres         Postgres
	Columns          map[string]string // the outbox's own names of columns, by their usual ones; nil: it has those
	NATS             NATS
	Stream           Stream
	Subject          Subject
	Headers          Headers
	Source           Source
	AfterPublish     AfterPublish
	Retention        time.Duration // of published rows; 0: for ever
	OnReject         OnReject
	Retry            Retry
	Backfill         bool
	MaxInflight      int   // messages sent and unacknowledged
	MaxInflightBytes int64 // the same in bytes
	ConfirmDelay     time.Duration
	HTTP             HTTP
	Log              Log
	ShutdownGrace    time.Duration
}

// Postgres says where the outbox is.
type Postgres struct {
	URL         Secret // a URL or DSN; it parsed when it was loaded
	Table       Table
	Slot        string
	Publication string
}

// NATS says how to reach the servers. At most one way to authenticate is set:
// Creds, NKey, User with Password, Token, or user information in Servers.
type NATS struct {
	Servers         Servers
	Creds           string // path
	CA, Cert, Key   string // paths; Cert and Key come together
	NKey            Secret // seed of a user nkey
	User            string
	Password, Token Secret
	TLSFirst        bool
	Domain          string
	InboxPrefix     string
}

// Stream names the stream; what follows Create is used at creation only.
type Stream struct {
	Name            string
	Create          bool
	Replicas        int
	MaxAge          time.Duration // 0: without limit
	DuplicateWindow time.Duration // 0: the server's choice
}

// Retry says how often a failed event is tried again without being asked.
type Retry struct {
	Attempts int           // 0: never
	Backoff  time.Duration // from a failure to its first retry, doubled by each
}

// HTTP says what is served, and where.
type HTTP struct {
	Addr  string // host:port; empty: off
	Token Secret // for what changes anything; not set: nothing can
	Debug bool   // profiles
}

// Log says how much is logged, and how.
type Log struct {
	Level  slog.Level
	Format LogFormat
}

// Headers is the set of headers a message gets.
type Headers string

const (
	HeadersCloudEvents Headers = "cloudevents"
	HeadersMinimal     Headers = "minimal"
)

// AfterPublish is what becomes of a row once its event is stored.
type AfterPublish string

const (
	AfterPublishMark   AfterPublish = "mark"
	AfterPublishDelete AfterPublish = "delete"
	AfterPublishKeep   AfterPublish = "keep"
)

// OnReject is what becomes of an event that JetStream can never take.
type OnReject string

const (
	OnRejectPark OnReject = "park"
	OnRejectHalt OnReject = "halt"
)

// LogFormat is a handler of slog.
type LogFormat string

const (
	LogText LogFormat = "text"
	LogJSON LogFormat = "json"
)

// Fault is one thing wrong with one variable. Load joins them with errors.Join.
type Fault struct {
	Variable string // its full name
	Problem  string // and remedy, to be read after the name
}

func (f *Fault) Error() string { return f.Variable + " " + f.Problem }

// Load reads the environment. Its error holds every fault that was found.
func Load() (Config, error) {
	var env environment
	if err := envconfig.Process(prefix, &env); err != nil {
		return Config{}, fmt.Errorf("read the environment: %w", err)
	}
	variables := env.name()
	var found faults
	cfg := env.config(&found)
	found = append(found, unknown(os.Environ(), variables)...)
	if len(found) > 0 {
		return Config{}, errors.Join(found...)
	}
	return cfg, nil
}

// config turns texts into values. The order is that of the table of variables.
func (e *environment) config(f *faults) Config {
	cfg := Config{
		Postgres: Postgres{
			URL:         readSecret(f, e.PostgresURL, e.PostgresURLFile, checkPostgresURL),
			Table:       read(f, e.Table, parseTable),
			Slot:        read(f, e.Slot, parseSlot),
			Publication: read(f, e.Publication, parsePublication),
		},
		Columns: e.columns(f),
		NATS: NATS{
			Servers:     read(f, e.NatsURL, parseServers),
			Creds:       readPath(f, e.NatsCreds),
			CA:          readPath(f, e.NatsCA),
			Cert:        readPath(f, e.NatsCert),
			Key:         readPath(f, e.NatsKey),
			NKey:        readSecret(f, e.NatsNkey, e.NatsNkeyFile, checkSeed),
			User:        e.NatsUser.value,
			Password:    readSecret(f, e.NatsPassword, e.NatsPasswordFile, nil),
			Token:       readSecret(f, e.NatsToken, e.NatsTokenFile, nil),
			TLSFirst:    read(f, e.NatsTLSFirst, parseBool),
			Domain:      read(f, e.NatsDomain, parseDomain),
			InboxPrefix: read(f, e.NatsInboxPrefix, parseInboxPrefix),
		},
		Stream: Stream{
			Name:            read(f, e.Stream, parseStream),
			Create:          read(f, e.StreamCreate, parseBool),
			Replicas:        read(f, e.StreamReplicas, between(1, 5)),
			MaxAge:          read(f, e.StreamMaxAge, parseServerDuration),
			DuplicateWindow: read(f, e.StreamDuplicateWindow, parseServerDuration),
		},
		Subject:      read(f, e.Subject, ParseSubject),
		Headers:      read(f, e.Headers, oneOf(HeadersCloudEvents, HeadersMinimal)),
		Source:       read(f, e.Source, parseSource),
		AfterPublish: read(f, e.AfterPublish, oneOf(AfterPublishMark, AfterPublishDelete, AfterPublishKeep)),
		Retention:    read(f, e.Retention, parseDuration),
		OnReject:     read(f, e.OnReject, oneOf(OnRejectPark, OnRejectHalt)),
		Retry: Retry{
			Attempts: read(f, e.RetryAttempts, between(0, 100)),
			Backoff:  read(f, e.RetryBackoff, parseBackoff),
		},
		Backfill:         read(f, e.Backfill, parseBool),
		MaxInflight:      read(f, e.MaxInflight, between(1, 65536)),
		MaxInflightBytes: read(f, e.MaxInflightBytes, parseInflightBytes),
		ConfirmDelay:     read(f, e.ConfirmDelay, parseDuration),
		HTTP: HTTP{
			Addr:  read(f, e.HTTPAddr, parseHTTPAddr),
			Token: readSecret(f, e.HTTPToken, e.HTTPTokenFile, checkHTTPToken),
			Debug: read(f, e.HTTPDebug, parseBool),
		},
		Log: Log{
			Level:  read(f, e.LogLevel, parseLevel),
			Format: read(f, e.LogFormat, oneOf(LogText, LogJSON)),
		},
		ShutdownGrace: read(f, e.ShutdownGrace, parseDuration),
	}
	e.checkNATS(f, cfg.NATS.Servers)
	e.checkStream(f, cfg.Stream)
	e.checkRetention(f, cfg)
	return cfg
}

// checkNATS looks at what was given, valid or not, so that a wrong value does
// not hide that it does not belong there.
func (e *environment) checkNATS(f *faults, servers Servers) {
	if e.NatsCert.given() != e.NatsKey.given() {
		lone, missing := e.NatsCert, e.NatsKey
		if e.NatsKey.given() {
			lone, missing = missing, lone
		}
		f.add(lone.name, "is set without %s: a client certificate needs both", missing.name)
	}
	password := e.NatsPassword.given() || e.NatsPasswordFile.given()
	if password && !e.NatsUser.given() {
		given := e.NatsPassword
		if e.NatsPasswordFile.given() {
			given = e.NatsPasswordFile
		}
		f.add(given.name, "is set without %s: name the user", e.NatsUser.name)
	}

	var methods []string
	for _, m := range []struct {
		used bool
		name string
	}{
		{servers.authenticate(), "user information in " + e.NatsURL.name},
		{e.NatsCreds.given(), e.NatsCreds.name},
		{e.NatsNkey.given() || e.NatsNkeyFile.given(), e.NatsNkey.name},
		{e.NatsUser.given() || password, e.NatsUser.name},
		{e.NatsToken.given() || e.NatsTokenFile.given(), e.NatsToken.name},
	} {
		if m.used {
			methods = append(methods, m.name)
		}
	}
	if len(methods) > 1 {
		f.add(methods[len(methods)-1], "is one way too many to authenticate at NATS: keep one of %s", list(methods))
	}
}

// checkStream refuses what the server would refuse at creation.
func (e *environment) checkStream(f *faults, s Stream) {
	if s.Create && s.MaxAge > 0 && s.DuplicateWindow > s.MaxAge {
		f.add(e.StreamDuplicateWindow.name, "is %s, longer than %s, %s: shorten it, or set it to 0 for the server's choice",
			s.DuplicateWindow, e.StreamMaxAge.name, s.MaxAge)
	}
}

// checkRetention refuses a retention that would never find a published row.
func (e *environment) checkRetention(f *faults, cfg Config) {
	if cfg.Retention > 0 && cfg.AfterPublish == AfterPublishKeep {
		f.add(e.Retention.name, "is %s, and %s=%s marks no row published: unset one of them",
			cfg.Retention, e.AfterPublish.name, AfterPublishKeep)
	}
}
