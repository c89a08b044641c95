package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/wire"
)

// A Code says why Register failed.
type Code string

const (
	// CodeUnreachable: nobody could be connected to at the relay's address.
	CodeUnreachable Code = "unreachable"
	// CodeTLS: the TLS handshake with the relay failed.
	CodeTLS Code = "tls"
	// CodeNotRelay: what was connected to does not speak the relay's protocol, or
	// hung up before it answered.
	CodeNotRelay Code = "not_relay"
	// CodeTimeout: no answer in time, be it the context's or ten seconds.
	CodeTimeout Code = "timeout"
	// CodeCanceled: the context was canceled.
	CodeCanceled Code = "canceled"

	// The others are the relay's answers.

	// CodeMalformed: the relay did not understand the registration.
	CodeMalformed Code = wire.CodeMalformed
	// CodeVersion: the relay speaks another version of the protocol.
	CodeVersion Code = wire.CodeVersion
	// CodePortUnavailable: the port asked for is not one of the relay's, or in use.
	CodePortUnavailable Code = wire.CodePortUnavailable
	// CodeNameTaken: another service has the name.
	CodeNameTaken Code = wire.CodeNameTaken
	// CodeServerFull: the relay has no port left.
	CodeServerFull Code = wire.CodeServerFull
	// CodeClosing: the relay is going away.
	CodeClosing Code = wire.CodeClosing
)

// A RegisterError is why Register failed. Codes that this version does not know
// may come from a later relay.
type RegisterError struct {
	Addr    string // of the relay, as Register was given it
	Code    Code
	Message string // the relay's, if it gave one
	Err     error  // what lies behind it; nil if the relay refused
}

func (e *RegisterError) Error() string {
	s := "relay: register at " + e.Addr + ": " + string(e.Code)
	if e.Message != "" {
		s += fmt.Sprintf(" (%.200q)", e.Message)
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *RegisterError) Unwrap() error { return e.Err }

// Timeout reports whether there was no answer in time.
func (e *RegisterError) Timeout() bool { return e.Code == CodeTimeout }

// Temporary is Timeout. It makes a RegisterError a net.Error.
func (e *RegisterError) Temporary() bool { return e.Timeout() }

// Is makes a timeout match os.ErrDeadlineExceeded, whosever deadline it was.
func (e *RegisterError) Is(target error) bool {
	return target == os.ErrDeadlineExceeded && e.Timeout()
}

var _ net.Error = (*RegisterError)(nil)

// A Listener accepts the clients of a service's public address. It is a
// net.Listener; its methods may be called from any goroutine.
//
// One goroutine runs for it, beside the session's two, and ends with the session.
type Listener struct {
	log     *slog.Logger
	sess    *mux.Session
	control *mux.Stream
	lines   *wire.Reader // of control
	addr    net.Addr
	closed  chan struct{} // by Close
	done    chan struct{} // by readControl, at the end of the session

	relayGoesAway atomic.Bool // it said so

	mu       sync.Mutex
	closing  bool
	conns    map[*Conn]struct{}
	accepted int64
	refused  int64
	bytesIn  int64 // of closed conns
	bytesOut int64
}

var _ net.Listener = (*Listener)(nil)

// Register connects to the relay at addr and returns the listener of a new service,
// whose Addr is the public address. Ctx bounds registering only, which takes ten
// seconds after the connection was made at most. An error about the options is
// returned as it is, every other as a *RegisterError.
func Register(ctx context.Context, addr string, opts ...RegisterOption) (*Listener, error) {
	cfg := registerConfig{
		log:     slog.New(slog.DiscardHandler),
		backlog: defaultBacklog,
	}
	for _, o := range opts {
		if o == nil {
			continue
		}
		if err := o.applyRegister(&cfg); err != nil {
			return nil, err
		}
	}
	l, err := register(ctx, addr, &cfg)
	if err != nil {
		err.Addr = addr
		return nil, err
	}
	l.log.Info("registered", "relay", addr, "addr", l.addr.String())
	go l.readControl()
	return l, nil
}

func register(ctx context.Context, addr string, cfg *registerConfig) (*Listener, *RegisterError) {
	dial := cfg.dial
	if dial == nil {
		dial = (&net.Dialer{}).DialContext
	}
	conn, err := dial(ctx, "tcp", addr)
	if err != nil {
		return nil, registerError(ctx, CodeUnreachable, err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, handshakeTimeout, os.ErrDeadlineExceeded)
	defer cancel()
	if cfg.tls != nil {
		if conn, err = tlsClient(ctx, conn, addr, cfg.tls); err != nil {
			return nil, registerError(ctx, CodeTLS, err)
		}
	}
	l := &Listener{
		log:    cfg.log,
		sess:   mux.Client(conn, mux.Config{Backlog: cfg.backlog}),
		closed: make(chan struct{}),
		done:   make(chan struct{}),
		conns:  make(map[*Conn]struct{}),
	}
	l.sess.EnableStop()
	reply, err := l.sayHello(ctx, wire.Hello{Version: wire.Version, Name: cfg.name, Port: cfg.port})
	switch {
	case err != nil:
		l.sess.Close()
		code := CodeNotRelay
		if isAlert(err) {
			code = CodeTLS
		}
		return nil, registerError(ctx, code, err)
	case reply.Error != nil:
		l.sess.Close()
		return nil, &RegisterError{Code: Code(reply.Error.Code), Message: reply.Error.Message}
	}
	if l.addr, err = publicAddr(reply.Address); err != nil {
		l.sess.CloseWithError(mux.ProtocolError, err)
		return nil, registerError(ctx, CodeNotRelay, err)
	}
	return l, nil
}

// registerError makes err a RegisterError. What went wrong because ctx ended is told
// as that.
func registerError(ctx context.Context, code Code, err error) *RegisterError {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if ctx.Err() == context.Canceled {
		code = CodeCanceled
	}
	if ctx.Err() == context.DeadlineExceeded || errors.Is(err, os.ErrDeadlineExceeded) {
		code = CodeTimeout // a dialer may see a deadline before ctx does
	}
	return &RegisterError{Code: code, Err: err}
}

func tlsClient(ctx context.Context, conn net.Conn, addr string, config *tls.Config) (net.Conn, error) {
	if config.ServerName == "" && !config.InsecureSkipVerify {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			host = addr
		}
		config = config.Clone()
		config.ServerName = host
	}
	tc := tls.Client(conn, config)
	if err := tc.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return tc, nil
}

// isAlert reports that the relay refused us after our side of the TLS handshake was
// over, as it does when our certificate is not what it wants. The error of crypto/tls
// has no type of its own.
func isAlert(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "remote error"
}

// sayHello opens the control stream with the hello and waits for the reply.
func (l *Listener) sayHello(ctx context.Context, hello wire.Hello) (*wire.Reply, error) {
	line, err := wire.Line(hello)
	if err != nil {
		return nil, err
	}
	if l.control, err = l.sess.Open(line); err != nil {
		return nil, err
	}
	stop := cutShort(ctx, l.control)
	l.lines = wire.NewReader(l.control)
	var reply wire.Reply
	err = l.lines.Read(&reply)
	if late := stop(); late != nil {
		err = late
	}
	if err != nil {
		return nil, err
	}
	if reply.Error == nil && reply.Version != wire.Version {
		return nil, fmt.Errorf("reply of version %d", reply.Version)
	}
	return &reply, nil
}

// hostAddr is a public address whose host is a name, or the unknown one of a client
// that a relay could not tell.
type hostAddr string

func (hostAddr) Network() string  { return "tcp" }
func (a hostAddr) String() string { return string(a) }

func publicAddr(s string) (net.Addr, error) {
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return net.TCPAddrFromAddrPort(ap), nil
	}
	if _, _, err := net.SplitHostPort(s); err != nil {
		return nil, fmt.Errorf("public address: %w", err)
	}
	return hostAddr(s), nil
}

