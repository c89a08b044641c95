package mux

import (
	"io"
	"net"
)

const (
	// A piece of a frame that is smaller than minRef is copied out of the chunk it
	// was read into, and so is everything once a stream holds maxRef unread bytes.
	// Otherwise a stopped reader's few bytes could hold many whole chunks.
	minRef = 16 << 10
	maxRef = 64 << 10

	// maxTake bounds what WriteTo takes from the queue for one write, and counts as
	// read when that is done. It is more than a chunk.
	maxTake = 256 << 10
)

// deliver queues b, which lies in c, for the stream's readers. The session's reader
// calls it.
func (st *Stream) deliver(c *chunk, b []byte) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed || st.reset {
		return // it ended meanwhile; nobody will read b
	}
	st.heard, st.kept = true, nil
	b = st.passLocked(b)
	if len(b) > 0 && !st.closed && !st.reset {
		st.queueInLocked(c, b)
	}
	st.wakeReadersLocked()
}

// queueInLocked queues b, which lies in c.
func (st *Stream) queueInLocked(c *chunk, b []byte) {
	unread := st.unread.Add(int64(len(b))) - int64(len(b))
	st.s.unread.Add(int64(len(b)))
	if len(b) >= minRef && unread <= maxRef {
		c.retain()
		st.segs = append(st.segs, segment{c, b})
		st.copied = false
	} else {
		st.copyInLocked(b, int(unread))
	}
}

// copyInLocked copies b behind what is unread, into chunks that only this stream
// holds.
func (st *Stream) copyInLocked(b []byte, unread int) {
	if n := len(st.segs); n > 0 && st.copied {
		last := &st.segs[n-1].b
		fits := min(len(b), cap(*last)-len(*last))
		*last = append(*last, b[:fits]...)
		b = b[fits:]
	}
	if len(b) > 0 {
		// The more is waiting, the larger the chunk, up to a whole one.
		own := getChunk(max(len(b), min(unread, chunkSize)))
		st.segs = append(st.segs, segment{own, append(own.buf[:0], b...)})
		st.copied = true
	}
}

func (st *Stream) dropUnreadLocked() {
	n := 0
	for _, seg := range st.segs {
		n += len(seg.b)
		seg.c.release()
	}
	st.segs = nil
	st.unread.Add(int64(-n))
	st.s.unread.Add(int64(-n))
}

// finishedByPeer handles a FIN. It ends a sink that has had everything.
func (st *Stream) finishedByPeer() {
	st.mu.Lock()
	if !st.reset {
		st.finRecv = true
		st.rerr = io.EOF
		st.heard, st.kept = true, nil
	}
	if k := st.sink; k != nil && !k.busy && k.err == nil {
		if _, err := st.readyLocked(); err == io.EOF { // w has had everything
			st.sink = nil
			st.unlock()
			k.done(k.n, nil)
			return
		}
	}
	st.wakeReadersLocked()
	st.unlock()
}

// heardOut reports whether a FIN would end nothing any more.
func (st *Stream) heardOut() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.finRecv || st.reset
}

// readyLocked reports whether something can be read, or why nothing will be.
func (st *Stream) readyLocked() (ready bool, err error) {
	if err := st.readErrLocked(); err != nil {
		return false, err
	}
	ready = len(st.segs) > 0
	if !ready {
		err = st.rerr
	}
	if ready || err != nil {
		st.taken = true
	}
	return ready, err
}

// awaitLocked waits until something can be read, and otherwise returns why not.
func (st *Stream) awaitLocked() error {
	for {
		if ready, err := st.readyLocked(); ready || err != nil {
			return err
		}
		st.readable.Wait()
	}
}

// Read reads what has arrived, at least one byte, waiting for it if need be.
func (st *Stream) Read(p []byte) (n int, err error) {
	st.mu.Lock()
	if len(p) == 0 {
		defer st.mu.Unlock()
		return 0, st.readErrLocked()
	}
	if n, err := st.awaitOfferingLocked(p); n > 0 || err != nil {
		st.mu.Unlock()
		return n, err
	}
	n = st.peekLocked(p)
	st.takeUnlock(n)
	return n, nil
}

// Discard passes over the next n bytes, no more than Peek has shown. It fails if this end
// has closed or reset the stream since.
func (st *Stream) Discard(n int) error {
	st.mu.Lock()
	if ready, err := st.readyLocked(); !ready {
		st.mu.Unlock()
		return err
	}
	st.takeUnlock(n)
	return nil
}

// takeUnlock counts the first n bytes as read, and releases the lock.
func (st *Stream) takeUnlock(n int) {
	done := 0
	for left := n; left > 0; done++ {
		seg := &st.segs[done]
		if len(seg.b) > left {
			seg.b = seg.b[left:]
			break
		}
		left -= len(seg.b)
		seg.c.release()
	}
	st.popLocked(done)
	st.consumedUnlock(n)
}

// An offer is the room of a Read that waits, for bulk that is read from the transport
// straight to there. The stream's lock guards it, but for the room while it is busy.
type offer struct {
	p    []byte // nil: nobody waits, or it was used
	n    int    // how much the session's reader wrote to it
	busy bool   // it does so now
	held bool   // and the Read waits for it to be done
}

