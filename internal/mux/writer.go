package mux

import (
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"time"

	"github.com/tcprelay/relay/internal/socket"
	"github.com/tcprelay/relay/internal/splice"
)

const (
	// smallData is the largest payload that is copied into the buffer of small
	// frames instead of travelling in a chunk of its own.
	smallData = 4 << 10
	// smallQueue is where data stops joining that buffer, which must have room
	// for control frames.
	smallQueue = 64 << 10
	// congested is where Open gives up, and overflow where the session ends: the
	// peer asks for replies and does not read them.
	congested = 1 << 20
	overflow  = 4 << 20

	// streamFrames is how many frames of one stream may wait in chunks: one to be
	// written while the next is made. It is what makes streams take turns.
	streamFrames = 2
	// batchFrames and batchBytes bound what of the chunks leaves in one batch, and
	// with it how long a small frame waits behind bulk.
	batchFrames = 64
	batchBytes  = 256 << 10
	// paceTime is how long the flusher has to be held up by the transport for its rate to
	// be measured, and unsentTime is for how long at that rate the system may hold what it
	// cannot send yet, where it lets itself be told: a small frame waits behind that. It
	// costs a fast transport more than it gains, which has no such limit but in a crowd.
	paceTime                = 50 * time.Millisecond
	unsentTime              = 10 * time.Millisecond
	leastUnsent, mostUnsent = 64 << 10, 2 << 20
	// inlineBatches is how many batches a caller writes, other streams' frames
	// among them, before it leaves the rest to the flusher.
	inlineBatches = 2

	// goodbyeTime bounds the last writes of a session that ends.
	goodbyeTime = 250 * time.Millisecond
)

var errOverflow = &SessionError{Code: EnhanceYourCalm, Err: errors.New("too many frames wait to be sent")}

// A writer is the one way out of a session. Frames are queued under its lock and
// written by whoever finds the transport free: the caller, as far as a socket takes
// bytes without blocking, and otherwise the flusher. Frames that are queued
// meanwhile leave together in the next write.
//
// There are two queues. Control frames and small data frames are laid one behind
// the other in a buffer; larger frames wait in chunks of their own, in turn. A
// batch is the whole buffer and then some chunks, and a stream with a frame in a
// chunk adds no small frames, so each stream's frames leave in order. A large Write that
// finds both queues empty sends its frame past them, as a batch of its own.
type writer struct {
	conn net.Conn
	dst  io.Writer     // what is written to: conn
	raw  *rawWriter    // nil if the transport is no plain socket
	fail func(error)   // ends the session
	read chan struct{} // closed when the session's reader has ended

	wrote stamp // the last write that the transport took something of

	mu         sync.Mutex
	wake       sync.Cond // the flusher waits here
	enc        encoder
	small      []byte
	head, tail *chunk
	bulk       int   // bytes in chunks' memory
	piped      int   // and in their pipes
	total      int64 // bytes that left the queues, ever
	busy       bool  // a batch is being written
	handed     bool  // the flusher has to write it
	err        error // nothing can be sent any more; the flusher reports it
	closing    bool  // nothing more is queued
	last       uint32
	code       Code        // of the final GOAWAY
	kill       *time.Timer // cuts the goodbye short; nil before hurry
	over       bool        // the flusher has ended

	header [headerSize]byte // of a frame that sendDirect sends

	// The batch; it belongs to who made the writer busy.
	spare  []byte // small's other buffer
	out    []byte // what is left of the small frames
	chunks *chunk // what is left of the others
	bufs   [][]byte
	rest   net.Buffers // what is left of bufs; a field, so that it is not allocated
	passed int64       // bytes of it that the transport took, until notePassed

	unsent int // what the system is to hold by the transport's pace; 0: as much as it likes
	crowd  crowd
}

func (w *writer) init(conn net.Conn, fail func(error)) {
	w.conn, w.fail = conn, fail
	w.read = make(chan struct{})
	w.raw = newRawWriter(conn)
	w.dst = conn
	if w.raw == nil {
		// A type that embeds a *net.TCPConn has its way to write several buffers at
		// once, past the Write of its own.
		w.dst = struct{ io.Writer }{conn}
	}
	w.wrote.start()
	w.wake.L = &w.mu
	w.enc.init()
}

// open queues the frame that opens a stream. It never carries a FIN: a stock peer
// would close its own side for it.
func (w *writer) open(id uint32, opening []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.small) > congested {
		return ErrCongested
	}
	w.small = w.enc.appendData(w.small, id, opening, true, false)
	return nil
}

func (w *writer) windowUpdate(id uint32, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.takesLocked() {
		w.small = w.enc.appendWndInc(w.small, id, n)
	}
}

func (w *writer) reset(id uint32, code Code) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.takesLocked() {
		w.small = w.enc.appendRst(w.small, id, code)
	}
}

