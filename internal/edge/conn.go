// Package edge makes connections that a program's own listener or dialer has made fit to
// be joined to a stream.
package edge

import (
	"net"
	"sync/atomic"

	"github.com/tcprelay/relay/internal/join"
)

// Whole makes conn one that behaves as TCP's, and returns what is closed when it is
// wholly closed: nil if a Close waits for nothing.
func Whole(conn net.Conn) (c join.Conn, gone <-chan struct{}) {
	if c, ok := conn.(*net.TCPConn); ok {
		return c, nil
	}
	w := &whole{Conn: conn, gone: make(chan struct{})}
	return w, w.gone
}

// A whole is a connection of any kind. Where it lacks the methods of a *net.TCPConn, a
// half-close or a reset is not passed on. Its Close may take its time, as that of a
// *tls.Conn does, and is called where nothing may wait.
type whole struct {
	net.Conn
	closed atomic.Bool
	gone   chan struct{} // closed when its Close has returned
}

func (c *whole) Write(p []byte) (int, error) {
	if c.closed.Load() {
		return 0, net.ErrClosed
	}
	return c.Conn.Write(p)
}

func (c *whole) CloseWrite() error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

func (c *whole) SetLinger(sec int) error {
	if l, ok := c.Conn.(interface{ SetLinger(int) error }); ok {
		return l.SetLinger(sec)
	}
	return nil
}

func (c *whole) Close() error {
	if c.closed.Swap(true) {
		return net.ErrClosed
	}
	go func() {
		defer close(c.gone)
		c.Conn.Close()
	}()
	return nil
}

// NetConn returns the connection itself, which can be asked for its state.
func (c *whole) NetConn() net.Conn { return c.Conn }
