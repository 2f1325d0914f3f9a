package sink

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"outbox-relay/internal/testenv"
)

// secret is one that can be rotated.
type secret struct{ atomic.Value }

func newSecret(text string) *secret {
	s := &secret{}
	s.Store(text)
	return s
}

func (s *secret) get() (string, error) { return s.Load().(string), nil }

func nkey(t *testing.T) (seed, public string) {
	t.Helper()
	pair, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := pair.Seed()
	if err != nil {
		t.Fatal(err)
	}
	if public, err = pair.PublicKey(); err != nil {
		t.Fatal(err)
	}
	return string(raw), public
}

// Each way to authenticate works, a wrong secret is fatal at once, and a secret
// that is rotated while the relay runs is taken at the next connection.
func TestAuth(t *testing.T) {
	seed, public := nkey(t)
	nextSeed, nextPublic := nkey(t)
	wrongSeed, _ := nkey(t)
	user := &server.User{Username: "relay", Password: "first"}
	keyed := &server.NkeyUser{Nkey: public}
	for name, c := range map[string]struct {
		server             func(*server.Options)
		auth               func(*secret) Auth
		right, wrong, next string
		rotate             func()
	}{
		"user and password": {
			server: func(o *server.Options) { o.Users = []*server.User{user} },
			auth:   func(s *secret) Auth { return Auth{User: "relay", Password: s.get} },
			right:  "first", wrong: "wrong", next: "second", rotate: func() { user.Password = "second" },
		},
		"token": {
			server: func(o *server.Options) { o.Authorization = "a token" },
			auth:   func(s *secret) Auth { return Auth{Token: s.get} },
			right:  "a token", wrong: "another",
		},
		"nkey": {
			server: func(o *server.Options) { o.Nkeys = []*server.NkeyUser{keyed} },
			auth:   func(s *secret) Auth { return Auth{NKey: s.get} },
			right:  seed, wrong: wrongSeed, next: nextSeed, rotate: func() { keyed.Nkey = nextPublic },
		},
	} {
		t.Run(name, func(t *testing.T) {
			nats := testenv.NATS(t, testenv.NATSOptions{Edit: c.server})
			config := Config{Servers: []string{nats.URL()}, Auth: c.auth(newSecret(c.wrong)), InboxPrefix: "_INBOX_outbox"}
			requireRefused(t, config)
			config.Auth = Auth{}
			requireRefused(t, config)

			now := newSecret(c.right)
			config.Auth = c.auth(now)
			client := connectTo(t, config)
			if c.rotate == nil {
				return
			}
			now.Store(c.next)
			c.rotate()
			nats.Restart()
			testenv.Eventually(t, "a connection with the new secret", func() bool { return client.Reconnects() == 1 && client.Connected() })
		})
	}
}

func requireRefused(t *testing.T, config Config) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	client, err := Connect(ctx, config, slog.New(slog.DiscardHandler))
	if err == nil {
		client.Close()
	}
	if !errors.Is(err, nats.ErrAuthorization) || !strings.Contains(err.Error(), "OUTBOX_NATS_") {
		t.Errorf("got %v, want a refusal that names the variables", err)
	}
}

func TestFaultySeed(t *testing.T) {
	gone := errors.New("the file is gone")
	for _, get := range []func() (string, error){
		func() (string, error) { return "SUnot a seed", nil },
		func() (string, error) { return "", gone },
	} {
		_, err := Connect(t.Context(), Config{Auth: Auth{NKey: get}}, slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), "OUTBOX_NATS_NKEY") && !errors.Is(err, gone) {
			t.Errorf("got %v", err)
		}
	}
}
