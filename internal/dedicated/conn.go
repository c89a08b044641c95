// Package dedicated carries one client on a connection of its own between relay and
// app, where mux would carry it in a stream of the session. A [Conn] conducts itself as
// a mux.Stream does, so that nobody who has one need know which it is.
//
// # On the wire
//
// The app opens the connection with a preface that names who it is for (package wire).
// It is spare then. When a client comes the relay writes a PROXY protocol header, and
// then the client's bytes. The app answers with one byte, taken or refused, and, if
// taken, its own bytes behind it. Until that byte the relay keeps what it sent: another
// app may get it if this one refuses.
//
// The end of a direction is the transport's half-close. A process that dies must not
// look like one: the socket is set to be reset (SO_LINGER 0) for as long as its end is
// not in order. A reset behind a half-close says that nothing more will be read, and
// takes nothing back.
package dedicated

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/pump"
	"github.com/tcprelay/relay/internal/socket"
	"github.com/tcprelay/relay/internal/wire"
)

// What the app says first.
const (
	refused byte = iota
	taken
)

const (
	// lingerTime is how long a peer is given to end its direction when this end has
	// closed, before it is told that nobody reads it; and again, until it has taken all
	// that it was sent; where the system cannot tell that, for lingerMost. What it takes
	// its time for is its own affair: Fail ends it.
	lingerTime = time.Second
	lingerMost = 10 * time.Minute
)

var (
	// ErrRefused is what becomes of a Conn that the app did not want.
	ErrRefused = errors.New("the app refused the client")

	errVerdict = errors.New("the app said neither that it took nor that it refused the client")

	// past is a deadline that wakes whoever waits.
	past = time.Unix(1, 0)
)

// A transport is what a Conn needs of the connection it is made of.
type transport interface {
	net.Conn
	CloseWrite() error
}

// A Conn is one end. Its methods may be called from any goroutine.
//
// Errors are those of a mux.Stream: io.EOF after the peer's half-close, net.ErrClosed
// after Close, syscall.EPIPE for a Write after CloseWrite, os.ErrDeadlineExceeded,
// something that matches syscall.ECONNRESET after a reset, and what Fail was given.
type Conn struct {
	t   transport
	in  pump.Meter // what the reader of this end got
	out pump.Meter // what the peer was sent
	tls bool       // t is a layer on the socket

	ended func() // called once, when the socket was closed
	once  sync.Once

	mu      sync.Mutex
	idle    sync.Cond // no call reads
	reading int       // calls
	answer  bool      // the peer's verdict is awaited
	refused bool
	kept    []byte // since Begin, until the verdict
	keeping int    // how much may be kept; negative: nothing is
	lost    error  // what Fail was given
	broken  error  // why nothing can be sent any more
	finSent bool
	finRecv bool
	closed  bool

	finBehind bool // there is one behind what is unread, and then a reset
	abrupt    bool // Close resets
}

// New makes conn one end, and has ended called when it has closed it, which may be
// some time after Close. It returns nil if conn has no half-close or no reset, and
// leaves it alone then.
func New(conn net.Conn, ended func()) *Conn {
	t, ok := conn.(transport)
	if !ok || !socket.SetLinger(conn, 0) {
		return nil
	}
	_, layered := conn.(interface{ NetConn() net.Conn })
	c := &Conn{t: t, tls: layered, ended: ended, keeping: -1}
	c.idle.L = &c.mu
	return c
}

// Spent reports that a connection that was not begun is of no use: the peer has closed
// it, or said something.
func (c *Conn) Spent() bool { return socket.Spent(c.t) }

// Begin gives the other end a client, whose header is written, and keeps what is sent
// from then on, limit bytes at most, until the app says that it takes the client.
func (c *Conn) Begin(header []byte, limit int) error {
	c.mu.Lock()
	c.answer, c.keeping = true, limit
	c.mu.Unlock()
	_, err := c.t.Write(header)
	return err
}

// Take tells the relay that the app takes the client, after which nobody else gets it.
func (c *Conn) Take() error {
	_, err := c.t.Write([]byte{taken})
	return c.fix(err)
}

// Refuse tells the relay that nobody will serve the client, nothing of which was read,
// and closes the connection.
func (c *Conn) Refuse() error {
	c.t.Write([]byte{refused})
	return c.Close()
}

// Await waits until the relay gives this end a client, and returns the header.
func (c *Conn) Await() ([]byte, error) {
	if err := c.startReading(); err != nil {
		return nil, err
	}
	header, err := wire.ReadProxy(c.t)
	return header, c.endReading(err)
}

// Reset reports that the peer has reset the connection, which nobody else may have
// noticed while nobody reads from it. A reset behind a half-close, which may be unread
// too, is none; under TLS it cannot be told from one.
func (c *Conn) Reset() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tls || c.closed || c.finSent || c.finRecv || c.finBehind || !socket.Dead(c.t) {
		return false
	}
	c.finBehind = !socket.WasReset(c.t)
	return !c.finBehind
}

