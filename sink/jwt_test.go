package sink

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"outbox-relay/internal/testenv"
)

// operator has accounts and users of its own; a server trusts it by its key.
type operator struct {
	testing.TB
	key, account nkeys.KeyPair
	dir          string
}

func newOperator(t *testing.T) *operator {
	t.Helper()
	o := &operator{TB: t, dir: t.TempDir()}
	var err error
	o.key, err = nkeys.CreateOperator()
	o.must(err)
	o.account, err = nkeys.CreateAccount()
	o.must(err)
	return o
}

func (o *operator) must(err error) {
	o.Helper()
	if err != nil {
		o.Fatal(err)
	}
}

func (o *operator) public(pair nkeys.KeyPair) string {
	o.Helper()
	public, err := pair.PublicKey()
	o.must(err)
	return public
}

// serve starts a server that knows the operator's account, with JetStream.
func (o *operator) serve() *testenv.NATSServer {
	o.Helper()
	system, err := nkeys.CreateAccount()
	o.must(err)
	accounts := &server.MemAccResolver{}
	for _, account := range []nkeys.KeyPair{system, o.account} {
		claims := jwt.NewAccountClaims(o.public(account))
		if account == o.account {
			claims.Limits.JetStreamLimits = jwt.JetStreamLimits{MemoryStorage: -1, DiskStorage: -1, Streams: -1, Consumer: -1}
		}
		text, err := claims.Encode(o.key)
		o.must(err)
		o.must(accounts.Store(o.public(account), text))
	}
	return testenv.NATS(o, testenv.NATSOptions{Edit: func(options *server.Options) {
		options.TrustedKeys = []string{o.public(o.key)}
		options.AccountResolver, options.SystemAccount = accounts, o.public(system)
	}})
}

// creds writes the credentials file of a new user, with the permissions of
// deploy/nats/permissions.conf.
func (o *operator) creds(name string, edits ...func(*jwt.UserClaims)) (path string) {
	o.Helper()
	user, err := nkeys.CreateUser()
	o.must(err)
	claims := jwt.NewUserClaims(o.public(user))
	allowed := testenv.RelayUser(o).Permissions
	claims.Pub.Allow, claims.Sub.Allow = allowed.Publish.Allow, allowed.Subscribe.Allow
	for _, edit := range edits {
		edit(claims)
	}
	token, err := claims.Encode(o.account)
	o.must(err)
	seed, err := user.Seed()
	o.must(err)
	text, err := jwt.FormatUserConfig(token, seed)
	o.must(err)
	path = filepath.Join(o.dir, name)
	o.must(os.WriteFile(path, text, 0o600))
	return path
}

// With JWTs, the server knows operator and account only; the relay brings its
// user's. Who is of another operator, or expired, or has no file is refused.
func TestCredentialsFile(t *testing.T) {
	o := newOperator(t)
	nats := o.serve()
	config := Config{Servers: []string{nats.URL()}, InboxPrefix: "_INBOX_outbox"}
	for _, path := range []string{
		newOperator(t).creds("stranger.creds"),
		o.creds("expired.creds", func(claims *jwt.UserClaims) { claims.Expires = time.Now().Add(-time.Hour).Unix() }),
	} {
		config.Auth = Auth{Creds: path}
		requireRefused(t, config)
	}

	path := o.creds("relay.creds")
	config.Auth = Auth{Creds: path}
	client := connectTo(t, config)
	stream := StreamConfig{Name: "EVENTS", Create: true, Subjects: "events.*.*"}
	if _, err := client.OpenStream(t.Context(), stream); err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(path)
	o.must(err)
	o.creds("relay.creds") // another user
	nats.Restart()
	testenv.Eventually(t, "a connection with the new file", func() bool { return client.Reconnects() == 1 && client.Connected() })
	second, err := os.ReadFile(path)
	o.must(err)
	if string(first) == string(second) {
		t.Fatal("the file was not rotated")
	}
	if _, err := client.OpenStream(t.Context(), stream); err != nil {
		t.Fatal(err)
	}
}

func TestFaultyCredentialsFile(t *testing.T) {
	o := newOperator(t)
	whole, err := os.ReadFile(o.creds("relay.creds"))
	o.must(err)
	_, seedOnly, _ := strings.Cut(string(whole), "------END NATS USER JWT------")
	jwtOnly, _, _ := strings.Cut(string(whole), "-----BEGIN USER NKEY SEED-----")
	url := o.serve().URL()
	for want, text := range map[string]string{"no JWT": seedOnly, "no user's seed": jwtOnly} {
		path := filepath.Join(o.dir, "faulty.creds")
		o.must(os.WriteFile(path, []byte(text), 0o600))
		requireFaultyCreds(t, url, path, want)
	}
	requireFaultyCreds(t, url, filepath.Join(o.dir, "none.creds"), "no such file")
}

func requireFaultyCreds(t *testing.T, url, path, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := Connect(ctx, Config{Servers: []string{url}, Auth: Auth{Creds: path}}, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "OUTBOX_NATS_CREDS") {
		t.Errorf("got %v, want an error that names OUTBOX_NATS_CREDS and says %q", err, want)
	}
	if errors.Is(err, nats.ErrAuthorization) || err != nil && strings.Contains(err.Error(), "SU") {
		t.Errorf("the server was asked, or the seed is shown: %v", err)
	}
}
