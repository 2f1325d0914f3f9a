package sink

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/textproto"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"outbox-relay/internal/fault"
)

// StreamConfig names the stream. What follows Create is used at creation only.
type StreamConfig struct {
	Name            string
	Create          bool
	Subjects        string // what the messages' subjects match, with * for each column
	Replicas        int
	MaxAge          time.Duration
	DuplicateWindow time.Duration
	SystemID        string // owner of a stream that we create: the Postgres cluster
	Slot            string // and its slot
}

// Metadata keys of a stream that the relay created.
const (
	metaSystem = "outbox-relay.system"
	metaSlot   = "outbox-relay.slot"
)

// Stream is what the stream's leader says of it.
type Stream struct {
	Name       string
	Domain     string    // of JetStream; empty: the server has none
	Created    time.Time // microseconds, as Postgres keeps it
	Begin      uint64    // sequence of its first message ever, where its configuration says; else 0
	First      uint64    // sequences below it are gone
	Last       uint64
	MaxMsgSize int  // -1: no limit of its own
	Replicated bool // its leader may be behind for a moment
}

var (
	// ErrStream says that the stream can't keep the promise; only a change of
	// its configuration, or of ours, helps.
	ErrStream = errors.New("the stream cannot be used")
	// ErrNoStream says that the stream is not there, and not to be made.
	ErrNoStream = errors.New("it is not to be created")
	// errNoJetStream says that the server, or the account, has JetStream switched off.
	errNoJetStream = errors.New("no JetStream")
	// errGone says that no message stands at a sequence.
	errGone = errors.New("message gone")
)

// OpenStream makes sure that the stream is there and can keep the promise, and
// reads its state from its leader. It does not wait: what can pass is an error
// that is not ErrStream.
func (c *Client) OpenStream(ctx context.Context, owner StreamConfig) (Stream, error) {
	info, err := c.info(ctx, owner.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		if !owner.Create {
			return Stream{}, fmt.Errorf("%w: stream %s does not exist: %w", ErrStream, owner.Name, ErrNoStream)
		}
		info, err = c.create(ctx, owner)
	}
	if err != nil {
		return Stream{}, err
	}
	if err := refuse(info.Config, owner); err != nil {
		return Stream{}, fmt.Errorf("%w: %w", ErrStream, err)
	}
	return stream(info), nil
}

func stream(info *jetstream.StreamInfo) Stream {
	s := Stream{
		Name:       info.Config.Name,
		Domain:     info.Domain,
		Created:    info.Created.UTC().Truncate(time.Microsecond),
		Begin:      info.Config.FirstSeq,
		First:      info.State.FirstSeq,
		Last:       info.State.LastSeq,
		MaxMsgSize: int(info.Config.MaxMsgSize),
		Replicated: info.Config.Replicas > 1,
	}
	if s.MaxMsgSize == 0 {
		s.MaxMsgSize = -1
	}
	return s
}

// info asks the stream's leader.
func (c *Client) info(ctx context.Context, name string) (*jetstream.StreamInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	s, err := c.js.Stream(ctx, name)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return nil, err
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount):
		return nil, noJetStream("JetStream is not enabled at the server, or not for the relay's account", ", or enable it for the account")
	case errors.Is(err, nats.ErrNoResponders) && !c.mayHaveJetStream():
		return nil, noJetStream("JetStream is not enabled at the server", "")
	case errors.Is(err, nats.ErrNoResponders):
		return nil, fmt.Errorf("JetStream does not answer (not enabled, not ready, or the wrong OUTBOX_NATS_DOMAIN): %w", err)
	case err != nil:
		return nil, fmt.Errorf("read stream %s: %w", name, err)
	}
	return s.CachedInfo(), nil
}

func noJetStream(what, or string) error {
	return fmt.Errorf("%w: %w", ErrStream, &fault.Error{What: what, Remedy: "start nats-server with -js" + or, Shell: "nats-server -js", Cause: errNoJetStream})
}

// mayHaveJetStream reports whether anybody within reach may ever answer: a
// single server says by itself whether JetStream is on.
func (c *Client) mayHaveJetStream() bool {
	enabled, _ := c.nc.ConnectedServerJetStream()
	return enabled || c.nc.ConnectedClusterName() != "" || c.config.Domain != ""
}

