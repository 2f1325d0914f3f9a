package sink

import (
	"log/slog"
	"testing"
)

// connectTo is the relay's own connection, closed by Cleanup.
func connectTo(t *testing.T, config Config) *Client {
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
