package sink

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
)

// Auth says how to authenticate; at most one way is set. Functions give a secret as it is now: they are called
// for each connection, so that a rotated secret needs no restart.
type Auth struct {
	Creds    string                 // path
	NKey     func() (string, error) // seed
	User     string
	Password func() (string, error)
	Token    func() (string, error)
}

func (a Auth) options() ([]nats.Option, error) {
	var options []nats.Option
	if a.Creds != "" {
		if _, err := a.jwt(); err != nil {
			return nil, err
		}
		options = append(options, nats.UserJWT(a.jwt, a.sign))
	}
	if a.User != "" {
		options = append(options, nats.UserInfoHandler(func() (string, string) { return a.User, value(a.Password) }))
	}
	if a.Token != nil {
		options = append(options, nats.TokenHandler(func() string { return value(a.Token) }))
	}
	if a.NKey != nil {
		public, err := a.publicKey()
		if err != nil {
			return nil, err
		}
		options = append(options, nats.Nkey(public, a.sign))
	}
	return options, nil
}

// value returns the secret, or nothing where it can't be read: the server then
// refuses the connection, and the next attempt reads it again.
func value(secret func() (string, error)) string {
	if secret == nil {
		return ""
	}
	text, err := secret()
	if err != nil {
		return ""
	}
	return text
}

// errSecret says that a secret can't be read, or is none.
var errSecret = errors.New("a secret of NATS can't be used")

// creds reads the credentials file: a JWT, which is public, and the user's seed.
// The library takes a file without a JWT as a whole for one, and would send it.
func (a Auth) creds() (jwt string, pair nkeys.KeyPair, err error) {
	text, err := os.ReadFile(a.Creds)
	if err != nil {
		return "", nil, fmt.Errorf("%w: OUTBOX_NATS_CREDS: %w", errSecret, err)
	}
	if pair, err = nkeys.ParseDecoratedUserNKey(text); err != nil {
		return "", nil, fmt.Errorf("%w: OUTBOX_NATS_CREDS: %s holds no user's seed", errSecret, a.Creds)
	}
	if jwt, err = nkeys.ParseDecoratedJWT(text); err != nil || strings.Count(jwt, ".") != 2 {
		return "", nil, fmt.Errorf("%w: OUTBOX_NATS_CREDS: %s holds no JWT", errSecret, a.Creds)
	}
	return jwt, pair, nil
}

func (a Auth) jwt() (string, error) {
	jwt, pair, err := a.creds()
	if err != nil {
		return "", err
	}
	pair.Wipe()
	return jwt, nil
}

func (a Auth) pair() (nkeys.KeyPair, error) {
	if a.Creds != "" {
		_, pair, err := a.creds()
		return pair, err
	}
	seed, err := a.NKey()
	if err != nil {
		return nil, err
	}
	pair, err := nkeys.FromSeed([]byte(seed))
	if err != nil {
		return nil, fmt.Errorf("%w: OUTBOX_NATS_NKEY is not the seed of an nkey: %w", errSecret, err)
	}
	return pair, nil
}

// publicKey returns the public half of the nkey, or nothing where none is set.
func (a Auth) publicKey() (string, error) {
	if a.NKey == nil {
		return "", nil
	}
	pair, err := a.pair()
	if err != nil {
		return "", err
	}
	defer pair.Wipe()
	return pair.PublicKey()
}

func (a Auth) sign(nonce []byte) ([]byte, error) {
	pair, err := a.pair()
	if err != nil {
		return nil, err
	}
	defer pair.Wipe()
	return pair.Sign(nonce)
}
