package event

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Request asks the relay to publish rows from the table. It is the content of a
// transactional logical message, so it comes out of the slot in the order of
// commits, and not at all where its transaction is rolled back. It names ids only.
type Request struct {
	Run      string   // of a replay; empty: a retry
	IDs      []string // each once, in the order in which the rows are to be published
	Attempts []int    // of a retry: retried_attempts that each row must have, or it was retried again since
}

// maxRequest is how many rows a request may name, maxRun how long a run's name
// may be, and maxContent all of it: it is not unpacked before it is looked at.
const (
	maxRequest = 1000
	maxRun     = 100
	maxContent = 1 << 20
)

// RequestPrefix is the prefix of the logical messages for the table with that
// OID.
func RequestPrefix(table uint32) string {
	return "outbox_relay:" + strconv.FormatUint(uint64(table), 10)
}

// Proof tells requests of those who may ask from others: anybody who may connect can write
// a logical message, and it carries no role. The zero value takes none.
type Proof struct {
	Secret []byte
	Since  time.Time // what was committed before needs no signature: a release without it wrote that
}

var errUnsigned = errors.New("read a request: it is not signed, so nothing proves that who wrote it may ask: only outbox_relay_ask() makes requests")

// Open returns the request that a logical message contains: what is behind the signature
// of outbox_relay_ask, which is valid for this prefix and this transaction alone.
func (p Proof) Open(prefix string, xid uint32, commit time.Time, content []byte) ([]byte, error) {
	signature, request, signed := bytes.Cut(content, []byte(" "))
	given, err := hex.DecodeString(string(signature))
	signed = signed && err == nil && len(given) == sha256.Size
	switch {
	case len(p.Secret) > 0 && signed && hmac.Equal(given, p.sign(prefix, xid, request)):
		return request, nil
	case !signed && commit.Before(p.Since):
		return content, nil
	}
	return nil, errUnsigned
}

// sign is what outbox_relay_ask computes.
func (p Proof) sign(prefix string, xid uint32, request []byte) []byte {
	inner := sha256.Sum256(slices.Concat(p.Secret, fmt.Appendf(nil, "%s %d ", prefix, xid), request))
	outer := sha256.Sum256(append(bytes.Clone(p.Secret), inner[:]...))
	return outer[:]
}

// ParseRequest parses {"retry": [{"id": …, "attempt": …}, …]} or
// {"replay": run, "ids": [id, …]}.
func ParseRequest(content []byte) (Request, error) {
	var body struct {
		Retry []struct {
			ID      string `json:"id"`
			Attempt int    `json:"attempt"`
		} `json:"retry"`
		Replay string   `json:"replay"`
		IDs    []string `json:"ids"`
	}
	if len(content) > maxContent {
		return Request{}, fmt.Errorf("read a request: it has %d bytes: at most %d are taken", len(content), maxContent)
	}
	if err := json.Unmarshal(content, &body); err != nil {
		return Request{}, fmt.Errorf("read a request: %w", err)
	}
	r := Request{Run: body.Replay, IDs: body.IDs}
	for _, retry := range body.Retry {
		r.IDs = append(r.IDs, retry.ID)
		r.Attempts = append(r.Attempts, retry.Attempt)
	}
	return r, r.check(len(body.Retry))
}

func (r Request) check(retries int) error {
	switch {
	case (retries > 0) == (r.Run != ""), retries > 0 && len(r.IDs) != retries:
		return errors.New("read a request: it is neither a retry nor a replay")
	case len(r.IDs) == 0 || len(r.IDs) > maxRequest:
		return fmt.Errorf("read a request: it names %d rows: 1 to %d are taken", len(r.IDs), maxRequest)
	case len(r.Run) > maxRun || !printable(r.Run):
		return fmt.Errorf("read a request: the run's name %q can't stand in a header: at most %d printable ASCII characters without space", r.Run, maxRun)
	}
	for _, attempt := range r.Attempts {
		if attempt < 1 { // of a row that was never retried: it is yet to come, or failed
			return fmt.Errorf("read a request: a retry is at least the first one, not number %d", attempt)
		}
	}
	seen := make(map[string]bool, len(r.IDs))
	for _, id := range r.IDs {
		if seen[id] || id == "" || strings.ContainsRune(id, 0) {
			return fmt.Errorf("read a request: id %q is empty, named twice, or no text", id)
		}
		seen[id] = true
	}
	return nil
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}
