package memnet

import (
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
)

const defaultBuffer = 64 << 10

// A link is what the two ends of a connection share. Its lock guards all of the
// connection.
type link struct {
	n  *Network
	mu sync.Mutex

	frozen  bool
	latency time.Duration
	slice   int   // less than 1: none
	buffer  int   // bytes that a direction holds
	budget  int64 // bytes to be written until the cut; negative: none
}

// A Conn is one end of a connection. Its methods may be called from any goroutine.
// Close, CloseWrite, SetLinger, the deadlines and the faults never wait. All errors
// but io.EOF are a *net.OpError, as those of a *net.TCPConn.
type Conn struct {
	l             *link
	peer          *Conn
	local, remote *net.TCPAddr
	source        int // the port of the end that dialed

	// Guarded by l.mu.
	in, out  *pipe
	readable sync.Cond
	writable sync.Cond
	rdl, wdl deadline
	writing  bool  // a Write has the turn
	closed   bool  // Close was called
	abrupt   bool  // Close resets: SetLinger(0)
	shut     bool  // sent a FIN
	eof      bool  // received a FIN
	dead     bool  // sent or received a reset
	err      error // of a reset, until a Read or Write has given it
}

func newConn(n *Network, from, to netip.AddrPort) *Conn {
	l := &link{n: n, buffer: defaultBuffer, budget: -1}
	a := &Conn{l: l, local: net.TCPAddrFromAddrPort(from), remote: net.TCPAddrFromAddrPort(to)}
	b := &Conn{l: l, local: a.remote, remote: a.local}
	a.in, a.out = &pipe{l: l, to: a}, &pipe{l: l, to: b}
	b.in, b.out = a.out, a.in
	a.peer, b.peer = b, a
	for _, c := range []*Conn{a, b} {
		c.source = int(from.Port())
		c.readable.L, c.writable.L = &l.mu, &l.mu
	}
	return a
}

// LocalAddr returns this end's *net.TCPAddr.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr returns the peer's *net.TCPAddr.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// Peer returns the other end of the connection.
func (c *Conn) Peer() *Conn { return c.peer }

func (c *Conn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.local, Addr: c.remote, Err: err}
}

// Read implements net.Conn.
func (c *Conn) Read(b []byte) (int, error) {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, c.opError("read", net.ErrClosed)
		case len(b) == 0:
			return 0, nil
		case c.rdl.passed():
			return 0, c.opError("read", os.ErrDeadlineExceeded)
		case c.in.arrived > 0:
			n := c.in.take(b)
			c.peer.writable.Broadcast()
			return n, nil
		case c.eof:
			return 0, io.EOF
		case c.err != nil:
			return 0, c.opError("read", c.takeErr("read"))
		case c.dead:
			return 0, io.EOF
		}
		c.readable.Wait()
	}
}

// Write implements net.Conn. It waits while the buffer is full. Writes take turns.
func (c *Conn) Write(b []byte) (n int, err error) {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	for c.writing {
		c.writable.Wait()
	}
	c.writing = true
	defer func() {
		c.writing = false
		c.writable.Broadcast()
	}()
	for {
		switch {
		case c.closed:
			return n, c.opError("write", net.ErrClosed)
		case c.wdl.passed():
			return n, c.opError("write", os.ErrDeadlineExceeded)
		case c.err != nil:
			return n, c.opError("write", c.takeErr("write"))
		case c.shut || c.dead:
			return n, c.opError("write", os.NewSyscallError("write", syscall.EPIPE))
		}
		k := c.out.put(b[n:])
		n += k
		switch {
		case n == len(b):
			return n, nil
		case k == 0:
			c.writable.Wait()
		case c.l.slice > 0: // the reader may run between the pieces
			c.l.mu.Unlock()
			runtime.Gosched()
			c.l.mu.Lock()
		}
	}
}

// takeErr gives the error of a reset, which is told once.
func (c *Conn) takeErr(call string) error {
	err := os.NewSyscallError(call, c.err)
	c.err = nil
	return err
}

// WasReset reports that the peer reset the connection without a FIN before, which a
// Read does not tell once a Write has. On Linux a socket's state tells it.
func (c *Conn) WasReset() bool {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	return c.dead && !c.eof
}

