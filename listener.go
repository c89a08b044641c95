package relay

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/tcprelay/relay/internal/backoff"
	"github.com/tcprelay/relay/internal/dedicated"
	"github.com/tcprelay/relay/internal/localdial"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/wire"
)

// A Listener accepts the clients of a service's public address. It is a
// net.Listener; its methods may be called from any goroutine.
//
// When the session with the relay breaks, or the relay goes away, the listener opens
// another one by itself, and keeps its address; Accept waits meanwhile. Connections of
// a session that broke end with an error.
//
// One goroutine runs for it, beside its sessions'. It ends with Done.
type Listener struct {
	cfg            registerConfig
	relay          string           // address
	streams        chan *mux.Stream // the clients of all sessions; its capacity is the backlog
	arrivals       chan *arrival    // those that came by dedicated connections; and its
	connecting     context.Context  // ends with Drain or Close
	stopConnecting context.CancelFunc
	running        context.Context    // ends with Close
	stop           context.CancelFunc // ends running
	failed         chan struct{}      // closed when err is set
	done           chan struct{}      // closed when nothing is left to do
	drained        sync.WaitGroup     // sessions that go on without new clients

	mu         sync.Mutex
	addr       net.Addr
	lease      string // the secret to show next
	links      map[*mux.Session]*link
	draining   bool // Drain was called
	closing    bool
	err        error // the relay's last word
	conns      map[*Conn]struct{}
	offered    int64 // streams of sessions that have ended
	taken      int64 // streams that came out of the channel
	accepted   int64
	refused    int64
	bytesIn    int64 // of closed conns
	bytesOut   int64
	reconnects int64
}

var _ net.Listener = (*Listener)(nil)

// Register connects to the relay at addr and returns the listener of a new service,
// whose Addr is the public address. Ctx bounds registering only, which takes ten
// seconds after the connection was made at most, or with [WithWait] as long as ctx
// lets it. An error about the options is returned as it is, every other as a
// *RegisterError.
func Register(ctx context.Context, addr string, opts ...RegisterOption) (*Listener, error) {
	cfg := registerConfig{
		log:       slog.New(slog.DiscardHandler),
		events:    new(events),
		heartbeat: heartbeat{defaultHeartbeat, 3 * defaultHeartbeat},
		min:       defaultBackoffMin,
		max:       defaultBackoffMax,
		backlog:   defaultBacklog,
		dedicated: -1,
	}
	for _, o := range opts {
		if o == nil {
			continue
		}
		if err := o.applyRegister(&cfg); err != nil {
			return nil, err
		}
	}
	if cfg.shared && cfg.name == "" && cfg.hostname == "" {
		return nil, errors.New("relay: WithShared: only a name can be shared; see WithName")
	}
	if cfg.hostname != "" && cfg.port != 0 {
		return nil, errors.New("relay: WithHostname and WithPort exclude each other")
	}
	if cfg.pins != nil {
		cfg.tls = pinned(cfg.tls, cfg.pins)
	}
	running, stop := context.WithCancel(context.Background())
	connecting, stopConnecting := context.WithCancel(running)
	l := &Listener{
		connecting:     connecting,
		stopConnecting: stopConnecting,
		cfg:            cfg,
		relay:          addr,
		streams:        make(chan *mux.Stream, cfg.backlog),
		arrivals:       make(chan *arrival, cfg.backlog),
		running:        running,
		stop:           stop,
		failed:         make(chan struct{}),
		done:           make(chan struct{}),
		links:          make(map[*mux.Session]*link),
		conns:          make(map[*Conn]struct{}),
	}
	k, err := l.connect(ctx)
	if err != nil && cfg.wait && ctx.Err() == nil {
		k, err = l.insist(ctx, err)
	}
	if err != nil {
		stop()
		return nil, err
	}
	l.cfg.log.Info("registered", "relay", addr, "addr", l.Addr().String())
	l.event(Event{Kind: EventRegistered})
	go l.run(k)
	return l, nil
}

