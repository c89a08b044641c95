package mux

import (
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A Stream is a net.Conn within a session. Its methods may be called from any
// goroutine. Close, CloseWrite, SetLinger and the deadlines never wait.
//
// Errors are io.EOF after the peer's FIN, net.ErrClosed after Close,
// syscall.EPIPE for a Write after CloseWrite, os.ErrDeadlineExceeded, a
// *StreamError after a reset, and a *SessionError when the session was lost.
type Stream struct {
	s      *Session
	id     uint32
	frames int // chunks in the writer; guarded by writer.mu

	unread   atomic.Int64 // bytes in segs, and those that WriteTo is writing
	lastRead atomic.Int64 // when bytes were consumed last, in reads of the session
	shed     atomic.Bool  // to keep the session within its limit

	mu       sync.Mutex
	readable sync.Cond // bytes, an error or a deadline for the readers
	writable sync.Cond // window, room, the turn, an error or a deadline for the writers

	// Receiving.
	segs     []segment
	offer    offer
	copied   bool // the last segment's chunk is ours alone, to be filled up
	heard    bool // the peer has sent DATA or a FIN
	taken    bool // a reader got some of that, or the end
	window   recvWindow
	rerr     error // what a reader gets behind the last segment
	finRecv  bool
	received int64 // bytes consumed
	rdl      deadline
	sink     *sink // nil: those who call Read or WriteTo get the bytes

	// Sending.
	send    int   // what the peer lets us send
	writing bool  // a Write has the turn
	werr    error // what a writer gets
	finSent bool
	sent    int64 // bytes queued
	wdl     deadline
	kept    *kept // since Keep; nil before, and when it was dropped

	closed  bool // Close was called
	reset   bool // an RST was sent or received: nothing more crosses the wire
	abrupt  bool // Close resets: SetLinger(0)
	removed bool // from the session's table
	bulky   bool // the last frame was large; guarded by writer.mu
	onEnd   func(error)
}

func newStream(s *Session, id uint32) *Stream {
	st := &Stream{s: s, id: id, send: Window}
	st.window.init()
	st.lastRead.Store(s.reads.Load())
	st.readable.L = &st.mu
	st.writable.L = &st.mu
	return st
}

// unlock releases st.mu, and takes a stream that is over, on the wire and for its
// reader, out of the session's table. Every change of that state ends with it.
func (st *Stream) unlock() {
	over := !st.removed &&
		(st.reset || st.finSent && st.finRecv) &&
		(st.closed || st.unread.Load() == 0)
	if over {
		st.removed = true
		st.s.grown.Add(-st.window.grown())
	}
	st.mu.Unlock()
	if over {
		st.s.remove(st.id)
	}
}

// Session returns the session that the stream belongs to.
func (st *Stream) Session() *Session { return st.s }

// ID returns the stream's number in its session.
func (st *Stream) ID() uint32 { return st.id }

// LocalAddr returns the transport's local address.
func (st *Stream) LocalAddr() net.Addr { return st.s.LocalAddr() }

// RemoteAddr returns the transport's remote address.
func (st *Stream) RemoteAddr() net.Addr { return st.s.RemoteAddr() }

// Counts returns how many bytes were sent and how many received and consumed.
func (st *Stream) Counts() (sent, received int64) {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.sent, st.received
}

// Progress is how far a stream has come.
type Progress struct {
	Sent     int64 // bytes that Write and ReadFrom have queued, and what opened the stream
	Received int64 // bytes that the reader of this end has consumed
	Unread   int   // bytes that wait for it, or that WriteTo is writing

	// HalfClosed: one direction has ended, by a FIN, and the other goes on.
	HalfClosed bool
}

// Progress returns all of it as of one moment.
func (st *Stream) Progress() Progress {
	st.mu.Lock()
	defer st.mu.Unlock()
	return Progress{st.sent, st.received, st.Unread(), !st.reset && st.finSent != st.finRecv}
}

// Unread returns how many bytes can be read without waiting, and how many WriteTo is
// writing.
func (st *Stream) Unread() int { return int(st.unread.Load()) }

// SetDeadline sets both deadlines.
func (st *Stream) SetDeadline(t time.Time) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return net.ErrClosed
	}
	st.rdl.set(t, st, (*Stream).wakeReadersLocked)
	st.wdl.set(t, st, (*Stream).wakeWritersLocked)
	return nil
}

// SetReadDeadline sets the deadline of Read calls, those that wait already too.
// The zero time means none.
func (st *Stream) SetReadDeadline(t time.Time) error {
	return st.setDeadline(&st.rdl, t, (*Stream).wakeReadersLocked)
}

// SetWriteDeadline sets the deadline of Write calls, those that wait already too.
// The zero time means none.
func (st *Stream) SetWriteDeadline(t time.Time) error {
	return st.setDeadline(&st.wdl, t, (*Stream).wakeWritersLocked)
}

func (st *Stream) setDeadline(d *deadline, t time.Time, wake func(*Stream)) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return net.ErrClosed
	}
	d.set(t, st, wake)
	return nil
}

// SetLinger with 0 makes Close reset the stream instead of finishing it, as with a
// net.TCPConn. Any other number restores the default.
func (st *Stream) SetLinger(sec int) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return net.ErrClosed
	}
	st.abrupt = sec == 0
	return nil
}