// Addr returns the public address: a *net.TCPAddr, or one of network "tcp" with a
// host name if that is what the relay advertises.
func (l *Listener) Addr() net.Addr { return l.addr }

// Accept waits for the next client and returns its connection, a *Conn. After Close
// it returns an error that matches net.ErrClosed, and when the session with the
// relay was lost one that says why.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		select {
		case <-l.closed:
			return nil, l.opError("accept", net.ErrClosed)
		default:
		}
		select {
		case st := <-l.sess.Accepting():
			if c, err := l.newConn(st); err == nil {
				return c, nil
			} else if !errors.Is(err, net.ErrClosed) {
				l.log.Warn("client refused", "err", err)
			}
		case <-l.closed:
		case <-l.done: // and the relay's last words were heard
			if l.isClosing() {
				return nil, l.opError("accept", net.ErrClosed)
			}
			if l.relayGoesAway.Load() {
				return nil, l.opError("accept", fmt.Errorf("the relay has shut down: %w", notOurs(l.sess.Err())))
			}
			return nil, l.opError("accept", fmt.Errorf("lost the relay: %w", notOurs(l.sess.Err())))
		}
	}
}

// notOurs makes sure that the end of a session is not taken for a Close of the
// caller's: what was closed may be the connection that a dialer made.
func notOurs(err error) error {
	if _, ok := errors.AsType[*mux.SessionError](err); ok && errors.Is(err, net.ErrClosed) {
		return errors.New(err.Error())
	}
	return err
}

func (l *Listener) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Addr: l.addr, Err: err}
}

func (l *Listener) isClosing() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closing
}