// insist tries to connect until it succeeds, the error is one that stands, or ctx
// ends. An app that was never registered takes a mistake with TLS for one that stands.
func (l *Listener) insist(ctx context.Context, err *RegisterError) (*link, *RegisterError) {
	wait := backoff.Backoff{Min: l.cfg.min, Max: l.cfg.max}
	for !err.Code.stands() && !isTLSMistake(err) {
		l.cfg.log.Info("registering again", "relay", l.relay, "err", err)
		l.event(Event{Kind: EventRefused, Err: err})
		if wait.Wait(ctx) != nil {
			return nil, l.registerError(ctx, err.Code, err)
		}
		k, next := l.connect(ctx)
		switch {
		case next == nil:
			return k, nil
		case ctx.Err() != nil: // which cut this try short: the one before tells more
			return nil, l.registerError(ctx, err.Code, err)
		}
		err = next
	}
	return nil, err
}

// isTLSMistake reports that TLS with the relay cannot work as it is set up, rather than
// that a handshake was cut short, which may pass.
func isTLSMistake(err error) bool {
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return true
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return true
	}
	return isAlert(err) || errors.Is(err, mux.ErrTLS) || errors.Is(err, errPin)
}

// run keeps the listener registered until Close, or until the relay says that it will
// not have it. K is its first session.
func (l *Listener) run(k *link) {
	defer close(l.done)
	defer l.drained.Wait()
	wait := backoff.Backoff{Min: l.cfg.min, Max: l.cfg.max}
	for {
		since := time.Now()
		err := k.serve()
		lasted := time.Since(since)
		if lasted > l.cfg.max || err == errDraining && lasted > l.cfg.min {
			wait.Reset() // it was not one of a series of failures
		}
		if err == errDraining {
			l.cfg.log.Info("the relay is going away", "addr", l.Addr().String())
			l.event(Event{Kind: EventDraining})
		} else if l.connecting.Err() == nil {
			l.cfg.log.Warn("lost the relay", "addr", l.Addr().String(), "err", err)
			l.event(Event{Kind: EventLost, Err: err})
		}
		if err != errDraining {
			k.drop()
		}
		if k = l.reconnect(&wait, err); k == nil {
			return
		}
		l.cfg.log.Info("back at the relay", "relay", l.relay, "addr", l.Addr().String())
		l.event(Event{Kind: EventResumed})
	}
}

// reconnect opens another session, as soon as it can. It returns nil if none is wanted
// any more.
func (l *Listener) reconnect(wait *backoff.Backoff, lost error) *link {
	var last *RegisterError // the relay may have said it in the session itself
	if !errors.As(lost, &last) {
		last = &RegisterError{}
	}
	for !last.Code.stands() {
		if wait.Wait(l.connecting) != nil {
			return nil
		}
		k, err := l.connect(l.connecting)
		if err == nil {
			return k
		}
		if l.connecting.Err() != nil {
			return nil
		}
		last = err
		l.cfg.log.Warn("not back at the relay", "relay", l.relay, "err", err)
		l.event(Event{Kind: EventRefused, Err: err})
	}
	l.mu.Lock()
	l.err = last
	close(l.failed)
	l.mu.Unlock()
	l.event(Event{Kind: EventEnded, Err: last})
	return nil
}

// connect opens a session with the relay and registers: the first time for whatever
// the options ask for, and later for the address that the listener had.
func (l *Listener) connect(ctx context.Context) (*link, *RegisterError) {
	hello := wire.Hello{
		Version:     wire.Version,
		Name:        l.cfg.name,
		Port:        l.cfg.port,
		Hostname:    l.cfg.hostname,
		Token:       l.cfg.token,
		Shared:      l.cfg.shared,
		HeartbeatMS: int(max(l.cfg.heartbeat.interval, 0) / time.Millisecond),
	}
	l.mu.Lock()
	hello.Lease = l.lease
	if l.addr != nil && hello.Hostname == "" {
		hello.Port = portOf(l.addr)
	}
	again := l.addr != nil
	l.mu.Unlock()

	if l.cfg.dedicated >= 0 {
		hello.Features, hello.Spares = []string{wire.Dedicated}, l.cfg.dedicated
	}
	dialing := ctx
	if again {
		var cancel context.CancelFunc
		dialing, cancel = context.WithTimeoutCause(ctx, handshakeTimeout, os.ErrDeadlineExceeded)
		defer cancel()
	}
	conn, rerr := l.dial(dialing, l.relay)
	if rerr != nil {
		return nil, rerr
	}
	ctx, cancel := context.WithTimeoutCause(ctx, handshakeTimeout, os.ErrDeadlineExceeded)
	defer cancel()
	if conn, rerr = l.secure(ctx, conn); rerr != nil {
		return nil, rerr
	}
	if l.cfg.token != "" && !l.cfg.inClear && l.cfg.dial == nil && !private(conn) {
		conn.Close()
		return nil, l.registerError(ctx, CodeInsecure,
			errors.New("the token would be sent in clear: use WithTLSConfig, or allow it by WithTokenInClear"))
	}
	return l.register(ctx, conn, hello)
}