// finish queues a stream's FIN, if fin, and then an RST that says that it reads no
// more, if stop; both behind what the stream has sent.
func (w *writer) finish(st *Stream, fin, stop bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.takesLocked() {
		return
	}
	lay := func(b []byte) []byte {
		if fin {
			b = w.enc.appendData(b, st.id, nil, false, true)
		}
		if stop {
			b = w.enc.appendRst(b, st.id, StreamClosed)
		}
		return b
	}
	if st.frames == 0 {
		w.small = lay(w.small)
		return
	}
	c := getChunk(2 * headerSize)
	c.frame = lay(c.buf[:0])
	w.pushLocked(c, st)
}

// data queues p, at most a window's worth, if that needs no chunk.
func (w *writer) data(st *Stream, p []byte) bool {
	if len(p) > smallData {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if st.frames > 0 || len(w.small)+len(p) > smallQueue || !w.takesLocked() {
		return false
	}
	w.small = w.enc.appendData(w.small, st.id, p, false, false)
	w.crowd.small(st)
	return true
}

// bulkData queues the n bytes behind the header room of c, or in its pipe, and takes c over.
func (w *writer) bulkData(st *Stream, c *chunk, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.takesLocked() {
		c.release()
		return
	}
	if c.pipe != nil {
		c.frame = w.enc.headerOf(c.buf, st.id, n)
	} else {
		c.frame = w.enc.frameInPlace(c.buf, st.id, n)
	}
	w.crowd.large(st)
	w.pushLocked(c, st)
}

func (w *writer) pushLocked(c *chunk, st *Stream) {
	c.st = st
	st.frames++
	w.bulk += len(c.frame)
	w.piped += c.size() - len(c.frame)
	if w.head == nil {
		w.head = c
	} else {
		w.tail.next = c
	}
	w.tail = c
}

// takesLocked reports whether frames are still taken.
func (w *writer) takesLocked() bool {
	if len(w.small) > overflow && w.err == nil {
		w.err = errOverflow
		go w.fail(errOverflow) // the flusher is stuck, and the caller holds locks
	}
	return !w.closing && w.err == nil
}

// room reports how much of want a frame of st may carry now, 0 if it has to wait.
// The more waits in all, the smaller the frames, so that a crowd of streams on a
// slow transport neither holds much memory nor makes the others wait long; what is in pipes
// counts late on a fast one, for it is no memory of ours and soon gone. It is a
// guide, not a reservation: the frame counts when it is queued.
func (w *writer) room(st *Stream, want int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	waits := w.bulk
	if w.unsent > 0 { // a slow transport
		waits += w.piped
		want = min(want, maxPayload)
	}
	switch {
	case st.frames >= streamFrames:
		return 0
	case w.bulk+w.piped >= 4<<20:
		return min(want, 2<<10-headerSize)
	case waits >= 512<<10:
		return min(want, 16<<10-headerSize)
	}
	return want
}

// flush sends what is queued unless somebody does already. It does not wait for
// the transport.
func (w *writer) flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.flushableLocked() {
		return
	}
	if w.yieldLocked(); !w.flushableLocked() {
		return // somebody else took ours along
	}
	w.busy = true
	if w.raw != nil {
		for range inlineBatches {
			w.takeBatchLocked()
			w.mu.Unlock()
			all, err := w.writeRaw()
			w.notePassed()
			w.mu.Lock()
			if err != nil {
				w.err = err
			}
			if err != nil || !all {
				break
			}
			if !w.queuedLocked() || w.closing {
				w.busy = false
				if w.closing || w.err != nil {
					w.wake.Signal()
				}
				return
			}
		}
	}
	w.handed = true
	w.wake.Signal()
}

// sendDirect sends a frame of st with the payload p, if nothing else is to be sent before,
// and reports whether it did. What the transport does not take at once is copied. It needs a
// transport that is a plain socket.
func (w *writer) sendDirect(st *Stream, p []byte) bool {
	w.mu.Lock()
	if w.busy || w.closing || w.err != nil || w.queuedLocked() || st.frames > 0 {
		w.mu.Unlock()
		return false
	}
	w.busy = true
	header := w.enc.headerOf(w.header[:], st.id, len(p))
	w.total += int64(len(header) + len(p))
	w.crowd.large(st)
	w.lookLocked()
	w.mu.Unlock()

	n, err := w.raw.writeBehind(header, p)
	w.passed += int64(n)
	w.notePassed()
	frames := 0
	if err == nil {
		frames = w.copyRest(st, header, p, n)
	}

	w.mu.Lock()
	st.frames += frames
	if err != nil {
		w.err = err
	}
	if w.err != nil || frames > 0 {
		w.handed = true
		w.wake.Signal()
		w.mu.Unlock()
		return true
	}
	w.busy = false
	if w.closing {
		w.wake.Signal()
	}
	w.mu.Unlock()
	w.flush() // what others have queued meanwhile
	return true
}

