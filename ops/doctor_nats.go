package ops

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"outbox-relay/checkpoint"
	"outbox-relay/internal/fault"
	"outbox-relay/sink"
)

// Names of the checks of NATS that depend on a connection, and of those among
// them that depend on a stream.
var (
	natsChecks   = []string{"server_version", "tls", "account"}
	streamChecks = []string{"stream_kind", "stream_subjects", "stream_owner", "stream_retention", "stream_limits", "stream_message_size",
		"stream_durability", "duplicate_window", "may_publish", "may_read", "stream_checkpoint"}
)

const natsPatience = 5 * time.Second

func (e *examination) nats(ctx context.Context) {
	if !e.connectNATS(ctx) {
		e.skip("no connection to NATS", natsChecks...)
		e.skip("no connection to NATS", append([]string{"stream"}, streamChecks...)...)
		return
	}
	e.checkNATSServer()
	e.checkAccount(ctx)
	if !e.checkStream(ctx) {
		e.skip("there is no stream to look at", streamChecks...)
		return
	}
	e.checkStreamFaults()
	e.checkStreamLimits()
	e.checkPermissions(ctx)
	e.checkStreamCheckpoint(ctx)
}

func (e *examination) connectNATS(ctx context.Context) bool {
	limited, cancel := context.WithTimeout(ctx, natsPatience)
	defer cancel()
	var err error
	if e.client, err = e.NATS(limited); !e.judge("connection", err) {
		return false
	}
	e.ok("connection", "%s", e.client.Server().URL)
	return true
}

func (e *examination) checkNATSServer() {
	server := e.client.Server()
	e.ok("server_version", "%s, messages up to %s", server.Version, size(server.MaxPayload))
	address, _ := url.Parse(server.URL)
	switch {
	case server.TLS != nil:
		e.ok("tls", "%s, certificate of %s", tls.VersionName(server.TLS.Version), server.TLS.PeerCertificates[0].Subject.CommonName)
	case address != nil && isLocal(address.Hostname()):
		e.ok("tls", "none, on this machine")
	default:
		e.warn("tls", &fault.Error{What: "the connection is not encrypted", Remedy: "let OUTBOX_NATS_URL begin with tls://, and set OUTBOX_NATS_CA"})
	}
}

// checkAccount asks for limits that the relay itself need not know.
func (e *examination) checkAccount(ctx context.Context) {
	info, err := e.client.Account(ctx)
	if err != nil {
		e.skip("the limits of the account are not to be had: "+err.Error(), "account")
		return
	}
	used := func(n uint64, limit int64) string {
		if limit < 0 {
			return size(int64(n)) + " of storage used, no limit"
		}
		return fmt.Sprintf("%s of %s of storage used", size(int64(n)), size(limit))
	}
	found := used(info.Store, info.Limits.MaxStore)
	if info.Limits.MaxStreams >= 0 {
		found += fmt.Sprintf(", %d of %d streams", info.Streams, info.Limits.MaxStreams)
	}
	f := &fault.Error{What: found, Remedy: "raise the account's limits, or let streams hold less: an account that is full takes no event"}
	switch full := info.Limits.MaxStore >= 0 && int64(info.Store) >= info.Limits.MaxStore; {
	case full:
		e.add("account", stateFault, f)
	case info.Limits.MaxStore > 0 && int64(info.Store) > info.Limits.MaxStore/10*9:
		e.warn("account", f)
	default:
		e.ok("account", "%s", found)
	}
}

// checkStream reports whether there is a stream to be looked at.
func (e *examination) checkStream(ctx context.Context) bool {
	owner := e.Config.Sink(e.system).Stream
	if err := e.client.TryInfo(ctx, owner.Name); isDeniedByNATS(err) {
		e.add("stream", stateFault, e.grantNATS(err))
		return false
	}
	described, err := e.client.Describe(ctx, owner)
	known := e.standing != nil && e.standing.Checkpoint != nil && e.standing.Checkpoint.Phase == checkpoint.Streaming
	switch {
	case errors.Is(err, sink.ErrNoStream) && owner.Create && !known:
		if err := e.client.TryCreate(ctx, owner.Name); err != nil {
			e.add("stream", stateFault, e.grantNATS(err))
			return false
		}
		e.ok("stream", "%s is not there: the first run makes it", owner.Name)
		return false
	case errors.Is(err, sink.ErrNoStream):
		e.judge("stream", e.ExplainMissing(err, known))
		return false
	case !e.judge("stream", err):
		return false
	}
	e.stream = &described
	e.ok("stream", "%s, last sequence %d", described.Name, described.Last)
	return true
}

func isDeniedByNATS(err error) bool {
	var denied *sink.DeniedError
	return errors.As(err, &denied)
}

// grantNATS adds the permissions that the relay's user needs, as nats-server has
// them in its configuration.
func (e *examination) grantNATS(err error) *fault.Error {
	f := fault.Of(err)
	config := e.Config.Sink(e.system)
	api := "$JS.API"
	if config.Domain != "" {
		api = "$JS." + config.Domain + ".API"
	}
	publish := []string{config.Stream.Subjects}
	for _, request := range []string{"STREAM.INFO", "STREAM.MSG.GET", "STREAM.CREATE"} {
		if request != "STREAM.CREATE" || config.Stream.Create {
			publish = append(publish, api+"."+request+"."+config.Stream.Name)
		}
	}
	return &fault.Error{What: f.What, Cause: err, Remedy: fmt.Sprintf(`permissions of its user: { publish: { allow: ["%s"] }, subscribe: { allow: ["%s.>"] } }`,
		strings.Join(publish, `", "`), config.InboxPrefix)}
}