// dial connects to the relay, at an address that it has.
func (l *Listener) dial(ctx context.Context, addr string) (net.Conn, *RegisterError) {
	dial := l.cfg.dial
	if dial == nil {
		dial = (&net.Dialer{Control: localdial.Control}).DialContext
	}
	conn, err := dial(ctx, "tcp", addr)
	if err != nil {
		return nil, l.registerError(ctx, CodeUnreachable, err)
	}
	return conn, nil
}

// secure runs the TLS handshake on a connection to the relay, if there is to be TLS.
func (l *Listener) secure(ctx context.Context, conn net.Conn) (net.Conn, *RegisterError) {
	if l.cfg.tls == nil {
		return conn, nil
	}
	tc, err := tlsClient(ctx, conn, l.relay, l.cfg.tls)
	if err != nil {
		return nil, l.registerError(ctx, CodeTLS, err)
	}
	return tc, nil
}

func (l *Listener) register(ctx context.Context, conn net.Conn, hello wire.Hello) (*link, *RegisterError) {
	k := l.newLink(conn)
	reply, err := k.sayHello(ctx, hello)
	if err == nil && reply.Error != nil {
		k.drop()
		return nil, &RegisterError{Addr: l.relay, Code: Code(reply.Error.Code), Message: reply.Error.Message}
	}
	var addr net.Addr
	if err == nil {
		addr, err = publicAddr(reply.Address)
	}
	if err == nil && hello.Port != 0 && hello.Port != portOf(addr) {
		err = fmt.Errorf("asked for port %d and got %v", hello.Port, addr)
	}
	if err == nil && hello.Hostname != "" && !strings.HasPrefix(reply.Address, hello.Hostname+":") {
		k.drop()
		return nil, &RegisterError{Addr: l.relay, Code: CodeHostUnavailable, Message: "the relay knows of no hostnames"}
	}
	if err != nil {
		k.sess.CloseWithError(mux.ProtocolError, err)
		k.drop()
		code := CodeNotRelay
		switch {
		case errors.Is(err, mux.ErrTLS) && l.cfg.tls == nil:
			code, err = CodeTLS, fmt.Errorf("it takes apps over TLS only, see WithTLSConfig and WithPin: %w", err)
		case isAlert(err) || errors.Is(err, mux.ErrTLS):
			code = CodeTLS
		case k.control == nil && errors.Is(err, wire.ErrTooLong):
			code = CodeMalformed // our hello, because of what the token consists of
		}
		return nil, l.registerError(ctx, code, err)
	}

	k.startPulse(time.Duration(reply.HeartbeatMS) * time.Millisecond)

	l.mu.Lock()
	if l.addr != nil {
		l.reconnects++
	}
	l.addr, l.lease = addr, reply.Lease
	k.registered = true
	closing := l.closing || l.draining
	l.mu.Unlock()
	if closing {
		k.close() // Close or Drain came too early to do it
	}
	return k, nil
}