// CloseWrite sends a FIN behind the bytes written so far. Reading goes on.
func (st *Stream) CloseWrite() error {
	st.mu.Lock()
	switch {
	case st.closed:
		st.mu.Unlock()
		return net.ErrClosed
	case st.werr != nil:
		defer st.mu.Unlock()
		return st.werr
	case !st.finSent:
		st.finSent = true
		st.s.out.finish(st, true, false)
		st.writable.Broadcast()
	}
	st.unlock()
	st.s.out.flush()
	return nil
}

// Close sends a FIN behind the bytes written so far, and drops what was received
// and not read. The peer is told that nothing more will be read: by an RST behind
// the FIN if it understands that or bytes were dropped, and otherwise when it sends
// more.
func (st *Stream) Close() error {
	st.mu.Lock()
	if st.closed {
		st.mu.Unlock()
		return net.ErrClosed
	}
	if st.abrupt {
		st.mu.Unlock()
		if !st.abort(StreamReset, net.ErrClosed) {
			return net.ErrClosed // another Close was faster
		}
		return nil
	}
	st.closed, st.kept = true, nil
	if !st.reset {
		fin := !st.finSent
		stop := !st.finRecv && (st.unread.Load() > 0 || st.s.stop.Load())
		if fin || stop {
			st.s.out.finish(st, fin, stop)
		}
		st.finSent, st.reset = true, true
	}
	st.dropUnreadLocked()
	st.rdl.stop()
	st.wdl.stop()
	st.wakeReadersLocked()
	st.writable.Broadcast()
	st.onEnd = nil
	st.unlock()
	st.s.out.flush()
	return nil
}

// Refuse is Close for a stream that was accepted and that nobody will serve: it is
// reset, with StreamRefused, so that the peer knows that nothing was done with its
// bytes. Once something was read from it, which Peek does not, or written to it, the
// code is StreamReset.
func (st *Stream) Refuse() error {
	if !st.abort(StreamRefused, net.ErrClosed) {
		return net.ErrClosed
	}
	return nil
}

// abort resets the stream, and closes it for its user if err is net.ErrClosed. It
// reports false if it was closed already. StreamRefused is only for a stream that was
// not used, and becomes StreamReset for any other.
func (st *Stream) abort(code Code, err error) bool {
	st.mu.Lock()
	if st.closed {
		st.mu.Unlock()
		return false
	}
	var onEnd func(error)
	if err == net.ErrClosed {
		st.closed = true
		st.rdl.stop()
		st.wdl.stop()
		st.onEnd = nil
	} else {
		onEnd, st.onEnd = st.onEnd, nil
	}
	if code == StreamRefused && (st.taken || st.sent > 0 || st.finSent) {
		code = StreamReset
	}
	if !st.reset && !(st.finSent && st.finRecv) {
		st.s.out.reset(st.id, code)
	}
	st.reset, st.kept = true, nil
	st.rerr, st.werr = err, err
	st.dropUnreadLocked()
	st.wakeReadersLocked()
	st.writable.Broadcast()
	st.unlock()
	st.s.out.flush()
	if onEnd != nil {
		onEnd(err)
	}
	return true
}

// OnEnd has f called once, with the error that writers get, when the peer or the
// loss of the session ends the stream's sending side for good, unless the stream is
// closed here before. f must not wait for anything. It runs at once if that has
// happened already.
func (st *Stream) OnEnd(f func(error)) {
	st.mu.Lock()
	err := st.werr
	if err == nil {
		st.onEnd = f
	}
	st.mu.Unlock()
	if err != nil {
		f(err)
	}
}

// Ended reports whether the sending side has ended for good, as OnEnd tells, and
// whether all that the peer sent arrived, up to its FIN.
func (st *Stream) Ended() (ended, whole bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.werr != nil, st.rerr == io.EOF
}

// resetByPeer handles an RST and reports whether it ended anything.
func (st *Stream) resetByPeer(code Code) bool {
	err := &StreamError{Code: code, Remote: true}
	// Behind a FIN, StreamClosed says that the peer reads no more: what it sent is
	// whole and stands.
	return st.end(err, func() bool { return st.finRecv && code == StreamClosed })
}

// sessionEnded ends the stream with its session. What was received up to a FIN is
// whole and stands.
func (st *Stream) sessionEnded(err *SessionError) {
	st.end(err, func() bool { return st.finRecv })
}

func (st *Stream) end(err error, whole func() bool) bool {
	st.mu.Lock()
	if st.reset {
		st.mu.Unlock()
		return false
	}
	st.reset = true
	if !whole() {
		st.rerr = err
	}
	st.werr = err
	if !st.refusedLocked() {
		st.kept = nil
	}
	f := st.onEnd
	st.onEnd = nil
	st.wakeReadersLocked()
	st.writable.Broadcast()
	st.unlock()
	if f != nil {
		f(err)
	}
	return true
}

// readErrLocked returns why nothing may be read, whatever has arrived.
func (st *Stream) readErrLocked() error {
	switch {
	case st.closed:
		return net.ErrClosed
	case st.rdl.expired():
		return os.ErrDeadlineExceeded
	}
	return nil
}

// writeErrLocked returns why nothing may be written.
func (st *Stream) writeErrLocked() error {
	switch {
	case st.closed:
		return net.ErrClosed
	case st.werr != nil:
		return st.werr
	case st.finSent:
		return syscall.EPIPE
	case st.wdl.expired():
		return os.ErrDeadlineExceeded
	}
	return nil
}

var (
	_ net.Conn      = (*Stream)(nil)
	_ io.ReaderFrom = (*Stream)(nil)
	_ io.WriterTo   = (*Stream)(nil)
)