func (c *Client) create(ctx context.Context, owner StreamConfig) (*jetstream.StreamInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*requestTimeout)
	defer cancel()
	s, err := c.js.CreateStream(ctx, jetstream.StreamConfig{
		Name:        owner.Name,
		Description: "events of a Postgres outbox, published by outbox-relay",
		Subjects:    []string{owner.Subjects},
		Retention:   jetstream.LimitsPolicy,
		Storage:     jetstream.FileStorage,
		Replicas:    owner.Replicas,
		MaxAge:      owner.MaxAge,
		Duplicates:  owner.DuplicateWindow,
		AllowDirect: true,
		Metadata:    map[string]string{metaSystem: owner.SystemID, metaSlot: owner.Slot},
	})
	if err != nil {
		return nil, explainCreate(err, owner)
	}
	c.log.Info("created the stream", "stream", owner.Name, "subjects", owner.Subjects, "replicas", owner.Replicas)
	return s.CachedInfo(), nil
}

// Error codes of the server that nats.go does not name.
// Source: https://github.com/nats-io/nats-server, server/errors.json
const (
	codeSubjectOverlap       = 10065
	codeReplicasNotSupported = 10074
)

// explainCreate tells what waiting can't mend, and what to do about it.
func explainCreate(err error, owner StreamConfig) error {
	var api *jetstream.APIError
	switch {
	case !errors.As(err, &api):
	case api.ErrorCode == codeSubjectOverlap:
		return fmt.Errorf("%w: create stream %s with subjects %s: %w: change OUTBOX_SUBJECT, or set OUTBOX_STREAM to the stream that has them", ErrStream, owner.Name, owner.Subjects, err)
	case api.ErrorCode == codeReplicasNotSupported:
		return fmt.Errorf("%w: create stream %s with %d replicas: %w: a single server takes OUTBOX_STREAM_REPLICAS=1", ErrStream, owner.Name, owner.Replicas, err)
	case api.Code == 400:
		return fmt.Errorf("%w: create stream %s with subjects %s: %w: see to OUTBOX_SUBJECT and OUTBOX_STREAM_*, or create it by hand", ErrStream, owner.Name, owner.Subjects, err)
	}
	return fmt.Errorf("create stream %s: %w", owner.Name, err)
}

// refuse names why a stream can't keep the promise, and what to do.
func refuse(config jetstream.StreamConfig, owner StreamConfig) error {
	f := streamFaults(config, owner)
	return cmp.Or(f.Kind, f.Subjects, f.Owner)
}

// StreamFaults is why a stream can't keep the promise, each part on its own; nil
// where it can.
type StreamFaults struct {
	Kind     error // no relay's stream may be such a one
	Subjects error // it does not take all that may be published
	Owner    error // it is another relay's
}

func streamFaults(config jetstream.StreamConfig, owner StreamConfig) (f StreamFaults) {
	if edit, err := unfit(config); err != nil {
		f.Kind = &fault.Error{What: "stream " + config.Name + " " + err.Error(), Remedy: "change or replace it, or choose another OUTBOX_STREAM",
			Shell: edited(config.Name, edit)}
	}
	if !covered(owner.Subjects, config.Subjects) {
		f.Subjects = &fault.Error{What: fmt.Sprintf("stream %s has subjects %s, which do not cover %s", config.Name, strings.Join(config.Subjects, ", "), owner.Subjects),
			Remedy: "add it, or change OUTBOX_SUBJECT or OUTBOX_STREAM",
			Shell:  fmt.Sprintf("nats stream edit %s --force --subjects='%s'", config.Name, strings.Join(append(slices.Clone(config.Subjects), owner.Subjects), ","))}
	}
	if system, slot := config.Metadata[metaSystem], config.Metadata[metaSlot]; slot != "" && (slot != owner.Slot || system != owner.SystemID) {
		f.Owner = &fault.Error{What: fmt.Sprintf("stream %s belongs to another relay (slot %s of Postgres cluster %s): one stream has one relay", config.Name, slot, system),
			Remedy: "choose another OUTBOX_STREAM"}
	}
	return f
}

// edited is a command that changes what `nats stream edit` has no flag for: edit
// is jq's, on the stream's configuration. Empty: it can't be changed.
func edited(stream, edit string) string {
	if edit == "" {
		return ""
	}
	return fmt.Sprintf("nats stream info %[1]s --json | jq '.config | %[2]s' > %[1]s.json && nats stream edit %[1]s --force --config=%[1]s.json", stream, edit)
}

// Command is what makes the stream by hand, as the relay would.
func (c StreamConfig) Command() string {
	return fmt.Sprintf("nats stream add %s --subjects='%s' --storage=file --retention=limits --discard=old --replicas=%d --max-age=%s --dupe-window=%s --allow-direct --defaults",
		c.Name, c.Subjects, c.Replicas, c.MaxAge, c.DuplicateWindow)
}

