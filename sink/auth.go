package sink

import (
	"fmt"

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
		options = append(options, nats.UserCredentials(a.Creds))
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

func (a Auth) pair() (nkeys.KeyPair, error) {
	seed, err := a.NKey()
	if err != nil {
		return nil, err
	}
	pair, err := nkeys.FromSeed([]byte(seed))
	if err != nil {
		return nil, fmt.Errorf("OUTBOX_NATS_NKEY is not the seed of an nkey: %w", err)
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