// copyRest makes the batch what is left of a frame of which n bytes were written, and
// returns in how many chunks that is.
func (w *writer) copyRest(st *Stream, header, p []byte, n int) (chunks int) {
	last := &w.chunks
	for n < len(header)+len(p) {
		rest := p[max(n-len(header), 0):]
		if n < len(header) {
			rest = header[n:]
		}
		c := getChunk(len(rest))
		c.frame = c.buf[:copy(c.buf, rest)]
		c.st = st
		n += len(c.frame)
		*last, last = c, &c.next
		chunks++
	}
	return chunks
}

func (w *writer) flushableLocked() bool {
	return !w.busy && !w.closing && w.err == nil && w.queuedLocked()
}

// yieldLocked lets other goroutines run first, which often have small frames to add
// that then leave in the same write. Measured, it pays even for one stream alone, whose
// reader gets to wait for the answer before the question leaves. Frames in chunks are
// worth a write of their own at once. The lock is released meanwhile.
func (w *writer) yieldLocked() {
	if w.head != nil {
		return
	}
	w.mu.Unlock()
	runtime.Gosched()
	w.mu.Lock()
}

// sentBytes counts the bytes that left the queues.
func (w *writer) sentBytes() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.total
}

func (w *writer) queuedLocked() bool { return len(w.small) > 0 || w.head != nil }

// takeBatchLocked makes the next batch of what is queued.
func (w *writer) takeBatchLocked() {
	w.lookLocked()
	if cap(w.spare) > 2*smallQueue {
		w.spare = nil // a burst is over
	}
	w.out, w.small, w.spare = w.small, w.spare[:0], w.small
	var last *chunk
	n, size, most := 0, 0, batchBytes
	if w.unsent > 0 {
		most = min(most, w.unsent)
	}
	for c := w.head; c != nil && n < batchFrames && size < most; c = c.next {
		last = c
		n++
		size += c.size()
		w.bulk -= len(c.frame)
		w.piped -= c.size() - len(c.frame)
	}
	w.total += int64(len(w.out) + size)
	if last != nil {
		w.chunks, w.head = w.head, last.next
		last.next = nil
	}
	if w.head == nil {
		w.tail = nil
	}
}

// writeRaw writes what the kernel takes of the batch at once and reports whether
// that was all.
//
// This is the deepest that most goroutines of a stream get, and only just fits into
// the stack that a goroutine starts with. A few bytes more in the frames of Stream.Write,
// flush or this function, such as of another variable, and each of them has to copy its
// stack: a tenth of the time that a short stream takes.
func (w *writer) writeRaw() (all bool, err error) {
	for len(w.out) > 0 {
		n, err := w.raw.write(w.out)
		w.passed += int64(n)
		w.out = w.out[n:]
		if err != nil || len(w.out) > 0 {
			return false, err
		}
	}
	for c := w.chunks; c != nil; c = w.chunks {
		if c.pipe != nil {
			if all, err := w.writePiped(c, false); !all {
				return false, err
			}
			continue
		}
		n, err := w.raw.write(c.frame)
		w.passed += int64(n)
		c.frame = c.frame[n:]
		if err != nil || len(c.frame) > 0 {
			return false, err
		}
		w.sent(c)
	}
	return true, nil
}

// writePiped writes the batch's next chunk, whose payload is in a pipe, and reports whether
// that was all of it.
//
//go:noinline // see writeRaw
func (w *writer) writePiped(c *chunk, wait bool) (all bool, err error) {
	n, err := w.raw.writePiped(c, wait)
	w.passed += int64(n)
	if all = c.size() == 0 && err == nil; all {
		w.sent(c)
	}
	return all, err
}

// notePassed keeps the time if the transport took anything since it was called last.
//
//go:noinline // see writeRaw
func (w *writer) notePassed() {
	if w.passed > 0 {
		w.passed = 0
		w.wrote.now()
	}
}

// writeBlocking writes the batch, however long it takes.
func (w *writer) writeBlocking() error {
	for len(w.out) > 0 || w.chunks != nil {
		if len(w.out) == 0 && w.chunks.pipe != nil {
			_, err := w.writePiped(w.chunks, true)
			w.notePassed()
			if err != nil {
				return err
			}
			continue
		}
		if err := w.writeBuffers(); err != nil {
			return err
		}
	}
	return nil
}

// writeBuffers writes of the batch what is in memory, up to the first pipe.
func (w *writer) writeBuffers() error {
	bufs := w.bufs[:0]
	if len(w.out) > 0 {
		bufs = append(bufs, w.out)
	}
	c := w.chunks
	for ; c != nil && c.pipe == nil; c = c.next {
		bufs = append(bufs, c.frame)
	}
	if cap(bufs) > cap(w.bufs) {
		w.bufs = bufs
	}
	w.rest = bufs
	n, err := w.rest.WriteTo(w.dst)
	w.passed += n
	w.notePassed()
	if err != nil {
		return err
	}
	w.out = nil
	for w.chunks != c {
		w.sent(w.chunks)
	}
	return nil
}

