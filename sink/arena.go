package sink

const (
	chunkSize  = 256 << 10
	spareLimit = 16 // chunks that are kept for what comes next
)

// arena holds the bytes of events that leave in the order in which they came:
// chunks are filled one after the other and used again, so that an event costs no
// allocation, and what is held is what is in use and a little more, whatever the
// sizes of events have been. Not safe for concurrent use.
type arena struct {
	chunks []chunk // the oldest first; the last one is being filled
	spare  [][]byte
}

type chunk struct {
	bytes []byte // up to its length it is taken
	parts int    // that were not released
}

// take returns an empty slice with room for n bytes, and for no more.
func (a *arena) take(n int) []byte {
	last := len(a.chunks) - 1
	if last < 0 || cap(a.chunks[last].bytes)-len(a.chunks[last].bytes) < n {
		a.chunks = append(a.chunks, chunk{bytes: a.empty(n)})
		last++
	}
	c := &a.chunks[last]
	begin := len(c.bytes)
	c.bytes = c.bytes[:begin+n]
	c.parts++
	return c.bytes[begin:begin:len(c.bytes)]
}

// release gives the oldest part back.
func (a *arena) release() {
	oldest := &a.chunks[0]
	if oldest.parts--; oldest.parts > 0 {
		return
	}
	if cap(oldest.bytes) == chunkSize && len(a.spare) < spareLimit {
		a.spare = append(a.spare, oldest.bytes[:0])
	}
	n := copy(a.chunks, a.chunks[1:])
	a.chunks[n] = chunk{}
	a.chunks = a.chunks[:n]
}

// empty returns a chunk for a part of n bytes: one of its own where that is large.
func (a *arena) empty(n int) []byte {
	if n > chunkSize {
		return make([]byte, 0, n)
	}
	last := len(a.spare) - 1
	if last < 0 {
		return make([]byte, 0, chunkSize)
	}
	c := a.spare[last]
	a.spare = a.spare[:last]
	return c
}