// LocalAddr returns the transport's local address.
func (c *Conn) LocalAddr() net.Addr { return c.t.LocalAddr() }

// RemoteAddr returns the transport's remote address.
func (c *Conn) RemoteAddr() net.Addr { return c.t.RemoteAddr() }

// Counts returns how many bytes were sent and how many received.
func (c *Conn) Counts() (sent, received int64) { return c.out.Moved.Load(), c.in.Moved.Load() }

// Progress returns how far both directions have come. Unread is what waits in the
// socket, and in the hands of WriteTo.
func (c *Conn) Progress() mux.Progress {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := mux.Progress{Unread: int(c.in.InHand.Load()), HalfClosed: c.finSent != c.finRecv}
	if !c.closed {
		p.Unread += socket.Unread(c.t)
	}
	p.Sent, p.Received = c.Counts()
	return p
}

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error { return c.setDeadline(t, c.t.SetDeadline) }

// SetReadDeadline sets the deadline of reads, those that wait already too.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadline(t, c.t.SetReadDeadline) }

// SetWriteDeadline is SetReadDeadline for writes.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(t, c.t.SetWriteDeadline) }

func (c *Conn) setDeadline(t time.Time, set func(time.Time) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	return c.fixLocked(set(t))
}

// SetLinger with 0 makes Close reset the connection instead of finishing it. Any other
// number restores the default.
func (c *Conn) SetLinger(sec int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.abrupt = sec == 0
	return nil
}

// fix gives an error of the transport's the form that those of a mux.Stream have.
func (c *Conn) fix(err error) error {
	if err == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.fixLocked(err)
}

func (c *Conn) fixLocked(err error) error {
	switch {
	case err == nil:
		return nil
	case c.closed:
		return net.ErrClosed
	case c.lost != nil:
		return c.lost
	case c.refused:
		return ErrRefused
	}
	if op, ok := err.(*net.OpError); ok {
		return op.Err
	}
	return err
}

// startReading admits a call that reads, which ends with endReading.
func (c *Conn) startReading() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return net.ErrClosed
	case c.finRecv:
		return io.EOF
	}
	c.reading++
	return nil
}

// endReading takes what the read ended with, and returns what its caller gets.
func (c *Conn) endReading(err error) error {
	was := err == io.EOF && !c.tls && socket.WasReset(c.t)
	short := err == io.EOF && c.tls && socket.CutShort(c.t)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.finRecv, c.finBehind: // which the system tells but once
	case was && !c.finSent: // our own, which may be under way, would look the same
		err = syscall.ECONNRESET // a write was told
	case short:
		err = io.ErrUnexpectedEOF
	}
	if c.reading--; c.reading == 0 {
		c.idle.Broadcast()
	}
	if err == io.EOF && !c.closed && c.lost == nil {
		c.finRecv = true
		return err
	}
	return c.fixLocked(err)
}

// Read reads what has arrived, at least one byte, waiting for it if need be.
func (c *Conn) Read(p []byte) (n int, err error) {
	if err := c.startReading(); err != nil {
		return 0, err
	}
	n, err = c.t.Read(p)
	c.in.Moved.Add(int64(n))
	if n > 0 && err == io.EOF {
		err = nil // it comes again
	}
	return n, c.endReading(err)
}

// WriteTo writes what arrives to w until the peer's half-close. What the app says first
// is not part of it.
func (c *Conn) WriteTo(w io.Writer) (n int64, err error) {
	if err := c.startReading(); err == io.EOF {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	if err = c.hearVerdict(); err == nil {
		var werr error
		if n, err, werr = pump.Copy(w, c.t, &c.in, nil); werr != nil {
			c.endReading(nil)
			return n, werr
		}
	}
	if err == nil {
		err = io.EOF
	}
	if err = c.endReading(err); err == io.EOF {
		err = nil
	}
	return n, err
}

// hearVerdict waits until the app has said whether it takes the client, if it has to.
func (c *Conn) hearVerdict() error {
	c.mu.Lock()
	wait := c.answer
	c.mu.Unlock()
	if !wait {
		return nil
	}
	var b [1]byte
	if _, err := io.ReadFull(c.t, b[:]); err == io.EOF {
		return errVerdict
	} else if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answer = false
	switch b[0] {
	case taken:
		c.kept, c.keeping = nil, -1
		return nil
	case refused:
		c.refused = true
		return ErrRefused
	}
	return errVerdict
}

// keep keeps a copy of p, and reports whether it is to be called again.
func (c *Conn) keep(p []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.keeping < 0 {
		return false
	}
	if len(p) > c.keeping-len(c.kept) {
		c.kept, c.keeping = nil, -1
		return false
	}
	c.kept = append(c.kept, p...)
	return true
}

// Kept returns what was kept if the app refused the client: all that Write and ReadFrom
// have taken since Begin. It is whole when their calls have returned.
func (c *Conn) Kept() (b []byte, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.kept, c.refused && c.keeping >= 0
}

// Write sends p.
func (c *Conn) Write(p []byte) (n int, err error) {
	keeps, err := c.writable()
	if err != nil {
		return 0, err
	}
	if keeps {
		c.keep(p)
	}
	n, err = c.t.Write(p)
	c.out.Moved.Add(int64(n))
	return n, c.endWriting(err)
}

// ReadFrom sends what it reads from r, until its end.
func (c *Conn) ReadFrom(r io.Reader) (n int64, err error) {
	keeps, err := c.writable()
	if err != nil {
		return 0, err
	}
	var tap func([]byte) bool
	if keeps {
		tap = c.keep
	}
	n, rerr, werr := pump.Copy(c.t, r, &c.out, tap)
	if rerr != nil {
		return n, rerr
	}
	return n, c.endWriting(werr)
}

// writable returns why nothing may be written, and otherwise whether that is to be kept.
func (c *Conn) writable() (keeps bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return false, net.ErrClosed
	case c.lost != nil:
		return false, c.lost
	case c.refused:
		return false, ErrRefused
	case c.broken != nil:
		return false, c.broken
	case c.finSent:
		return false, syscall.EPIPE
	}
	return c.keeping >= 0, nil
}