// sent takes c, which was written, from the batch, and lets its stream go on.
func (w *writer) sent(c *chunk) {
	st := c.st
	w.chunks = c.next
	c.release()
	w.mu.Lock()
	st.frames--
	w.mu.Unlock()
	st.wakeWriters()
}

// run is the flusher. It writes the batches that are handed to it, reports the
// writer's error, and after close says goodbye, closes the transport and ends.
func (w *writer) run() {
	splice.Enter()
	w.mu.Lock()
	for {
		for !w.handed && w.err == nil && (!w.closing || w.busy) {
			w.wake.Wait()
		}
		if w.closing && (!w.busy || w.handed) {
			break
		}
		if w.err != nil {
			err := w.err
			w.mu.Unlock()
			// A peer that closed may have sent its last frames before. The reader takes
			// them, and meets the end of the transport itself.
			select {
			case <-w.read:
			case <-time.After(goodbyeTime):
			}
			w.fail(err) // which closes w
			w.mu.Lock()
			for !w.closing || w.busy && !w.handed {
				w.wake.Wait()
			}
			break
		}
		w.writeHandedLocked()
	}
	w.writeHandedLocked() // first what is queued in chunks, which a GOAWAY would overtake
	if w.err == nil {
		w.small = w.enc.appendGoAway(w.small, w.last, w.code)
		w.writeHandedLocked()
	}
	said := w.err == nil
	w.head.releaseAll()
	w.chunks.releaseAll()
	w.head, w.tail, w.chunks, w.small, w.spare, w.out = nil, nil, nil, nil, nil, nil
	w.mu.Unlock()
	if half, ok := w.conn.(interface{ CloseWrite() error }); ok && said && half.CloseWrite() == nil {
		// A socket that is closed with bytes unread resets, and the last frames may
		// be lost. The reader reads on until the peer closes; kill bounds the wait.
		<-w.read
	}
	w.conn.Close()
	splice.Leave()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = true
	if w.kill != nil {
		w.kill.Stop()
	}
}

// writeHandedLocked writes until nothing is left, and then frees the writer.
func (w *writer) writeHandedLocked() {
	begun, before := time.Now(), w.total
	for w.err == nil {
		if took := time.Since(begun); took >= paceTime {
			w.pace(w.total-before, took)
			begun, before = time.Now(), w.total
		}
		if len(w.out) == 0 && w.chunks == nil {
			if !w.queuedLocked() {
				break
			}
			w.takeBatchLocked()
		}
		w.mu.Unlock()
		err := w.writeBlocking()
		w.mu.Lock()
		if err != nil && w.err == nil {
			w.err = err
		}
	}
	w.busy, w.handed = false, w.err != nil
}

// pace has the system hold no more than leaves soon, at the rate at which the transport
// takes bytes from a flusher that always has some.
func (w *writer) pace(n int64, took time.Duration) {
	unsent := max(leastUnsent, int(float64(n)*float64(unsentTime)/float64(took)))
	if unsent > mostUnsent {
		unsent = 0
	}
	if unsent == w.unsent || w.unsent/2 < unsent && unsent/2 < w.unsent {
		return
	}
	w.unsent = unsent
	w.limitLocked()
}

// lookLocked looks now and then whether there is a crowd.
func (w *writer) lookLocked() {
	if w.crowd.look(w.wrote.time()) {
		w.limitLocked()
	}
}

// limitLocked tells the system how much it may hold.
func (w *writer) limitLocked() {
	n := w.unsent
	if w.crowd.here && (n == 0 || n > crowdUnsent) {
		n = crowdUnsent
	}
	socket.LimitUnsent(w.conn, n)
}

// close lets the flusher send what is queued and a GOAWAY, and close the transport
// when the peer has or hurry's time is up. It does not wait for it.
func (w *writer) close(last uint32, code Code) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closing, w.last, w.code = true, last, code
	w.wake.Signal()
}

// hurry gives the goodbye goodbyeTime from now.
func (w *writer) hurry() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closing && !w.over && w.kill == nil {
		w.kill = time.AfterFunc(goodbyeTime, func() { hardClose(w.conn) })
	}
}

// hardClose closes conn without a word. Closing a tls.Conn sends an alert first,
// which can wait for seconds.
func hardClose(conn net.Conn) {
	if c, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = c.NetConn()
	}
	conn.Close()
}

func (c *chunk) releaseAll() {
	for c != nil {
		next := c.next
		c.release()
		c = next
	}
}
