package mux

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/tcprelay/relay/internal/splice"
)

const (
	headerSize = 8 // of a muxado frame

	// A chunk with the largest payload fills four TLS records exactly.
	chunkSize  = 64 << 10
	maxPayload = chunkSize - headerSize

	// maxPiped is the largest payload that leaves by a pipe, or from where a Write has it:
	// half of an initial window, so that one is on its way while the next is made.
	maxPiped = Window / 2
)

// A chunk is a pooled block of memory that bytes cross the session in.
//
// On the way out it holds one frame: the payload was read or copied to
// buf[headerSize:] and the header is laid in front of it when it is queued, so
// that the frame leaves in one write. It then has one owner at a time: who fills
// it, the writer's queue, who writes it. Bulk that goes from one socket to another does
// not pass through memory: the chunk has the header then, and the payload is in a pipe.
//
// On the way in the transport was read into it and streams hold references to
// parts of it; the last one to release it returns it to its pool.
type chunk struct {
	buf   []byte
	refs  atomic.Int32
	class int // its pool

	pipe *splice.Pipe // nil: the payload is in buf

	// Set while it is queued in a writer.
	frame []byte  // what is still to be written, but for what is in the pipe
	st    *Stream // whose frame it is
	next  *chunk
}

// Three sizes: for messages, for small transfers and for bulk.
var (
	chunkSizes = [...]int{2 << 10, 16 << 10, chunkSize}
	chunkPools [len(chunkSizes)]sync.Pool
)

// getChunk returns a chunk of at least size bytes, or of chunkSize when size is
// more than that. The caller holds its one reference.
func getChunk(size int) *chunk {
	class := 0
	for class < len(chunkSizes)-1 && size > chunkSizes[class] {
		class++
	}
	c, ok := chunkPools[class].Get().(*chunk)
	if !ok {
		c = &chunk{buf: make([]byte, chunkSizes[class]), class: class}
	}
	c.refs.Store(1)
	return c
}

func (c *chunk) retain() { c.refs.Add(1) }

func (c *chunk) release() {
	if c.refs.Add(-1) == 0 {
		if c.pipe != nil {
			c.pipe.Put()
		}
		c.pipe, c.frame, c.st, c.next = nil, nil, nil, nil
		chunkPools[c.class].Put(c)
	}
}

// size returns how much of the frame is still to be written.
func (c *chunk) size() int {
	if c.pipe != nil {
		return len(c.frame) + c.pipe.Held()
	}
	return len(c.frame)
}

// payload returns the n bytes of the frame that is to be made of c. It copies them out of
// the pipe if they are in one, and then must be called only once.
func (c *chunk) payload(n int) []byte {
	if c.pipe == nil {
		return c.buf[headerSize : headerSize+n]
	}
	return c.unpiped(n)
}

//go:noinline // see writer.writeRaw
func (c *chunk) unpiped(n int) []byte {
	b := make([]byte, n)
	for at := 0; at < n; {
		m, err := c.pipe.Read(b[at:])
		if err != nil || m == 0 {
			panic(fmt.Sprintf("mux: %d of %d bytes are in a pipe: %v", at, n, err)) // they were put there
		}
		at += m
	}
	return b
}

// A segment is a part of a chunk that a stream received and nobody read yet.
type segment struct {
	c *chunk
	b []byte
}
