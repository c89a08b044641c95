package mux

import (
	"sync"
	"sync/atomic"
)

const (
	headerSize = 8 // of a muxado frame

	// A chunk with the largest payload fills four TLS records exactly.
	chunkSize  = 64 << 10
	maxPayload = chunkSize - headerSize
)

// A chunk is a pooled block of memory that bytes cross the session in.
//
// On the way out it holds one frame: the payload was read or copied to
// buf[headerSize:] and the header is laid in front of it when it is queued, so
// that the frame leaves in one write. It then has one owner at a time: who fills
// it, the writer's queue, who writes it.
//
// On the way in the transport was read into it and streams hold references to
// parts of it; the last one to release it returns it to its pool.
type chunk struct {
	buf   []byte
	refs  atomic.Int32
	class int // its pool

	// Set while it is queued in a writer.
	frame []byte  // what is still to be written
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
		c.frame, c.st, c.next = nil, nil, nil
		chunkPools[c.class].Put(c)
	}
}

// A segment is a part of a chunk that a stream received and nobody read yet.
type segment struct {
	c *chunk
	b []byte
}