func (c *Conn) endWriting(err error) error {
	if err == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	err = c.fixLocked(err)
	if errors.Is(err, syscall.EPIPE) && !c.finSent {
		err = syscall.ECONNRESET // which is what it was, behind the peer's end
	}
	if c.broken == nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.broken = err
	}
	return err
}

// CloseWrite ends this end's direction behind what was written. Reading goes on.
func (c *Conn) CloseWrite() error {
	if _, err := c.writable(); err != nil && err != syscall.EPIPE {
		return err
	}
	c.mu.Lock()
	first := !c.finSent
	c.finSent = true
	heard := c.finRecv
	c.mu.Unlock()
	if !first {
		return nil
	}
	err := c.endWriting(c.t.CloseWrite())
	if heard {
		c.t.SetReadDeadline(past) // nothing is left to watch for
	}
	return err
}

// Ended reports whether the peer takes nothing more, and whether all that it sent has
// arrived.
func (c *Conn) Ended() (ended, whole bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken != nil || c.lost != nil, c.finRecv
}

// Watch waits, once the peer's half-close was read, until the peer takes nothing more,
// which Ended tells, or this end has ended its own direction or closed. It returns at
// once where a socket does not tell.
func (c *Conn) Watch() {
	c.mu.Lock()
	on := c.finRecv && !c.finSent && !c.closed && c.lost == nil
	c.mu.Unlock()
	if !on || !socket.AwaitReset(c.t) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken == nil && !c.closed && !c.finSent {
		c.broken = syscall.ECONNRESET
	}
}

// Close ends both directions. What was written reaches the peer, which is told that
// nothing more will be read if it does not end its direction soon. It does not wait for
// that.
func (c *Conn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return net.ErrClosed
	}
	c.closed = true
	abrupt := c.abrupt || c.lost != nil
	over := c.finRecv
	c.mu.Unlock()
	switch {
	case abrupt:
		c.hardClose()
	case over && !c.tls:
		c.finish()
	default:
		c.t.SetDeadline(past) // for whoever waits
		go c.linger()
	}
	return nil
}

// Fail resets the connection. From then on its calls fail with err.
func (c *Conn) Fail(err error) {
	c.mu.Lock()
	if c.lost == nil {
		c.lost = err
	}
	c.mu.Unlock()
	c.hardClose()
}

// hardClose closes the socket without a word, which resets it.
func (c *Conn) hardClose() {
	socket.Unwrap(c.t).Close()
	c.once.Do(c.ended)
}

// finish closes the socket in order.
func (c *Conn) finish() {
	socket.SetLinger(c.t, -1)
	c.t.Close()
	c.once.Do(c.ended)
}

// linger finishes a connection whose peer has not ended its direction: it discards what
// still comes, so that this end's last bytes are not lost to a reset for them.
func (c *Conn) linger() {
	c.mu.Lock()
	fin := !c.finSent
	c.finSent = true
	c.mu.Unlock()
	if c.tls {
		c.t.SetWriteDeadline(time.Now().Add(lingerTime))
	}
	if fin && c.t.CloseWrite() != nil {
		c.hardClose()
		return
	}
	c.mu.Lock()
	for c.reading > 0 { // a deadline that is set before they look would have them go on
		c.idle.Wait()
	}
	c.mu.Unlock()
	begun := time.Now()
	for {
		c.t.SetReadDeadline(time.Now().Add(lingerTime))
		_, err := io.Copy(io.Discard, discarding{c.t})
		if err == nil {
			c.finish()
			return
		}
		if ne, ok := err.(net.Error); !ok || !ne.Timeout() {
			c.hardClose()
			return
		}
		n, known := socket.Undelivered(c.t)
		if known && n == 0 || !known && time.Since(begun) > lingerMost {
			c.hardClose() // it has all, and is told that nobody reads it
			return
		}
	}
}

// discarding hides a connection's own ways to copy.
type discarding struct{ io.Reader }