func (e *examination) checkStreamFaults() {
	faults, config := e.stream.Faults, e.stream.Config
	if e.judge("stream_kind", faults.Kind) {
		e.ok("stream_kind", "%s storage, and nothing that would come between the events", strings.ToLower(config.Storage.String()))
	}
	if e.judge("stream_subjects", faults.Subjects) {
		e.ok("stream_subjects", "%s", strings.Join(config.Subjects, ", "))
	}
	switch {
	case e.system.ID == "":
		e.skip("without Postgres nobody knows whose it may be", "stream_owner")
	case !e.judge("stream_owner", faults.Owner):
	case !e.stream.Owned:
		e.ok("stream_owner", "not made by a relay: see that no other uses it")
	default:
		e.ok("stream_owner", "made by this relay")
	}
}

// checkStreamLimits looks at what becomes of messages that the stream has.
func (e *examination) checkStreamLimits() {
	c := e.stream.Config
	name := e.stream.Name
	switch {
	case c.Retention == jetstream.WorkQueuePolicy:
		e.ok("stream_retention", "workqueue: a message goes once it is consumed, for good")
	case c.MaxAge > 0:
		e.ok("stream_retention", "limits: a message goes after %s", c.MaxAge)
	default:
		e.ok("stream_retention", "%s", strings.ToLower(c.Retention.String()))
	}
	bounded := c.MaxMsgs > 0 || c.MaxBytes > 0 || c.MaxMsgsPerSubject > 0
	switch {
	case bounded && c.Discard == jetstream.DiscardOld:
		e.warn("stream_limits", &fault.Error{What: fmt.Sprintf("%s, discard old: when it is full, the oldest events go, whether they were consumed or not", bounds(c)),
			Remedy: "let it refuse new ones instead, for which the relay waits; or take the limits away",
			Shell:  fmt.Sprintf("nats stream edit %s --force --discard=new", name)})
	case bounded:
		e.ok("stream_limits", "%s, discard new: when it is full, the relay waits", bounds(c))
	default:
		e.ok("stream_limits", "no bound of messages or bytes")
	}
	e.checkMessageSize()
	e.checkDurability()
	e.ok("duplicate_window", "%s: the relay's exactness does not rest on it", c.Duplicates)
}

func bounds(c jetstream.StreamConfig) string {
	var all []string
	add := func(what string, n int64) {
		if n > 0 {
			all = append(all, fmt.Sprintf("at most %s %s", grouped(n), what))
		}
	}
	add("messages", c.MaxMsgs)
	add("bytes", c.MaxBytes)
	add("messages a subject", c.MaxMsgsPerSubject)
	return strings.Join(all, ", ")
}

func (e *examination) checkMessageSize() {
	limit, own := e.client.Server().MaxPayload, int64(e.stream.MaxMsgSize)
	if own > 0 && own < limit {
		e.warn("stream_message_size", &fault.Error{What: fmt.Sprintf("%s, less than the server's %s: larger events are parked as failed", size(own), size(limit)),
			Remedy: "where events can be larger, take the stream's own limit away", Shell: fmt.Sprintf("nats stream edit %s --force --max-msg-size=-1", e.stream.Name)})
		return
	}
	e.ok("stream_message_size", "%s, the server's max_payload: larger events are parked as failed", size(limit))
}

// checkDurability says when an acknowledged message is safe. sync_interval is not
// visible to clients.
func (e *examination) checkDurability() {
	replicas := e.stream.Config.Replicas
	const unseen = "clients can't see the server's sync_interval (2 minutes by default)"
	switch {
	case replicas > 1:
		e.ok("stream_durability", "%d replicas", replicas)
	case e.Config.ConfirmDelay > 0:
		e.ok("stream_durability", "1 replica, and the slot is held back by %s; %s", e.Config.ConfirmDelay, unseen)
	default:
		f := &fault.Error{What: "1 replica: a power cut of the NATS server can take messages that it has acknowledged and not synced; " + unseen,
			Remedy: "set sync_interval: always on the server, or OUTBOX_CONFIRM_DELAY longer than it, or take more replicas"}
		if e.client.Server().Cluster != "" {
			f.Shell = fmt.Sprintf("nats stream edit %s --force --replicas=3", e.stream.Name)
		}
		e.warn("stream_durability", f)
	}
}

// checkPermissions tries them: with a message that the stream must refuse, and a
// read.
func (e *examination) checkPermissions(ctx context.Context) {
	subject := strings.ReplaceAll(e.Config.Sink(e.system).Stream.Subjects, "*", "outbox_relay_doctor")
	switch err := e.client.TryPublish(ctx, e.stream.Name, subject); {
	case e.stream.Faults.Kind != nil || e.stream.Faults.Subjects != nil:
		e.skip("the stream can't take the relay's messages", "may_publish")
	case err != nil:
		e.add("may_publish", stateFault, e.grantNATS(err))
	default:
		e.ok("may_publish", "on %s, and hear the answer: a message was refused as it had to be", subject)
	}
	if err := e.client.TryRead(ctx, e.stream.Stream); err != nil {
		e.add("may_read", stateFault, e.grantNATS(err))
	} else {
		e.ok("may_read", "messages, from the stream's leader")
	}
}

func (e *examination) checkStreamCheckpoint(ctx context.Context) {
	if e.standing == nil || e.standing.Checkpoint == nil {
		e.skip("there is no checkpoint to hold it against", "stream_checkpoint")
		return
	}
	mends, err := e.CheckStream(ctx, *e.standing, e.stream.Stream)
	if e.judgeMending("stream_checkpoint", mends, err) {
		e.ok("stream_checkpoint", "the stream has, or had, what the checkpoint stands on")
	}
}
