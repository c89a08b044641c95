// Package join carries bytes between a connection and a stream, both ways, so that
// each end sees what it would see if they were one connection: bytes, half-close,
// close and reset.
package join

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tcprelay/relay/internal/socket"
)

// Conn is a connection with half-close and reset, such as a *net.TCPConn.
type Conn interface {
	net.Conn
	CloseWrite() error
	SetLinger(sec int) error
}

// Stream is a Conn that moves bytes itself.
type Stream interface {
	Conn
	io.ReaderFrom
	io.WriterTo
}

// ender is a Stream that knows when its sending side has ended for good.
type ender interface {
	// Ended reports that, and whether all the peer sent arrived, up to its FIN.
	Ended() (ended, whole bool)
}

// teller is an ender that tells.
type teller interface {
	ender
	OnEnd(func(error))
}

// starter is a Stream whose WriteTo needs no goroutine while it waits. Who calls done must
// not be held up, so a watcher is not started this way.
type starter interface {
	StartWriteTo(w io.Writer, done func(n int64, err error))
}

// watcher is a Stream that has to be waited for to tell that its peer takes nothing more.
type watcher interface {
	// Watch waits for that, once the peer has half-closed, or until this end has.
	Watch()
}

// keeper is a Stream that may have a copy of all that it took to send, for the case
// that its peer refuses it.
type keeper interface {
	// Kept returns the copy if the peer did.
	Kept() ([]byte, bool)
}

// Refused is the error of a Join whose stream was refused by its peer and kept all
// that it had taken. The other connection is open and unharmed, without a read
// deadline: it may be joined to another stream, once Head was written to that.
type Refused struct {
	// Head is what was read from the connection, all of it, and reached nobody.
	Head []byte
	Err  error // of the stream
}

func (r *Refused) Error() string { return r.Err.Error() }
func (r *Refused) Unwrap() error { return r.Err }

type joint struct {
	c         Conn
	st        Stream
	down      sync.WaitGroup // streamToConn
	refusal   error          // why the stream was refused, if it was; streamToConn's
	finishing atomic.Bool    // c was sent everything, and is about to be sent its FIN
	delivered atomic.Bool    // which it was

	once sync.Once
	err  error

	mu   sync.Mutex // held by streamEnded
	over bool       // nothing may be done to c any more
}

// Join carries bytes between c and st until both directions have ended, and closes
// both. It returns nil if each ended with its sender's half-close or the stream's
// peer closed, and otherwise what broke one; both were reset then.
//
// If the peer refuses a stream that keeps what it sends, as a mux.Stream does after
// Keep, Join closes only the stream, and returns a *Refused.
func Join(c Conn, st Stream) error {
	done := make(chan error, 1)
	Start(c, st, func(err error) { done <- err })
	return <-done
}

// Start is a Join that calls done with what Join returns, in a goroutine of its own. That
// one carries what c sends and then waits for the other direction, and is all that waits if
// the stream needs none; it begins with the smallest of stacks, which is most of what an
// idle connection takes.
func Start(c Conn, st Stream, done func(error)) {
	j := &joint{c: c, st: st}
	j.down.Add(1)
	if e, ok := st.(teller); ok {
		e.OnEnd(func(err error) { j.streamEnded(e, err) })
	}
	go j.run(done)
	_, waits := st.(watcher)
	if s, ok := st.(starter); ok && !waits {
		s.StartWriteTo(c, func(_ int64, err error) { j.streamToConn(err) })
		return
	}
	go func() {
		_, err := st.WriteTo(c)
		j.streamToConn(err)
	}()
}

// run ends when both directions have.
func (j *joint) run(done func(error)) {
	j.connToStream()
	j.down.Wait()
	done(j.finish())
}

func (j *joint) finish() error {
	j.mu.Lock() // streamEnded may be under way, or come late
	j.over = true
	j.mu.Unlock()
	if j.refusal != nil && j.err == nil {
		if head, ok := j.kept(); ok {
			j.st.Close()
			j.c.SetReadDeadline(time.Time{})
			return &Refused{head, j.refusal}
		}
		j.reset(j.refusal) // somebody else closed the stream
	}
	j.st.Close()
	j.c.Close()
	return j.err
}

func (j *joint) connToStream() {
	_, err := j.st.ReadFrom(j.c)
	if err == nil && socket.WasReset(j.c) && !j.finishing.Load() { // in this order: our own FIN may be on its way
		// Its error went to a write, and the end that was read is none.
		err = syscall.ECONNRESET
	}
	if err == nil {
		err = j.st.CloseWrite()
	}
	if err != nil && !j.peerClosed() && !j.isRefusal(err) {
		j.reset(err)
	}
}

// streamToConn passes on what the stream ended with, when all of its bytes were written to
// c. After a refusal connToStream does not wait for c.
func (j *joint) streamToConn(err error) {
	defer j.down.Done()
	if _, refused := j.kept(); refused {
		if j.c.SetReadDeadline(time.Unix(1, 0)) == nil {
			j.refusal = err
			return
		}
	}
	if err == nil {
		j.finishing.Store(true)
		err = j.c.CloseWrite()
	}
	if err != nil {
		j.reset(err)
		return
	}
	j.delivered.Store(true)
	if w, ok := j.st.(watcher); ok {
		w.Watch()
	}
	if j.peerClosed() {
		j.closeConn()
	}
}

// closeConn closes c, which has had everything, for the session's reader. That is not to
// wait for as long as somebody may have told c to linger.
func (j *joint) closeConn() {
	j.c.SetLinger(-1)
	j.c.Close()
}

// streamEnded does not wait for connToStream to notice, which sits in a read of c.
func (j *joint) streamEnded(e ender, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.over {
		return
	}
	_, whole := e.Ended()
	_, refused := j.kept()
	switch {
	case refused: // streamToConn, which has nothing to write, deals with it
	case !whole:
		j.reset(err)
	case j.delivered.Load():
		j.closeConn()
	}
}

// kept returns all that st has taken if its peer refused it.
func (j *joint) kept() ([]byte, bool) {
	if k, ok := j.st.(keeper); ok {
		return k.Kept()
	}
	return nil, false
}

// isRefusal reports whether err, of connToStream, comes of the stream's refusal: it is
// the stream's error, or that of the read of c that streamToConn ended. Otherwise it is
// c's own.
func (j *joint) isRefusal(err error) bool {
	_, refused := j.kept()
	return refused && (errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, j.st.CloseWrite()))
}

// peerClosed reports that the stream's peer has sent all it will and takes no more:
// c gets what is under way and then the end, as from a TCP peer that closed.
func (j *joint) peerClosed() bool {
	e, ok := j.st.(ender)
	if !ok {
		return false
	}
	ended, whole := e.Ended()
	return ended && whole
}

// reset ends both at once. It does not wait for anything.
func (j *joint) reset(err error) {
	j.once.Do(func() { j.err = err })
	j.c.SetLinger(0)
	j.c.Close()
	j.st.SetLinger(0)
	j.st.Close()
}