// unfit names what no relay's stream may be, and the edit that changes it in place.
func unfit(config jetstream.StreamConfig) (edit string, err error) {
	switch {
	case config.Mirror != nil:
		return "", errors.New("is a mirror: nothing can be published to it")
	case len(config.Sources) > 0:
		return "del(.sources)", errors.New("has sources: their messages would break the order")
	case config.SubjectDeleteMarkerTTL > 0:
		return "del(.subject_delete_marker_ttl)", errors.New("writes subject delete markers: they would stand between the events")
	case config.AllowMsgCounter:
		return "", errors.New("is a stream of counters: it takes no payload")
	case config.AllowMsgSchedules:
		return "", errors.New("allows message schedules: the server's own messages would stand between the events")
	case config.Retention == jetstream.InterestPolicy:
		return `.retention = "limits"`, errors.New("has interest retention: without a consumer it drops messages: use limits or workqueue")
	case config.Storage == jetstream.MemoryStorage:
		return "", errors.New("keeps its messages in memory: a restart of the server would lose them: use file storage")
	case config.DiscardNewPerSubject:
		return "del(.discard_new_per_subject)", errors.New("has discard_new_per_subject: a full subject would stop all others")
	case config.NoAck:
		return "del(.no_ack)", errors.New("has no_ack: the relay would never know what is stored")
	case config.Sealed:
		return "", errors.New("is sealed")
	case config.PersistMode == jetstream.AsyncPersistMode:
		return "", errors.New("persists asynchronously: it acknowledges messages that are not written")
	}
	return "", nil
}

// covered reports whether one of the subjects matches all that pattern matches.
func covered(pattern string, subjects []string) bool {
	want := strings.Split(pattern, ".")
	for _, subject := range subjects {
		if covers(strings.Split(subject, "."), want) {
			return true
		}
	}
	return false
}

func covers(subject, want []string) bool {
	for i, token := range subject {
		switch {
		case token == ">":
			return len(want) > i
		case i >= len(want):
			return false
		case token != "*" && token != want[i]:
			return false
		}
	}
	return len(subject) == len(want)
}

const requestTimeout = 5 * time.Second

// message is what the matcher needs of one sequence of the stream.
type message struct {
	sequence uint64
	id       string // Nats-Msg-Id; empty where there is none
	gone     bool
}

// tailReaders is how many messages are asked for at a time.
const tailReaders = 64

// tail reads the ids of the messages after sequence up to the last one, from
// the stream's leader: direct gets may be answered by a replica that is behind.
// Of a purged run before the first message, no more than limit+1 are listed:
// that is more than limit events can account for.
func (c *Client) tail(ctx context.Context, s Stream, after uint64, limit int) ([]message, error) {
	if first := min(s.First, s.Last+1); first > after+1+uint64(limit+1) {
		after = first - 1 - uint64(limit+1)
	}
	if s.Last <= after {
		return nil, nil
	}
	tail := make([]message, s.Last-after)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(tailReaders)
	for i := range tail {
		m := &tail[i]
		m.sequence = after + 1 + uint64(i)
		if m.sequence < s.First {
			m.gone = true
			continue
		}
		g.Go(func() error {
			id, err := c.MessageID(ctx, s.Name, m.sequence)
			m.id, m.gone = id, errors.Is(err, errGone)
			if m.gone {
				return nil
			}
			return err
		})
	}
	return tail, g.Wait()
}

// Gone reports whether the error says that no message stands at a sequence.
func Gone(err error) bool { return errors.Is(err, errGone) }

// MessageID reads the id of the message at a sequence from the stream's
// leader; see Gone.
func (c *Client) MessageID(ctx context.Context, stream string, sequence uint64) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	reply, err := c.nc.RequestWithContext(ctx, c.api+"STREAM.MSG.GET."+stream, fmt.Appendf(nil, `{"seq":%d}`, sequence))
	if err != nil {
		return "", fmt.Errorf("read message %d of stream %s: %w", sequence, stream, err)
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message struct {
			Headers string `json:"hdrs"` // base64
		} `json:"message"`
	}
	if err := json.Unmarshal(reply.Data, &answer); err != nil {
		return "", fmt.Errorf("read message %d of stream %s: %w", sequence, stream, err)
	}
	switch {
	case answer.Error != nil && answer.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		return "", errGone
	case answer.Error != nil:
		return "", fmt.Errorf("read message %d of stream %s: %w", sequence, stream, answer.Error)
	}
	headers, err := base64.StdEncoding.DecodeString(answer.Message.Headers)
	if err != nil {
		return "", fmt.Errorf("read message %d of stream %s: %w", sequence, stream, err)
	}
	return messageID(headers), nil
}

// messageID finds Nats-Msg-Id in a header block as it was sent.
func messageID(block []byte) string {
	_, lines, _ := bytes.Cut(block, []byte("\r\n")) // behind NATS/1.0
	headers, _ := textproto.NewReader(bufio.NewReader(bytes.NewReader(lines))).ReadMIMEHeader()
	return headers.Get("Nats-Msg-Id")
}
