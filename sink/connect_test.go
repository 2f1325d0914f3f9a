package sink

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"outbox-relay/internal/testenv"
)

// connectTo is the relay's own connection, closed by Cleanup.
func connectTo(t testing.TB, config Config) *Client {
	t.Helper()
	if config.InboxPrefix == "" {
		config.InboxPrefix = "_INBOX_outbox"
	}
	c, err := Connect(t.Context(), config, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// lines is a log that can be read while it is written.
type lines struct {
	mu  sync.Mutex
	all strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(p)
}

func (l *lines) has(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.all.String(), text)
}

// A stop ends the wait for NATS at once.
func TestConnectStops(t *testing.T) {
	server := testenv.NATS(t, testenv.NATSOptions{})
	server.Stop()
	log := &lines{}
	stopped := errors.New("SIGTERM")
	ctx, stop := context.WithCancelCause(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := Connect(ctx, Config{Servers: []string{server.URL()}}, slog.New(slog.NewTextHandler(log, nil)))
		done <- err
	}()
	testenv.Eventually(t, "a word about the wait", func() bool { return log.has("waiting for NATS") })
	stop(stopped)
	if err := <-done; !errors.Is(err, stopped) {
		t.Errorf("got %v, want the cause of the stop", err)
	}
}

// A relay that starts before NATS waits for it.
func TestConnectWaits(t *testing.T) {
	server := testenv.NATS(t, testenv.NATSOptions{})
	server.Stop()
	log := &lines{}
	type result struct {
		client *Client
		err    error
	}
	done := make(chan result, 1)
	go func() {
		client, err := Connect(t.Context(), Config{Servers: []string{server.URL()}, InboxPrefix: "_INBOX_outbox"}, slog.New(slog.NewTextHandler(log, nil)))
		done <- result{client, err}
	}()
	testenv.Eventually(t, "a word about the wait", func() bool { return log.has("waiting for NATS") })
	server.Restart()
	got := <-done
	if got.err != nil {
		t.Fatal(got.err)
	}
	got.client.Close()
}
