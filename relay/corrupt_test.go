package relay_test

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pglogrepl"
)

// corrupter forwards to Postgres, and on each connection does harm to one message
// that comes from its walsender. (On each, since a relay that matches stream and
// slot ends its first session without having looked at all that came.)
type corrupter struct {
	testing.TB
	target   string
	listener net.Listener
	links    sync.WaitGroup

	mu    sync.Mutex
	harm  func(frame []byte) []byte // done to the first frame for which it returns another one; nil: never
	done  bool
	where pglogrepl.LSN // of the last message harmed, or of the one before it that has an LSN; 0: none has
}

// stream is what a corrupter knows of one connection.
type stream struct {
	done bool
	last pglogrepl.LSN // of a message
}

// corrupting returns a corrupter before b's Postgres, and the relay's URL that
// leads through it.
func (b *bundle) corrupting() (*corrupter, string) {
	b.Helper()
	target := fmt.Sprintf("127.0.0.1:%d", b.cluster.Port())
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	b.must(err)
	c := &corrupter{TB: b, target: target, listener: listener}
	c.links.Go(c.accept)
	b.Cleanup(func() { listener.Close(); c.links.Wait() })
	url := strings.Replace(b.url, target, listener.Addr().String(), 1)
	if url == b.url {
		b.Fatalf("%s does not lead to %s", b.url, target)
	}
	return c, "POSTGRES_URL=" + url
}

func (c *corrupter) accept() {
	for {
		client, err := c.listener.Accept()
		if err != nil {
			return // closed
		}
		c.links.Go(func() { c.serve(client) })
	}
}

// serve forwards until one of the two sides ends.
func (c *corrupter) serve(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", c.target)
	if err != nil {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { _, _ = io.Copy(server, client); server.Close() })
	both.Go(func() { c.forward(client, server); client.Close() })
	both.Wait()
}

// forward forwards the server's messages one by one: a kind, and a length that
// counts itself.
func (c *corrupter) forward(client io.Writer, server io.Reader) {
	var header [5]byte
	var from stream
	for {
		if _, err := io.ReadFull(server, header[:]); err != nil {
			return
		}
		body := make([]byte, binary.BigEndian.Uint32(header[1:])-4)
		if _, err := io.ReadFull(server, body); err != nil {
			return
		}
		if header[0] == 'd' {
			body = c.pass(&from, body)
		}
		out := binary.BigEndian.AppendUint32(header[:1:1], uint32(len(body)+4))
		if _, err := client.Write(append(out, body...)); err != nil {
			return
		}
	}
}

// pass takes a frame of the walsender.
func (c *corrupter) pass(from *stream, frame []byte) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	if from.done || c.harm == nil {
		return frame
	}
	harmed := c.harm(frame)
	if frame[0] == 'w' && (harmed == nil || len(harmed) >= 25 && harmed[0] == 'w') {
		from.last = cmp.Or(pglogrepl.LSN(binary.BigEndian.Uint64(frame[1:])), from.last)
	}
	if harmed == nil {
		return frame
	}
	from.done = true
	c.done, c.where = true, from.last
	return harmed
}

func (c *corrupter) arm(harm func([]byte) []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.harm, c.done, c.where = harm, false, 0
}

// harmed is where harm was done.
func (c *corrupter) harmed() (pglogrepl.LSN, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.done {
		return 0, errors.New("no harm was done")
	}
	return c.where, nil
}

// frame harms a frame of the kind, w or k.
func frame(kind byte, harm func([]byte) []byte) func([]byte) []byte {
	return func(f []byte) []byte {
		if f[0] != kind {
			return nil
		}
		return harm(f)
	}
}

// message25 harms the message of that kind, which stands behind the 25 bytes of its
// frame.
func message25(kind byte, harm func([]byte) []byte) func([]byte) []byte {
	return frame('w', func(f []byte) []byte {
		if f[25] != kind {
			return nil
		}
		return append(f[:25:25], harm(f[25:])...)
	})
}

func cut(n int) func([]byte) []byte { return func(m []byte) []byte { return m[:n] } }

func less(n int) func([]byte) []byte { return func(m []byte) []byte { return m[:len(m)-n] } }

func flip(at int, bit byte) func([]byte) []byte {
	return func(m []byte) []byte {
		flipped := append([]byte(nil), m...)
		flipped[at] ^= bit
		return flipped
	}
}

var malformedAt = regexp.MustCompile(`(?:message at|behind) ([0-9A-F]+/[0-9A-F]+): malformed`)