// awaitOfferingLocked is awaitLocked, and offers p meanwhile if it is large. If the offer
// was taken it returns how much was read into p, and otherwise 0.
func (st *Stream) awaitOfferingLocked(p []byte) (n int, err error) {
	for {
		if ready, err := st.readyLocked(); ready || err != nil {
			return 0, err
		}
		o := &st.offer
		mine := o.p == nil && !o.busy && o.n == 0 && len(p) >= leastOffer
		if mine {
			o.p = p
		}
		st.readable.Wait()
		if mine {
			for o.busy {
				o.held = true
				st.readable.Wait()
			}
			n, *o = o.n, offer{}
			if n > 0 {
				return n, nil
			}
		}
	}
}

// leastOffer is how large the room of a Read has to be: what io.Copy has. With less there
// would be a call and a goroutine woken for each few bytes of a large frame.
const leastOffer = 32 << 10

// takeOffer returns room for up to n bytes of a Read that waits, until fillOffer is
// called, and nil if none does. The session's reader calls both.
func (st *Stream) takeOffer(n int) []byte {
	st.mu.Lock()
	defer st.mu.Unlock()
	o := &st.offer
	if o.p == nil || st.closed || st.reset || len(st.segs) > 0 || st.rdl.expired() {
		return nil
	}
	o.busy, st.taken = true, true
	return o.p[:min(n, len(o.p))]
}

// fillOffer gives back what takeOffer returned, with n bytes in it.
func (st *Stream) fillOffer(n int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	o := &st.offer
	o.busy = false
	if n > 0 {
		o.p, o.n = nil, n
		st.heard, st.kept = true, nil
		st.consumedLocked(n) // the reader flushes when it has handed out all it has
	}
	if n > 0 || o.held {
		st.readable.Broadcast()
	}
}

// wantsStraight reports whether a sink or a Read could have what comes without a way
// through memory of ours.
func (st *Stream) wantsStraight() (sink, read bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed || st.reset || len(st.segs) > 0 {
		return false, false
	}
	return st.sink != nil && !st.sink.busy, st.offer.p != nil
}

// Peek copies what can be read without waiting, and leaves it to be read.
func (st *Stream) Peek(p []byte) (n int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.peekLocked(p)
}

func (st *Stream) peekLocked(p []byte) (n int) {
	for _, seg := range st.segs {
		if n += copy(p[n:], seg.b); n == len(p) {
			break
		}
	}
	return n
}

// popLocked takes the first n segments from the queue.
func (st *Stream) popLocked(n int) {
	rest := copy(st.segs, st.segs[n:])
	clear(st.segs[rest:])
	st.segs = st.segs[:rest]
}

// consumedLocked counts n bytes as read, and gives window back when it is time, which it
// reports.
func (st *Stream) consumedLocked(n int) (update bool) {
	st.received += int64(n)
	st.lastRead.Store(st.s.reads.Add(1))
	if !st.finRecv && !st.reset {
		if inc := st.window.consumed(n, st); inc > 0 {
			st.s.out.windowUpdate(st.id, inc)
			update = true
		}
	}
	return update
}

// consumedUnlock is consumedLocked for bytes that waited, and releases the lock.
func (st *Stream) consumedUnlock(n int) {
	st.unread.Add(int64(-n))
	st.s.unread.Add(int64(-n))
	update := st.consumedLocked(n)
	st.unlock()
	if update {
		st.s.out.flush()
	}
}

// WriteTo writes what arrives to w until the peer's FIN, without copying it. A
// byte counts as read, for the window, when w has taken it.
func (st *Stream) WriteTo(w io.Writer) (total int64, err error) {
	out := newSegmentWriter(w)
	for {
		st.mu.Lock()
		if err := st.awaitLocked(); err != nil {
			st.mu.Unlock()
			if err == io.EOF {
				err = nil
			}
			return total, err
		}
		n, err := st.writeOutUnlock(out, w)
		total += n
		if err != nil {
			return total, err
		}
	}
}

// writeOutUnlock releases the lock and writes some of what waits to w.
func (st *Stream) writeOutUnlock(out *segmentWriter, w io.Writer) (n int64, err error) {
	take, size := 0, 0
	for take < len(st.segs) && size+len(st.segs[take].b) <= maxTake {
		size += len(st.segs[take].b)
		take++
	}
	out.segs = append(out.segs[:0], st.segs[:take]...)
	st.popLocked(take)
	st.mu.Unlock()

	n, err = out.write(w)

	st.mu.Lock()
	st.received -= out.size - n // what w did not take is dropped, not read
	st.consumedUnlock(int(out.size))
	return n, err
}

// segmentWriter writes segments and releases them.
type segmentWriter struct {
	segs   []segment
	size   int64 // of the segments last written, whether or not that succeeded
	gather bool  // the writer takes several buffers in one call
	bufs   net.Buffers
	rest   net.Buffers
}

func newSegmentWriter(w io.Writer) *segmentWriter {
	_, gather := w.(*net.TCPConn)
	return &segmentWriter{gather: gather}
}

func (o *segmentWriter) write(w io.Writer) (n int64, err error) {
	o.size = 0
	o.bufs = o.bufs[:0]
	for _, seg := range o.segs {
		o.size += int64(len(seg.b))
		o.bufs = append(o.bufs, seg.b)
	}
	if o.gather && len(o.bufs) > 1 {
		o.rest = o.bufs
		n, err = o.rest.WriteTo(w)
	} else {
		for _, b := range o.bufs {
			var m int
			m, err = w.Write(b)
			n += int64(m)
			if err != nil {
				break
			}
		}
	}
	clear(o.bufs)
	for i, seg := range o.segs {
		seg.c.release()
		o.segs[i] = segment{}
	}
	return n, err
}
