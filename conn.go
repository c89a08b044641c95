package relay

import (
	"io"
	"net"
	"time"

	"github.com/tcprelay/relay/internal/edge"
	"github.com/tcprelay/relay/internal/join"
)

// A Conn is a client's connection. It behaves as a *net.TCPConn of the client would:
// half-close, deadlines, resets and errors alike. Its methods may be called from any
// goroutine.
type Conn struct {
	st            carrier
	l             *Listener
	local, remote net.Addr
	header        int64 // bytes of st that are not the client's
	since         time.Time
}

var (
	_ net.Conn      = (*Conn)(nil)
	_ io.ReaderFrom = (*Conn)(nil)
	_ io.WriterTo   = (*Conn)(nil)
)

func (c *Conn) counts() (in, out int64) {
	out, in = c.st.Counts()
	return in - c.header, out
}

// begun reports whether the app has answered the client anything, or will hardly have
// to, because the client has said nothing for a while.
func (c *Conn) begun(now time.Time) bool {
	p := c.st.Progress()
	if p.Sent > 0 {
		return true
	}
	silent := p.Unread == 0 && p.Received <= c.header
	return silent && now.Sub(c.since) >= silentTime
}

// wrap gives an error the form that those of a net.TCPConn have.
func (c *Conn) wrap(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.local, Addr: c.remote, Err: notOurs(err)}
}

// Read reads what the client sent. At the client's half-close it returns io.EOF; if
// the client was lost without one, or the relay was, any other error, which matches
// syscall.ECONNRESET in the client's case.
func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.st.Read(p)
	return n, c.wrap("read", err)
}

// Write sends p to the client. It keeps no reference to p.
func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.st.Write(p)
	return n, c.wrap("write", err)
}

// ReadFrom sends what it reads from r, until EOF, without another copy.
func (c *Conn) ReadFrom(r io.Reader) (int64, error) {
	n, err := c.st.ReadFrom(r)
	return n, c.wrap("readfrom", err)
}

// WriteTo writes what the client sends to w, until its half-close, without copying.
func (c *Conn) WriteTo(w io.Writer) (int64, error) {
	n, err := c.st.WriteTo(w)
	return n, c.wrap("writeto", err)
}

// Join carries bytes between the client and to, such as a connection to a local program,
// in both directions, until both have ended, and closes both: each end sees what the
// other one does, half-close and reset included, if to has CloseWrite and SetLinger as a
// *net.TCPConn does. It returns at once; done is called, in a goroutine of its own, with
// nil, or with what has broken one of the two, after which both were reset.
//
// Join takes both connections over: nobody else may read, write or close them, and
// deadlines that are set stay. Where both are sockets of the system, a pair that is idle
// needs no buffer, and one goroutine, or two with [WithDedicated].
func (c *Conn) Join(to net.Conn, done func(error)) {
	other, gone := edge.Whole(to)
	join.Start(other, c.st, func(err error) {
		if gone != nil {
			<-gone
		}
		c.l.forget(c)
		done(c.wrap("join", err))
	})
}

// CloseWrite half-closes: the client reads EOF behind what was written. Reading goes
// on.
func (c *Conn) CloseWrite() error { return c.wrap("close", c.st.CloseWrite()) }

// Close closes the connection. What was written still reaches the client.
func (c *Conn) Close() error {
	err := c.st.Close()
	if err == nil {
		c.l.forget(c)
	}
	return c.wrap("close", err)
}

// SetLinger with 0 makes Close reset the client, which then sees an error instead of
// a clean end, and may lose what was sent and it has not read. Any other number
// restores the default.
func (c *Conn) SetLinger(sec int) error { return c.wrap("set", c.st.SetLinger(sec)) }

// LocalAddr returns the public address that the client connected to.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr returns the client's address, as the relay saw it.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error { return c.wrap("set", c.st.SetDeadline(t)) }

// SetReadDeadline sets the deadline of reads, those that wait already too. The zero
// time means none. Calls that miss it return an error with Timeout() that matches
// os.ErrDeadlineExceeded.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.wrap("set", c.st.SetReadDeadline(t)) }

// SetWriteDeadline is SetReadDeadline for writes.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.wrap("set", c.st.SetWriteDeadline(t)) }