// A message of the walsender that is cut short, or has one bit flipped where it
// says what it is, ends the relay by an error that names its LSN, or that of the
// message before it where it has none any more. Nothing is passed over: the next
// relay reads it again, and every event stands in the stream once, in order.
//
// What flips inside a value (an id, a payload) looks like another value, and
// nobody can tell but TLS.
func TestMessagesCutAndFlipped(t *testing.T) {
	t.Parallel()
	b := setup(t)
	c, through := b.corrupting()
	_, err := b.sql.Exec(t.Context(), `create table elsewhere (id int primary key); alter publication outbox_relay add table elsewhere`)
	b.must(err)
	b.streaming().Terminate() // its first run makes the slot
	const named, frames = "malformed pgoutput message", "malformed replication message"
	var ids []string
	for _, h := range []struct {
		name  string
		harm  func([]byte) []byte
		words string
		later bool // what is wrong shows at a later message
	}{
		{"begin cut", message25('B', less(1)), named, false},
		{"begin's kind becomes a commit's", message25('B', flip(0, 1)), named, false},
		{"begin's commit LSN", message25('B', flip(8, 1)), named, true},
		{"relation cut in its columns", message25('R', less(7)), named, false},
		{"relation's OID", message25('R', flip(4, 1)), named, true},
		{"relation cut in a name", message25('R', less(14)), named, false},
		{"insert cut to its kind", message25('I', cut(1)), named, false},
		{"insert cut in its last column", message25('I', less(1)), named, false},
		{"insert becomes a logical message", message25('I', flip(0, 'I'^'M')), named, false},
		{"insert becomes a type", message25('I', flip(0, 'I'^'Y')), named, false},
		{"insert of another table", message25('I', flip(3, 0x80)), named, false},
		{"insert becomes an old row", message25('I', flip(5, 1)), named, false},
		{"insert has more columns", message25('I', flip(7, 2)), named, false},
		{"insert has a binary column", message25('I', flip(8, 't'^'d')), named, false},
		{"insert has a longer column", message25('I', flip(10, 1)), named, false},
		{"commit cut", message25('C', less(8)), named, false},
		{"commit's kind becomes a begin's", message25('C', flip(0, 1)), named, false},
		{"commit's LSN", message25('C', flip(9, 4)), named, false},
		{"commit's flags", message25('C', flip(1, 1)), named, false},
		{"commit's end", message25('C', flip(15, 1)), named, false},
		{"a message without a byte", frame('w', cut(25)), named, false},
		{"a frame cut in its LSN", frame('w', cut(5)), frames, false},
		{"a frame cut in its time", frame('w', cut(24)), frames, false},
		{"a frame of no kind", frame('w', flip(0, 8)), frames, false},
		{"a keepalive cut", frame('k', cut(9)), frames, false},
		{"a keepalive becomes data", frame('k', flip(0, 'k'^'w')), frames, false},
	} {
		t.Log(h.name)
		c.arm(h.harm)
		r := b.start(through)
		ids = append(ids, b.insert(2)...)
		b.exec(`insert into elsewhere select coalesce(max(id), 0) + 1 from elsewhere`)
		requireEnd(t, r, 1, h.words)
		where, err := c.harmed()
		b.must(err)
		said := malformedAt.FindStringSubmatch(r.Logs())
		if said == nil {
			t.Fatalf("%s: the error has no LSN:\n%s", h.name, r.Logs())
		}
		at, err := pglogrepl.ParseLSN(said[1])
		b.must(err)
		if at != where && (where != 0 || at == 0) && !(h.later && at > where) { // the first can name where the slot begins
			t.Fatalf("%s: harm was done at %s, and the error says %s:\n%s", h.name, where, at, r.Logs())
		}
	}
	c.arm(nil)
	r := b.streaming(through)
	b.requireStatus("published", ids)
	b.requireStream(ids)
	requireLeaves(t, r)
}

// A transaction that says that it commits where no WAL is yet leaves no
// checkpoint there: the next relay would pass over every event up to it.
func TestBeginBeyondTheEndOfWAL(t *testing.T) {
	t.Parallel()
	b := setup(t)
	c, through := b.corrupting()
	b.streaming().Terminate()
	c.arm(message25('B', flip(3, 1))) // bit 40 of the commit LSN
	r := b.start(through)
	ids := b.insert(30_000)
	requireEnd(t, r, 1, "malformed")
	c.arm(nil)
	r = b.streaming(through)
	ids = append(ids, b.insert(5)...)
	b.requireStatus("published", ids)
	b.requireStream(ids)
	requireLeaves(t, r)
}

// A keepalive that names WAL which is not written yet is not confirmed: the slot
// would pass over what is to come.
func TestKeepaliveBeyondTheEndOfWAL(t *testing.T) {
	t.Parallel()
	b := setup(t)
	c, through := b.corrupting()
	b.streaming().Terminate()
	c.arm(frame('k', flip(3, 1))) // bit 40 of the WAL end
	requireEnd(t, b.start(through), 1, "malformed")
	c.arm(nil)
	r := b.streaming(through)
	ids := b.insert(5)
	b.requireStatus("published", ids)
	b.requireStream(ids)
	requireLeaves(t, r)
}
