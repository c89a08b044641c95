// Package join carries bytes between a connection and a stream, both ways, so that
// each end sees what it would see if they were one connection: bytes, half-close,
// close and reset.
package join

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
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

// ender is a Stream that tells when its sending side has ended for good.
type ender interface {
	OnEnd(func(error))
	// Ended reports that, and whether all the peer sent arrived, up to its FIN.
	Ended() (ended, whole bool)
}

type joint struct {
	c         Conn
	st        Stream
	delivered atomic.Bool // c was sent everything, and its FIN

	once sync.Once
	err  error
}

// Join carries bytes between c and st until both directions have ended, and closes
// both. It returns nil if each ended with its sender's half-close or the stream's
// peer closed, and otherwise what broke one; both were reset then.
func Join(c Conn, st Stream) error {
	j := &joint{c: c, st: st}
	if e, ok := st.(ender); ok {
		e.OnEnd(func(err error) { j.streamEnded(e, err) })
	}
	var up sync.WaitGroup
	up.Go(j.connToStream)
	j.streamToConn()
	up.Wait()
	st.Close()
	c.Close()
	j.once.Do(func() {}) // streamEnded may be about to set err
	return j.err
}

func (j *joint) connToStream() {
	_, err := j.st.ReadFrom(j.c)
	if err == nil {
		err = j.st.CloseWrite()
	}
	if err != nil && !j.peerClosed() {
		j.reset(err)
	}
}

func (j *joint) streamToConn() {
	_, err := j.st.WriteTo(j.c)
	if err == nil {
		err = j.c.CloseWrite()
	}
	if err != nil {
		j.reset(err)
		return
	}
	j.delivered.Store(true)
	if j.peerClosed() {
		j.c.Close()
	}
}

// streamEnded does not wait for connToStream to notice, which sits in a read of c.
func (j *joint) streamEnded(e ender, err error) {
	_, whole := e.Ended()
	switch {
	case !whole:
		j.reset(err)
	case j.delivered.Load():
		j.c.Close()
	}
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