// AwaitReset waits, behind a FIN that was read, until nothing more can be sent: because
// the peer reset the connection, or both ends have ended it. It reports false if this
// end was closed or the read deadline passed before.
func (c *Conn) AwaitReset() bool {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	for !c.over() {
		if c.closed || c.rdl.passed() {
			return false
		}
		c.readable.Wait()
	}
	return true
}

// Undelivered returns how many bytes, and ends, that were written have not arrived at
// the peer.
func (c *Conn) Undelivered() (n int) {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	for _, p := range c.out.way {
		n += max(p.n, 1)
	}
	return n
}

// CloseWrite sends a FIN behind the bytes written so far. Reading goes on.
func (c *Conn) CloseWrite() error {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	switch {
	case c.closed:
		return c.opError("close", net.ErrClosed)
	case c.over():
		return c.opError("close", os.NewSyscallError("shutdown", syscall.ENOTCONN))
	}
	c.finish()
	c.writable.Broadcast()
	return nil
}

// Close ends the connection: with a FIN behind the bytes written so far, or with a
// reset if there are bytes that arrived and nobody read, or after SetLinger(0). What
// arrives later is answered with a reset.
func (c *Conn) Close() error { return c.close(false) }

// abort closes with a reset.
func (c *Conn) abort() { c.close(true) }

func (c *Conn) close(abrupt bool) error {
	c.l.mu.Lock()
	if c.closed {
		c.l.mu.Unlock()
		return c.opError("close", net.ErrClosed)
	}
	c.closed = true
	c.rdl.stop()
	c.wdl.stop()
	if abrupt || c.abrupt || c.in.arrived > 0 {
		c.sendReset()
	} else {
		c.finish()
	}
	c.readable.Broadcast()
	c.writable.Broadcast()
	both := c.peer.closed
	if both {
		c.in.stop()
		c.out.stop()
	}
	c.l.mu.Unlock()
	if both {
		c.l.n.forget(c.source)
	}
	return nil
}

// over says whether the connection has ended for this end: by a reset, or because
// both ends have the other's FIN.
func (c *Conn) over() bool { return c.dead || c.eof && c.peer.eof }

func (c *Conn) finish() {
	if !c.shut && !c.over() {
		c.shut = true
		c.out.send(fin, 0)
	}
}

// sendReset ends the connection for this end, which is closed. If nothing is
// delivered, what was written lately is still with the sender, and lost.
func (c *Conn) sendReset() {
	if c.over() {
		return
	}
	c.dead = true
	if c.l.frozen {
		c.out.lose()
	}
	c.out.send(rst, 0)
}

// receiveReset ends the connection for this end. Behind a FIN a reset means that what
// is written goes nowhere, not that something to be read is missing.
func (c *Conn) receiveReset() {
	if c.over() {
		return
	}
	c.dead = true
	c.err = syscall.ECONNRESET
	if c.eof {
		c.err = syscall.EPIPE
	}
	c.readable.Broadcast()
	c.writable.Broadcast()
}

// SetLinger with 0 makes Close reset the connection. Any other number restores the
// default; Close never waits.
func (c *Conn) SetLinger(sec int) error {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	c.abrupt = sec == 0
	return nil
}

// SetDeadline sets both deadlines. They apply to calls that wait already too; the
// zero time means none.
func (c *Conn) SetDeadline(t time.Time) error { return c.setDeadlines(t, true, true) }

// SetReadDeadline sets the deadline of Read calls.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadlines(t, true, false) }

// SetWriteDeadline sets the deadline of Write calls.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadlines(t, false, true) }

func (c *Conn) setDeadlines(t time.Time, read, write bool) error {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	if c.closed {
		return &net.OpError{Op: "set", Net: "tcp", Addr: c.local, Err: net.ErrClosed}
	}
	if read {
		c.rdl.set(t, &c.readable)
	}
	if write {
		c.wdl.set(t, &c.writable)
	}
	return nil
}

// A deadline is guarded by the lock of the condition that it wakes.
type deadline struct {
	at    time.Time // zero: none
	timer *time.Timer
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

func (d *deadline) set(t time.Time, c *sync.Cond) {
	d.stop()
	d.at = time.Time{}
	if t.IsZero() {
		return
	}
	// On the monotonic clock, as the timer, lest it fires before t.
	left := time.Until(t)
	d.at = time.Now().Add(left)
	if left <= 0 {
		c.Broadcast()
		return
	}
	d.timer = time.AfterFunc(left, func() {
		c.L.Lock()
		defer c.L.Unlock()
		c.Broadcast()
	})
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
	}
}