// newConn makes a stream a client's connection. The PROXY header came with the frame
// that opened the stream, so it is there or never will be.
func (l *Listener) newConn(st *mux.Stream) (*Conn, error) {
	var room [wire.MaxProxyHeader]byte
	n, src, dst, err := wire.ParseProxy(room[:st.Peek(room[:])])
	if err == nil {
		_, err = io.ReadFull(st, room[:n])
	}
	if err != nil {
		l.reset(st)
		return nil, fmt.Errorf("opening of a client's stream: %w", err)
	}
	c := &Conn{st: st, l: l, header: int64(n), local: l.addr, remote: hostAddr("unknown")}
	if src != nil {
		c.remote, c.local = src, dst
	}
	if !l.enter(c) {
		l.reset(st)
		return nil, net.ErrClosed
	}
	return c, nil
}

func (l *Listener) enter(c *Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closing {
		return false
	}
	l.accepted++
	l.conns[c] = struct{}{}
	return true
}

// Close stops accepting, at the relay too. Clients that wait for Accept are reset;
// accepted connections live on, and the session with the relay ends with the last
// of them. Close does not wait for that.
func (l *Listener) Close() error {
	l.mu.Lock()
	if l.closing {
		l.mu.Unlock()
		return l.opError("close", net.ErrClosed)
	}
	l.closing = true
	last := len(l.conns) == 0
	l.mu.Unlock()
	close(l.closed)
	l.sess.RefuseStreams()
	go l.resetWaiting()
	go l.sayClosing(last)
	return nil
}

// Done is closed when the session with the relay has ended: it was lost, or Close was
// called, every accepted connection closed, and all that was written to them taken by
// the clients' side. A program that exits before then may cut off its last answers, so
// wait for Done after http.Server.Shutdown.
func (l *Listener) Done() <-chan struct{} { return l.done }

// resetWaiting resets the clients that nobody will accept: those that wait, and one
// that was being taken in. It ends with the session.
func (l *Listener) resetWaiting() {
	for {
		st, err := l.sess.Accept()
		if err != nil {
			return
		}
		l.reset(st)
	}
}

func (l *Listener) reset(st *mux.Stream) {
	st.SetLinger(0)
	st.Close()
	l.mu.Lock()
	l.refused++
	l.mu.Unlock()
}

// sayClosing runs in a goroutine of its own because the line may have to wait for
// the relay. It ends with the session at the latest.
func (l *Listener) sayClosing(last bool) {
	if line, err := wire.Line(wire.Control{Type: wire.Close}); err == nil {
		l.control.Write(line)
	}
	if last {
		l.control.CloseWrite()
	}
}

// forget takes a closed connection out of the books. With the last one of a closed
// listener it ends the control stream, upon which the relay, when its clients have
// taken all that was sent to them, ends the session.
func (l *Listener) forget(c *Conn) {
	in, out := c.counts()
	l.mu.Lock()
	delete(l.conns, c)
	l.bytesIn += in
	l.bytesOut += out
	last := l.closing && len(l.conns) == 0
	l.mu.Unlock()
	if last {
		l.control.CloseWrite()
	}
}

// readControl handles what the relay says, until the session ends.
func (l *Listener) readControl() {
	for {
		var m wire.Control
		if err := l.lines.Read(&m); err != nil {
			if err != io.EOF {
				l.sess.CloseWithError(mux.ProtocolError, fmt.Errorf("control stream: %w", err))
			}
			break
		}
		switch m.Type {
		case wire.Ping:
			if line, err := wire.Line(wire.Control{Type: wire.Pong, ID: m.ID}); err == nil {
				l.control.Write(line)
			}
		case wire.Drain:
			l.relayGoesAway.Store(true)
			l.log.Info("the relay is going away", "addr", l.addr.String())
		}
	}
	defer close(l.done)
	<-l.sess.Done()
	l.sess.Close()
	if !l.isClosing() {
		l.log.Warn("lost the relay", "addr", l.addr.String(), "err", l.sess.Err())
	}
}

// Stats are a listener's figures at one moment.
type Stats struct {
	Accepted int64 // clients that Accept returned
	Live     int   // of those, not closed here yet
	Refused  int64 // clients that were reset: the backlog was full or the listener closed
	BytesIn  int64 // from clients to this app
	BytesOut int64 // from this app to clients
}

// Stats returns the listener's figures.
func (l *Listener) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := Stats{
		Accepted: l.accepted,
		Live:     len(l.conns),
		Refused:  l.refused + l.sess.Refused(),
		BytesIn:  l.bytesIn,
		BytesOut: l.bytesOut,
	}
	for c := range l.conns {
		in, out := c.counts()
		s.BytesIn += in
		s.BytesOut += out
	}
	return s
}

// A Conn is a client's connection. It behaves as a *net.TCPConn of the client would:
// half-close, deadlines, resets and errors alike. Its methods may be called from any
// goroutine.
type Conn struct {
	st            *mux.Stream
	l             *Listener
	local, remote net.Addr
	header        int64 // bytes of st that are not the client's
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