// registerError makes err a RegisterError. What went wrong because ctx ended is told
// as that.
func (l *Listener) registerError(ctx context.Context, code Code, err error) *RegisterError {
	if ctx.Err() != nil {
		if re, ok := errors.AsType[*RegisterError](err); ok {
			err = fmt.Errorf("%w; before: %w", context.Cause(ctx), re) // of an earlier attempt
		} else {
			err = context.Cause(ctx)
		}
	}
	if ctx.Err() == context.Canceled {
		code = CodeCanceled
	}
	if ctx.Err() == context.DeadlineExceeded || errors.Is(err, os.ErrDeadlineExceeded) {
		code = CodeTimeout // a dialer may see a deadline before ctx does
	}
	return &RegisterError{Addr: l.relay, Code: code, Err: err}
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

func (l *Listener) event(ev Event) {
	if addr := l.Addr(); addr != nil {
		ev.Addr = addr.String()
	}
	ev.Service, ev.Remote = cmp.Or(l.cfg.name, l.cfg.hostname, ev.Addr), l.relay
	l.cfg.events.send(ev)
}

// Addr returns the public address: a *net.TCPAddr, or one of network "tcp" with a
// host name if that is what the relay advertises. Its port stays the same for the life
// of the listener; the host changes if a relay that was started anew advertises
// another.
func (l *Listener) Addr() net.Addr {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.addr
}

// Accept waits for the next client and returns its connection, a *Conn. After Close
// it returns an error that matches net.ErrClosed. If the relay refuses the service for
// good, because of its credential or at its operator's wish, it returns a
// *RegisterError, in a *net.OpError. A lost session is no error of Accept's.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		select {
		case <-l.running.Done():
			return nil, l.opError("accept", net.ErrClosed)
		default:
		}
		select {
		case st := <-l.streams:
			if c, err := l.newConn(st); err == nil {
				return c, nil
			} else if !errors.Is(err, net.ErrClosed) {
				l.cfg.log.Warn("client refused", "err", err)
			}
		case a := <-l.arrivals:
			if c := l.newDedicated(a); c != nil {
				return c, nil
			}
		case <-l.running.Done():
		case <-l.failed:
			l.mu.Lock()
			err := l.err
			l.mu.Unlock()
			return nil, l.opError("accept", err)
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
	return &net.OpError{Op: op, Net: "tcp", Addr: l.Addr(), Err: err}
}

// newConn makes a stream a client's connection. The PROXY header came with the frame
// that opened the stream, so it is there or never will be.
func (l *Listener) newConn(st *mux.Stream) (*Conn, error) {
	if st.Session().Err() != nil {
		l.refuse(st)
		return nil, net.ErrClosed // the client went with its session
	}
	var room [wire.MaxProxyHeader]byte
	n, src, dst, err := wire.ParseProxy(room[:st.Peek(room[:])])
	if err != nil {
		l.refuse(st)
		return nil, fmt.Errorf("opening of a client's stream: %w", err)
	}
	c := &Conn{st: st, l: l, header: int64(n), since: time.Now(), local: l.Addr(), remote: hostAddr("unknown")}
	if src != nil {
		c.remote, c.local = src, dst
	}
	if !l.enter(c, l.linkOf(st)) {
		l.refuse(st)
		return nil, net.ErrClosed
	}
	if err = st.Discard(n); err != nil {
		c.SetLinger(0)
		c.Close()
		return nil, fmt.Errorf("opening of a client's stream: %w", err)
	}
	return c, nil
}

// newDedicated makes an arrival a client's connection, or nil if its session has ended
// or the listener closed.
func (l *Listener) newDedicated(a *arrival) *Conn {
	c := &Conn{st: a.d, l: l, since: time.Now(), local: l.Addr(), remote: hostAddr("unknown")}
	if a.src != nil {
		c.remote, c.local = a.src, a.dst
	}
	if !l.enter(c, a.k) {
		l.turnAway(a)
		return nil
	}
	a.d.Take() // if that fails, so does what comes next
	return c
}

// linkOf returns the link that a stream belongs to, nil if it was dropped.
func (l *Listener) linkOf(st *mux.Stream) *link {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.links[st.Session()]
}

// enter books a client's connection, if the listener takes any, and its session is there.
func (l *Listener) enter(c *Conn, k *link) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closing || k == nil || l.links[k.sess] == nil {
		return false
	}
	if d, ok := c.st.(*dedicated.Conn); ok {
		if _, ok := k.dedicated[d]; !ok || k.sess.Err() != nil {
			return false // it has ended, or is about to be refused
		}
		k.dedicated[d] = true
	}
	l.taken++
	l.accepted++
	l.conns[c] = struct{}{}
	return true
}

