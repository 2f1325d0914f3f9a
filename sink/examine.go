package sink

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Server is what the connection tells of the server at its other end.
type Server struct {
	URL        string // without secrets
	Version    string
	Cluster    string               // empty: a single server
	MaxPayload int64                // bytes
	TLS        *tls.ConnectionState // nil: not encrypted
}

// Server says whom the client is connected to.
func (c *Client) Server() Server {
	s := Server{URL: c.nc.ConnectedUrlRedacted(), Version: c.nc.ConnectedServerVersion(), Cluster: c.nc.ConnectedClusterName(), MaxPayload: c.nc.MaxPayload()}
	if dialed := c.wire.dialed.Load(); dialed != nil {
		if secured, ok := dialed.Conn.(*tls.Conn); ok {
			state := secured.ConnectionState()
			s.TLS = &state
		}
	}
	return s
}

// Description is all that a stream's leader says of it, and what of that keeps
// the relay from it.
type Description struct {
	Stream
	Config jetstream.StreamConfig
	Owned  bool // a relay has made it
	Faults StreamFaults
}

// Describe asks the stream's leader. It makes no stream: one that is not there is
// ErrNoStream.
func (c *Client) Describe(ctx context.Context, owner StreamConfig) (Description, error) {
	info, err := c.info(ctx, owner.Name)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return Description{}, fmt.Errorf("%w: stream %s does not exist: %w", ErrStream, owner.Name, ErrNoStream)
	case err != nil:
		return Description{}, err
	}
	return Description{Stream: stream(info), Config: info.Config, Owned: info.Config.Metadata[metaSlot] != "", Faults: streamFaults(info.Config, owner)}, nil
}

// Account asks for the limits of JetStream. The relay itself does without, so
// that it may be denied.
func (c *Client) Account(ctx context.Context) (jetstream.AccountInfo, error) {
	var answer struct {
		Error *jetstream.APIError `json:"error"`
		jetstream.AccountInfo
	}
	reply, err := c.ask(ctx, &nats.Msg{Subject: c.api + "INFO"})
	if err == nil {
		err = json.Unmarshal(reply.Data, &answer)
	}
	if err == nil && answer.Error != nil {
		err = answer.Error
	}
	if err != nil {
		return answer.AccountInfo, fmt.Errorf("read the limits of JetStream: %w", err)
	}
	return answer.AccountInfo, nil
}

// DeniedError says that the server denies the client a permission.
type DeniedError struct{ Subject, Text string }

func (e *DeniedError) Error() string { return e.Text }

// ask sends a request. A denial, which the server tells beside the connection and
// not in an answer, comes back as a DeniedError: the server has told it by the
// time it answers a ping.
func (c *Client) ask(ctx context.Context, question *nats.Msg) (*nats.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	subject, inbox := question.Subject, c.nc.NewInbox()
	question.Reply = inbox
	replies, err := c.nc.SubscribeSync(inbox)
	if err != nil {
		return nil, fmt.Errorf("subscribe on %s: %w", inbox, err)
	}
	defer func() { _ = replies.Unsubscribe() }()
	if err := c.nc.PublishMsg(question); err != nil {
		return nil, fmt.Errorf("publish on %s: %w", subject, err)
	}
	if err := c.nc.FlushWithContext(ctx); err != nil {
		return nil, fmt.Errorf("publish on %s: %w", subject, err)
	}
	if err := denied(c.nc.LastError(), subject, inbox); err != nil {
		return nil, err
	}
	reply, err := replies.NextMsgWithContext(ctx)
	switch {
	case err != nil:
		return nil, fmt.Errorf("no answer to a message on %s: %w", subject, err)
	case len(reply.Data) == 0 && reply.Header.Get("Status") == "503":
		return nil, fmt.Errorf("publish on %s: %w", subject, nats.ErrNoResponders)
	}
	return reply, nil
}

// denied reads which of the two was denied; nil: neither was. The connection's
// last error may be an older one.
func denied(err error, subject, inbox string) error {
	if !errors.Is(err, nats.ErrPermissionViolation) {
		return nil
	}
	for _, of := range []string{subject, inbox} {
		if strings.Contains(strings.ToLower(err.Error()), strings.ToLower(of)+`"`) {
			return &DeniedError{Subject: of, Text: err.Error()}
		}
	}
	return nil
}

// request asks JetStream's API, for an answer that may be an error.
func (c *Client) request(ctx context.Context, subject string, body string) (*jetstream.APIError, error) {
	reply, err := c.ask(ctx, &nats.Msg{Subject: subject, Data: []byte(body)})
	if err != nil {
		return nil, err
	}
	var answer struct {
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(reply.Data, &answer); err != nil {
		return nil, fmt.Errorf("read the answer to %s: %w", subject, err)
	}
	return answer.Error, nil
}

// beyond is a sequence that no stream reaches.
const beyond = "4611686018427387904" // 2^62

// TryPublish publishes what the stream has to refuse, since it expects a last
// sequence that can't be: nothing is stored. It returns nil where the refusal
// comes from the stream itself, so that the relay may publish and hear of it.
func (c *Client) TryPublish(ctx context.Context, stream, subject string) error {
	reply, err := c.ask(ctx, &nats.Msg{Subject: subject, Header: nats.Header{
		"Nats-Expected-Stream":        {stream},
		"Nats-Expected-Last-Sequence": {beyond},
		"Outbox-Doctor":               {"probe"},
	}})
	if err != nil {
		return err
	}
	var answer struct {
		Error *jetstream.APIError `json:"error"`
	}
	switch err := json.Unmarshal(reply.Data, &answer); {
	case err != nil:
		return fmt.Errorf("publish on %s: %w", subject, err)
	case answer.Error == nil:
		return fmt.Errorf("publish on %s: it was stored, although it had to be refused", subject)
	case answer.Error.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence:
		return nil
	}
	return fmt.Errorf("publish on %s: %w", subject, answer.Error)
}

// TryInfo asks for the stream, which need not be there.
func (c *Client) TryInfo(ctx context.Context, stream string) error {
	_, err := c.request(ctx, c.api+"STREAM.INFO."+stream, "")
	return err
}

// TryRead asks the stream's leader for its last message, which need not be there.
func (c *Client) TryRead(ctx context.Context, s Stream) error {
	_, err := c.request(ctx, c.api+"STREAM.MSG.GET."+s.Name, fmt.Sprintf(`{"seq":%d}`, max(s.Last, 1)))
	return err
}

// codeStreamMismatch says that subject and request name different streams.
// Source: https://github.com/nats-io/nats-server, server/errors.json
const codeStreamMismatch = 10056

// TryCreate asks for a stream whose name is not that of the subject, which is
// always refused: it returns nil where the client may make the stream.
func (c *Client) TryCreate(ctx context.Context, stream string) error {
	refused, err := c.request(ctx, c.api+"STREAM.CREATE."+stream, fmt.Sprintf(`{"name":"%s_not"}`, stream))
	switch {
	case err != nil:
		return err
	case refused != nil && refused.ErrorCode != codeStreamMismatch:
		return fmt.Errorf("create stream %s: %w", stream, refused)
	}
	return nil
}
