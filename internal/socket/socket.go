// Package socket asks the system about a TCP connection what reads and writes do not
// tell.
package socket

import (
	"io"
	"net"
	"sync/atomic"
)

// resetter is a connection that is no socket and knows what WasReset and AwaitReset ask.
type resetter interface {
	WasReset() bool
	AwaitReset() bool
}

// maxLayers bounds how deep connections are looked for. The NetConn of one may return the
// connection itself, as that of a type does which embeds a layer and is its inner end too.
const maxLayers = 16

// Unwrap returns the connection that c is a layer on.
func Unwrap(c net.Conn) net.Conn {
	for range maxLayers {
		layer, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		c = layer.NetConn()
	}
	return c
}

// SetLinger sets what closing the socket that c is, or is a layer on, does; see
// net.TCPConn.SetLinger. It reports whether that could be done.
func SetLinger(c net.Conn, sec int) bool {
	l, ok := Unwrap(c).(interface{ SetLinger(int) error })
	return ok && l.SetLinger(sec) == nil
}

// Undelivered returns how much of what was written to c has not arrived at its peer's
// system, and whether that is known.
func Undelivered(c net.Conn) (n int, known bool) {
	if d, ok := Unwrap(c).(interface{ Undelivered() int }); ok {
		return d.Undelivered(), true
	}
	return Unacked(c)
}

// An Under is a connection below a layer, such as TLS, that takes the bare end of what
// it reads for the end that its own protocol has a word for. crypto/tls does so between
// two records: whoever can end a TCP connection could cut what it carries short.
type Under struct {
	net.Conn
	ended atomic.Bool
}

// Read implements net.Conn.
func (u *Under) Read(p []byte) (int, error) {
	n, err := u.Conn.Read(p)
	if err == io.EOF {
		u.ended.Store(true)
	}
	return n, err
}

// NetConn returns the connection itself.
func (u *Under) NetConn() net.Conn { return u.Conn }

// CutShort tells, of a layer whose read saw the end, that the connection below it, an
// Under, had ended before the layer's own end came.
func CutShort(c net.Conn) bool {
	for range maxLayers {
		layer, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		c = layer.NetConn()
		if u, ok := c.(*Under); ok {
			return u.ended.Load()
		}
	}
	return false
}