// Drain has the relay send no more clients, and gives up the address. It returns when
// Accept has returned those who were on their way, and each connection was answered
// something, was closed, or has had no byte from its client for five seconds. Then
// http.Server.Shutdown loses no request: it drops those of connections that it has
// accepted and not read yet, and a client's first bytes come after the client.
//
// If ctx ends before, Drain returns its cause, and new clients stay away all the same.
// Accept waits until Close; a session that breaks is not opened anew.
func (l *Listener) Drain(ctx context.Context) error {
	l.mu.Lock()
	if l.closing {
		l.mu.Unlock()
		return l.opError("drain", net.ErrClosed)
	}
	l.draining = true
	links := l.registeredLocked()
	l.mu.Unlock()
	l.stopConnecting()
	for _, k := range links {
		go k.sayClose() // which may have to wait for the relay
	}
	for _, k := range links {
		select {
		case <-k.closed:
		case <-k.sess.Done():
		case <-ctx.Done():
			return l.opError("drain", context.Cause(ctx))
		}
	}
	for pause := time.Millisecond; !l.allBegun(); pause = min(2*pause, 100*time.Millisecond) {
		select {
		case <-time.After(pause):
		case <-l.running.Done():
			return l.opError("drain", net.ErrClosed)
		case <-ctx.Done():
			return l.opError("drain", context.Cause(ctx))
		}
	}
	return nil
}

// registeredLocked returns the links that the relay may send clients on.
func (l *Listener) registeredLocked() (links []*link) {
	for _, k := range l.links {
		if k.registered {
			links = append(links, k)
		}
	}
	return links
}

// allBegun reports that nobody waits for Accept, or for the first answer.
func (l *Listener) allBegun() bool {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	offered := l.offered
	for sess, k := range l.links {
		offered += sess.Offered()
		if k.spares > 0 {
			return false // the relay has no use for it any more, and closes it
		}
	}
	if offered > l.taken {
		return false
	}
	for c := range l.conns {
		if !c.begun(now) {
			return false
		}
	}
	return true
}

// Close stops accepting, at the relay too. Clients that wait for Accept are given to
// the others that share the name, or reset; accepted connections live on, and the
// session with the relay ends with the last of them. Close does not wait for that.
func (l *Listener) Close() error {
	l.mu.Lock()
	if l.closing {
		l.mu.Unlock()
		return l.opError("close", net.ErrClosed)
	}
	l.closing = true
	links := l.registeredLocked()
	l.mu.Unlock()
	l.stop() // for one that is registering
	for _, k := range links {
		k.close()
	}
	go l.refuseWaiting()
	return nil
}

// Done is closed when the listener has nothing left to do: Close or Drain was called, or
// the relay refused to have it any longer, every accepted connection was closed or its
// session lost, and all that was written taken by the clients' side. A program that
// exits before then may cut off its last answers, so wait for Done after
// http.Server.Shutdown.
func (l *Listener) Done() <-chan struct{} { return l.done }

// refuseWaiting refuses the clients that nobody will accept: those that wait, and one
// that was being taken in.
func (l *Listener) refuseWaiting() {
	for {
		select {
		case st := <-l.streams:
			l.refuse(st)
		case a := <-l.arrivals:
			l.turnAway(a)
		case <-l.done:
			return
		}
	}
}

func (l *Listener) refuse(st *mux.Stream) {
	st.Refuse()
	l.countRefused()
}

func (l *Listener) countRefused() {
	l.mu.Lock()
	l.taken++
	l.refused++
	l.mu.Unlock()
}

// forget takes a closed connection out of the books.
func (l *Listener) forget(c *Conn) {
	in, out := c.counts()
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.conns[c]; ok { // Close may be called while Join ends
		delete(l.conns, c)
		l.bytesIn += in
		l.bytesOut += out
	}
}

// Stats are a listener's figures at one moment.
type Stats struct {
	Accepted   int64 // clients that Accept returned
	Live       int   // of those, not closed here yet
	Refused    int64 // clients that it did not: the backlog was full, the listener closed, or they were lost
	BytesIn    int64 // from clients to this app
	BytesOut   int64 // from this app to clients
	Reconnects int64 // sessions with the relay after the first
	Connected  bool  // there is a session now
}

// Stats returns the listener's figures.
func (l *Listener) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := Stats{
		Accepted:   l.accepted,
		Live:       len(l.conns),
		Refused:    l.refused,
		BytesIn:    l.bytesIn,
		BytesOut:   l.bytesOut,
		Reconnects: l.reconnects,
	}
	for _, k := range l.links {
		s.Refused += k.sess.Refused()
		s.Connected = s.Connected || k.registered && k.sess.Err() == nil
	}
	for c := range l.conns {
		in, out := c.counts()
		s.BytesIn += in
		s.BytesOut += out
	}
	return s
}
