package mux

import (
	"io"

	"github.com/tcprelay/relay/internal/splice"
)

// turnLocked waits until no other Write is under way, so that what one Write sends
// is not mixed with another's.
func (st *Stream) turnLocked() error {
	for {
		if err := st.writeErrLocked(); err != nil {
			return err
		}
		if !st.writing {
			st.writing = true
			return nil
		}
		st.writable.Wait()
	}
}

func (st *Stream) endTurnLocked() {
	st.writing = false
	st.writable.Broadcast()
}

// creditLocked waits until some of want bytes may be sent, and returns how many.
func (st *Stream) creditLocked(want int) (int, error) {
	for {
		if err := st.writeErrLocked(); err != nil {
			return 0, err
		}
		if st.send > 0 {
			if n := min(st.send, st.s.out.room(st, want)); n > 0 {
				return n, nil
			}
		}
		st.writable.Wait()
	}
}

// wakeWriters tells the writers that there may be room for a frame.
func (st *Stream) wakeWriters() {
	st.mu.Lock()
	st.wakeWritersLocked()
	st.mu.Unlock()
}

func (st *Stream) wakeWritersLocked() { st.writable.Broadcast() }

// Write queues p, in frames, and sends what the transport takes at once. It waits
// for window and for the stream's turn. The n bytes it returns are in whole frames
// that will be sent in order; it keeps no reference to p.
func (st *Stream) Write(p []byte) (n int, err error) {
	if len(p) >= leastDirect && st.s.out.raw != nil {
		return st.writeLarge(p)
	}
	st.mu.Lock()
	if err := st.turnLocked(); err != nil {
		st.mu.Unlock()
		return 0, err
	}
	for n < len(p) {
		m, err := st.creditLocked(min(len(p)-n, maxPayload))
		if err != nil {
			st.endTurnLocked()
			st.mu.Unlock()
			return n, err
		}
		st.queueLocked(p[n : n+m])
		n += m
		if n < len(p) {
			st.mu.Unlock()
			st.s.out.flush()
			st.mu.Lock()
		}
	}
	st.endTurnLocked()
	st.mu.Unlock()
	st.s.out.flush()
	return n, nil
}

// leastDirect is how large a frame has to be that is sent from where it stands: a smaller
// one is worth its copy, for it may leave together with others.
const leastDirect = 16 << 10

// writeLarge is Write of much. A frame that need not wait for others leaves from p itself.
// It stands apart so that the stack of a small Write stays small; see writer.writeRaw.
func (st *Stream) writeLarge(p []byte) (n int, err error) {
	st.mu.Lock()
	if err := st.turnLocked(); err != nil {
		st.mu.Unlock()
		return 0, err
	}
	for n < len(p) {
		var m int
		if m, err = st.creditLocked(min(len(p)-n, maxPiped)); err != nil {
			break
		}
		if m >= leastDirect && st.kept == nil {
			st.mu.Unlock()
			sent := st.s.out.sendDirect(st, p[n:n+m])
			st.mu.Lock()
			if sent { // nobody else has used the credit, for we have the turn
				st.send -= m
				st.sent += int64(m)
				n += m
				continue
			}
			if err = st.writeErrLocked(); err != nil {
				break
			}
		}
		m = min(m, maxPayload)
		st.queueLocked(p[n : n+m])
		n += m
		st.mu.Unlock()
		st.s.out.flush()
		st.mu.Lock()
	}
	st.endTurnLocked()
	st.mu.Unlock()
	return n, err
}

// queueLocked queues a copy of p, for which there is credit.
func (st *Stream) queueLocked(p []byte) {
	if st.kept != nil {
		st.keepLocked(p)
	}
	st.send -= len(p)
	st.sent += int64(len(p))
	if !st.s.out.data(st, p) {
		c := getChunk(headerSize + len(p))
		copy(c.buf[headerSize:], p)
		st.s.out.bulkData(st, c, len(p))
	}
}

// ReadFrom sends what it reads from r until EOF. Bytes are read straight into the
// frame that carries them, and from a socket without holding memory while it waits. While
// there is much in a socket, it goes to that of the session through pipes.
func (st *Stream) ReadFrom(r io.Reader) (total int64, err error) {
	raw := newRawReader(r)
	size := chunkSizes[0]
	for {
		st.mu.Lock()
		if size > chunkSize && (raw == nil || st.s.out.raw == nil || st.kept != nil) {
			size = chunkSize
		}
		room, err := st.creditLocked(max(size-headerSize, maxPayload))
		st.mu.Unlock()
		if err != nil {
			return total, err
		}
		limit := min(room, size-headerSize)
		var c *chunk
		var n int
		if raw != nil {
			c, n, err = raw.read(limit, size > chunkSize && limit >= splice.Least)
		} else {
			c = getChunk(headerSize + limit)
			n, err = r.Read(c.buf[headerSize : headerSize+limit])
		}
		if n > 0 {
			sent, werr := st.sendChunk(c, n)
			total += int64(sent)
			if werr != nil && (err == nil || err == io.EOF) {
				return total, werr // otherwise what r says comes first, which may not show again
			}
		} else if c != nil {
			c.release()
		}
		if err != nil {
			if err == io.EOF {
				err = nil
			}
			return total, err
		}
		size = nextSize(size, n, limit)
	}
}

// nextSize chooses the size of the next read by how far the last one filled its own. That
// behind the last of the chunks is a pipe's.
func nextSize(size, n, limit int) int {
	switch {
	case n == limit:
		for _, s := range chunkSizes {
			if s > size {
				return s
			}
		}
		return headerSize + maxPiped
	case n < chunkSizes[0]/2:
		return chunkSizes[0]
	case n < splice.Least:
		return min(size, chunkSizes[1])
	}
	return size
}

// sendChunk sends the n bytes behind the header room of c and takes c over. Window
// for them was there when they were read, but a Write may have used it since.
func (st *Stream) sendChunk(c *chunk, n int) (sent int, err error) {
	st.mu.Lock()
	if err = st.turnLocked(); err != nil {
		st.unsentLocked(c, n)
		st.mu.Unlock()
		c.release()
		return 0, err
	}
	m, err := st.creditLocked(n)
	switch {
	case err != nil:
		st.unsentLocked(c, n)
		c.release()
	case m == n && n > smallData && (c.pipe == nil || st.kept == nil):
		if st.kept != nil {
			st.keepLocked(c.buf[headerSize : headerSize+n])
		}
		st.send -= n
		st.sent += int64(n)
		st.s.out.bulkData(st, c, n)
		sent = n
	default:
		p := c.payload(n)
		for err == nil {
			m = min(m, maxPayload)
			st.queueLocked(p[:m])
			sent += m
			if p = p[m:]; len(p) == 0 {
				break
			}
			st.mu.Unlock()
			st.s.out.flush()
			st.mu.Lock()
			m, err = st.creditLocked(len(p))
		}
		if err != nil {
			st.keepUnsentLocked(p)
		}
		c.release()
	}
	st.endTurnLocked()
	st.mu.Unlock()
	st.s.out.flush()
	return sent, err
}
