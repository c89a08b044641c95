package relay

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"time"

	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/ports"
	"github.com/tcprelay/relay/internal/socket"
	"github.com/tcprelay/relay/internal/tally"
	"github.com/tcprelay/relay/internal/wire"
)

// refusalTime is how long a refused service may take to hang up, so that our
// hanging up does not overtake the reply.
const refusalTime = 2 * time.Second

// What a refused connection is counted under, beside the codes of the refusals.
const (
	kindPending      = "pending"
	kindPendingPerIP = "pending_per_ip"
	kindHandshake    = "handshake"
	kindTLS          = "tls"
	kindBroken       = "broken"
	kindRevoked      = "revoked"
)

// handleRegistration runs a connection to a registration listener, from the
// handshake to the end of the session that it becomes.
func (s *Server) handleRegistration(ln net.Listener, conn net.Conn) {
	remote := conn.RemoteAddr().String()
	ip := ipOf(conn.RemoteAddr())
	if kind := s.enterPending(&conn, ip); kind != "" {
		hangUp(conn)
		s.refused.Add(kind, "registration refused", "remote", remote)
		return
	}
	ctx, cancel := context.Background(), context.CancelFunc(func() {})
	if d := s.cfg.limits.HandshakeTime; d > 0 {
		ctx, cancel = context.WithTimeout(ctx, d)
	}
	defer cancel()
	m, asker, err := s.receive(ctx, ln, &conn)
	s.leavePending(&conn, ip)
	if asker != nil {
		asker.refill() // now that there is room for it
		return
	}
	if err != nil {
		s.refused.Add(kindOf(ctx, err), "registration failed", "remote", remote, "err", tally.Clean(err.Error()))
		s.cfg.events.send(Event{Kind: EventRefused, Service: m.asked.Name, Identity: m.grant.Identity, Remote: remote, Err: err})
		return
	}
	cancel()
	m.run()
}

// kindOf says what a registration that failed is counted under.
func kindOf(ctx context.Context, err error) string {
	var r *refusal
	switch {
	case errors.As(err, &r):
		return r.told.Code
	case ctx.Err() != nil:
		return kindHandshake
	case errors.Is(err, errHandshake), errors.Is(err, mux.ErrTLS):
		return kindTLS
	case errors.Is(err, errSecret):
		return kindSecret
	case errors.Is(err, errNoFiles):
		return kindFiles
	}
	return kindBroken
}

// ipOf returns the IP address of addr, or the zero one if it has none.
func ipOf(addr net.Addr) netip.Addr {
	if a, ok := addr.(*net.TCPAddr); ok {
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// enterPending enters a connection in the book of those that are registering, or
// returns what it is over.
func (s *Server) enterPending(conn *net.Conn, ip netip.Addr) (kind string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	limits := &s.cfg.limits
	switch {
	case s.closing:
		return wire.CodeClosing
	case limits.Pending > 0 && len(s.pending) >= limits.Pending:
		return kindPending
	case ip.IsValid() && !s.pendingIPs.Take(ip, limits.PendingPerIP):
		return kindPendingPerIP
	}
	s.pending[conn] = struct{}{}
	return ""
}

func (s *Server) leavePending(conn *net.Conn, ip netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pending, conn)
	if ip.IsValid() {
		s.pendingIPs.Give(ip)
	}
}

// receive takes a connection through TLS and finds out what it is: one of an app that
// registers, of which it makes a session, or a dedicated one, which it gives to who asked
// for it. The member that comes with an error says what had been asked for.
func (s *Server) receive(ctx context.Context, ln net.Listener, pending *net.Conn) (m *member, asker *spares, err error) {
	m = &member{srv: s, pending: pending, since: time.Now(),
		replied: make(chan struct{}), idle: make(chan struct{})}
	conn, err := s.tlsServer(ctx, *pending)
	if err != nil {
		return m, nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	head, secret, dedicated, err := wire.ReadPreface(conn)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		return m, nil, fmt.Errorf("%w: %w", errPreface, err)
	}
	if dedicated {
		asker, err = s.enterDedicated(secret, conn, pending)
		return m, asker, err
	}
	return m, nil, m.register(ctx, ln, conn, head)
}

// register takes a session through the hello and the reply, and leaves one that may be
// given clients. It owns the connection, which is pending until the session is in the
// books, and of which head has been read.
func (m *member) register(ctx context.Context, ln net.Listener, conn net.Conn, head []byte) error {
	s := m.srv
	cfg := s.cfg.limits.session()
	cfg.MaxOpens = s.cfg.maxOpens
	cfg.Head = head
	m.sess = mux.Server(conn, cfg)
	m.remote = m.sess.RemoteAddr().String()
	wanted, cancel := m.wanted(ctx, s.wg.Go)
	defer cancel()
	err := m.readHello(wanted)
	if err == nil {
		err = m.authorize(wanted, conn)
	}
	if err == nil {
		err = s.place(wanted, ln, m)
	}
	if err == nil {
		if err = m.confirm(wanted); err == nil {
			err = m.reply(ctx)
		}
		close(m.replied)
		if err != nil {
			m.unplace()
		}
	}
	if err != nil {
		m.refuse(ctx, err)
	}
	return err
}

var (
	errHandshake = errors.New("TLS handshake failed")
	errPreface   = errors.New("nothing that a registration begins with")
)

func (s *Server) tlsServer(ctx context.Context, conn net.Conn) (net.Conn, error) {
	if s.cfg.tls != nil {
		conn = tls.Server(&socket.Under{Conn: conn}, s.cfg.tls)
	}
	tc, ok := conn.(*tls.Conn) // or from a listener with TLS of its own
	if !ok {
		return conn, nil
	}
	if err := tc.HandshakeContext(ctx); err != nil {
		if not, ok := errors.AsType[tls.RecordHeaderError](err); ok && not.Conn != nil {
			sayTLS(ctx, socket.Unwrap(not.Conn))
		}
		conn.Close()
		return nil, fmt.Errorf("%w: %w", errHandshake, err)
	}
	return tc, nil
}

// sayTLS answers a peer that did not begin with TLS by an alert, which an app knows for
// one (mux.ErrTLS), and gives it a moment to hang up, so that our hanging up does not
// overtake the alert.
func sayTLS(ctx context.Context, conn net.Conn) {
	until := time.Now().Add(refusalTime)
	if d, ok := ctx.Deadline(); ok && d.Before(until) {
		until = d
	}
	const alert, fatal, unexpected = 21, 2, 10
	farewell(conn, until, []byte{alert, 3, 1, 0, 2, fatal, unexpected}) // an app waits for a frame's header, which is longer
}

// A refusal is an error that the service is told.
type refusal struct {
	told wire.Error
	err  error
}

func (r *refusal) Error() string { return r.told.Code + ": " + r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

func refuse(code, message string, err error) *refusal {
	return &refusal{wire.Error{Code: code, Message: message}, err}
}

// readHello accepts the control stream and reads the hello from it. A stock muxado
// client says none: it half-closes the stream.
func (m *member) readHello(ctx context.Context) error {
	select {
	case m.control = <-m.sess.Accepting():
	case <-m.sess.Done():
		return m.sess.Err()
	case <-ctx.Done():
		return fmt.Errorf("no control stream: %w", context.Cause(ctx))
	}
	m.sess.ForbidStreams()
	stop := cutShort(ctx, m.control)
	m.lines = wire.NewReader(m.control)
	m.lines.Limit(m.srv.cfg.limits.HelloSize)
	var hello wire.Hello
	err := m.lines.Read(&hello)
	m.lines.Limit(wire.MaxLine)
	if late := stop(); late != nil {
		err = late
	}
	var syntax *wire.SyntaxError
	switch {
	case err == io.EOF:
		m.lines = nil
		return nil
	case errors.Is(err, wire.ErrTooLong), errors.Is(err, wire.ErrCut), errors.As(err, &syntax):
		return refuse(wire.CodeMalformed, "the hello is not one line of JSON, or too long", fmt.Errorf("hello: %w", err))
	case err != nil:
		return fmt.Errorf("hello: %w", err)
	case hello.Version != wire.Version:
		return refuse(wire.CodeVersion, fmt.Sprintf("this relay speaks version %d", wire.Version),
			fmt.Errorf("hello of version %d", hello.Version))
	case len(hello.Name) > maxName:
		return refuse(wire.CodeMalformed, fmt.Sprintf("the name is longer than %d bytes", maxName),
			fmt.Errorf("name of %d bytes", len(hello.Name)))
	case hello.Hostname != "" && checkHostname(hello.Hostname) != nil:
		return refuse(wire.CodeHostUnavailable, "not a hostname", fmt.Errorf("hostname %.300q", hello.Hostname))
	case hello.Hostname != "" && hello.Port != 0:
		return refuse(wire.CodeMalformed, "a hostname comes without a port of its own",
			fmt.Errorf("port %d and hostname %s", hello.Port, hello.Hostname))
	case hello.Shared && hello.Name == "" && hello.Hostname == "":
		return refuse(wire.CodeMalformed, "only a name can be shared", errors.New("shared without a name"))
	case hello.Port < 0 || hello.Port > 65535:
		return refuse(wire.CodePortUnavailable, "not a port", fmt.Errorf("port %d asked for", hello.Port))
	}
	m.asked = hello
	m.spares = newSpares(m)
	m.sess.EnableStop()
	return nil
}

// cutShort has reads and writes of st end when ctx ends, until the function that it
// returns is called. That one reports ctx's error if it came first.
func cutShort(ctx context.Context, st *mux.Stream) (stop func() error) {
	after := context.AfterFunc(ctx, func() { st.SetDeadline(time.Unix(1, 0)) })
	return func() error {
		if after() {
			return nil
		}
		return context.Cause(ctx)
	}
}

// authorize asks what the app may have.
func (m *member) authorize(ctx context.Context, conn net.Conn) error {
	r := &m.shown
	*r = Registration{
		Token:  m.asked.Token,
		Remote: conn.RemoteAddr(),
		Name:   m.asked.Name,
		Port:   m.asked.Port,
		Shared: m.asked.Shared,

		Hostname: m.asked.Hostname,
	}
	if tc, ok := conn.(*tls.Conn); ok {
		state := tc.ConnectionState()
		r.TLS = &state
	}
	grant, err := m.ask(ctx)
	switch {
	case err != nil:
		return err
	case !grant.allowsName(r.Name):
		return refuse(wire.CodeUnauthorized, "not authorized for this name", fmt.Errorf("%s asks for the name %q", who(grant.Identity), r.Name))
	case r.Hostname != "" && !grant.allowsHost(r.Hostname):
		return refuse(wire.CodeUnauthorized, "not authorized for this hostname", fmt.Errorf("%s asks for the hostname %s", who(grant.Identity), r.Hostname))
	case r.Port != 0 && !grant.allowsPort(r.Port):
		return refuse(wire.CodePortUnavailable, "not authorized for this port", fmt.Errorf("%s asks for port %d", who(grant.Identity), r.Port))
	}
	m.grant = grant
	return nil
}

// ask asks the authorizer, who may be asked about the same app again.
func (m *member) ask(ctx context.Context) (grant Grant, err error) {
	s := m.srv
	s.mu.Lock()
	m.rules = s.rules
	s.mu.Unlock()
	authorize := s.cfg.authorize
	if authorize == nil {
		authorize = byCertificate
	}
	grant, err = authorize(ctx, m.shown)
	if err == nil {
		err = grant.validate()
	}
	switch {
	case ctx.Err() != nil:
		return grant, fmt.Errorf("authorizer: %w", context.Cause(ctx))
	case isUndecided(err):
		return grant, refuse(wire.CodeUnavailable, "it cannot be told now who may register", err)
	case err != nil:
		message := "not authorized"
		if errors.Is(err, errNoToken) {
			message = "not authorized without a token"
		}
		return grant, refuse(wire.CodeUnauthorized, message, err)
	}
	return grant, nil
}

// wanted returns a context that ends with ctx, or with the session: nothing is waited for
// once the app, or the server, has gone. Spawn runs a goroutine until then.
func (m *member) wanted(ctx context.Context, spawn func(func())) (context.Context, context.CancelFunc) {
	wanted, cancel := context.WithCancelCause(ctx)
	spawn(func() {
		select {
		case <-m.sess.Done():
			cancel(m.sess.Err())
		case <-wanted.Done():
		}
	})
	return wanted, func() { cancel(nil) }
}

func who(identity string) string {
	if identity == "" {
		return "somebody"
	}
	return strconv.Quote(identity)
}

// place finds the public address of a session: that of the lease it shows, that of
// the name it has a share in, or a new one. The session is in the books then, but gets
// no clients yet.
func (s *Server) place(ctx context.Context, registration net.Listener, m *member) error {
	for {
		svc, mine, err := s.findPlace(m)
		if err != nil {
			return err
		}
		if mine {
			return s.open(ctx, registration, svc, m)
		}
		if svc == nil {
			return nil
		}
		select {
		case <-svc.opened: // or not; see again
		case <-ctx.Done():
			return fmt.Errorf("waiting for another registration of the name: %w", context.Cause(ctx))
		}
	}
}

// findPlace attaches m to a service that is there and returns nil, or returns a new
// one that m has to open, or one that another session is opening.
func (s *Server) findPlace(m *member) (svc *service, mine bool, err error) {
	s.mu.Lock()
	defer s.unlockAndTell(errReplaced)
	if s.closing || s.handed {
		return nil, false, refuse(wire.CodeClosing, "the relay is going away", ErrServerClosed)
	}
	h := &m.asked
	if l := s.leases[keyOf(h.Lease)]; l != nil && l.svc.identity == m.grant.Identity {
		// A lease of somebody else is one that nobody knows.
		if l.ended {
			return nil, false, refuse(wire.CodeDisconnected, errDisconnected.Error(),
				fmt.Errorf("an app of %s, which was disconnected, comes back", l.svc.addr))
		}
		if !m.grant.allowsName(l.svc.name) { // it may have none
			return nil, false, refuse(wire.CodeUnauthorized, "not authorized for this name any more",
				fmt.Errorf("%s resumes the name %q", who(m.grant.Identity), l.svc.name))
		}
		if !m.grant.allowsAddress(l.svc) {
			return nil, false, refuse(wire.CodePortUnavailable, "not authorized for this address any more",
				fmt.Errorf("%s resumes at %s", who(m.grant.Identity), l.svc.addr))
		}
		s.resumeLocked(l, m)
		return nil, false, nil
	}
	svc, other := s.holdersLocked(h, m.grant.Identity)
	if other != nil {
		// The hostname is of one and the name of another.
		if svc.identity == "" || svc.identity != m.grant.Identity || !svc.parked() {
			return nil, false, refuse(wire.CodeNameTaken, "another service has this hostname", fmt.Errorf("hostname %s is taken", h.Hostname))
		}
		svc.endLocked()
		svc = other
	}
	switch {
	case svc == nil:
	case !svc.isOpen():
		return svc, false, nil
	case svc.host == h.Hostname && svc.shared && h.Shared && svc.identity == m.grant.Identity:
		if h.Port != 0 && h.Port != svc.port {
			return nil, false, refuse(wire.CodePortUnavailable, fmt.Sprintf("the name has port %d", svc.port),
				fmt.Errorf("port %d for a share of %s", h.Port, svc.addr))
		}
		if !m.grant.allowsAddress(svc) {
			return nil, false, refuse(wire.CodePortUnavailable, "not authorized for the name's address",
				fmt.Errorf("a share of %s for %s", svc.addr, who(m.grant.Identity)))
		}
		if limit := svc.limits.AppsPerService; limit > 0 && svc.apps() >= limit {
			return nil, false, refuse(wire.CodeServerFull, "no more apps for this name",
				fmt.Errorf("%d apps at %s", limit, svc.addr))
		}
		s.attachLocked(svc, m)
		return nil, false, nil
	case svc.identity != "" && svc.identity == m.grant.Identity && svc.parked():
		// Its owner has come back without the lease, as after a crash.
		if svc.host == h.Hostname && (h.Port == 0 || h.Port == svc.port) && m.grant.allowsAddress(svc) {
			svc.shared = h.Shared
			s.attachLocked(svc, m)
			for l := range svc.leases {
				if l != m.lease {
					s.endLeaseLocked(l)
				}
			}
			return nil, false, nil
		}
		svc.endLocked()
	default:
		what := "name"
		if svc == s.hosts.services[h.Hostname] {
			what = "hostname"
		}
		return nil, false, refuse(wire.CodeNameTaken, "another service has this "+what, fmt.Errorf("%s %q is taken", what, cmp.Or(h.Name, h.Hostname)))
	}
	if limit := s.cfg.limits.Services; limit > 0 && s.owners.Total() >= limit {
		return nil, false, refuse(wire.CodeServerFull, "no more services", fmt.Errorf("%d services", limit))
	}
	if !s.owners.Take(m.grant.Identity, m.grant.Limits.Services) {
		return nil, false, refuse(wire.CodeServerFull, "no more services for you",
			fmt.Errorf("%d services of %s", m.grant.Limits.Services, who(m.grant.Identity)))
	}
	svc = newService(s, h.Name, h.Hostname, m.grant.Identity, h.Shared, m.grant.Limits)
	s.enterLocked(svc)
	return svc, true, nil
}

// holdersLocked returns who has the hostname or the name that is asked for, and who has
// the name if that is somebody else; or, of services with neither, a parked service of the
// same owner that has the port.
func (s *Server) holdersLocked(h *wire.Hello, identity string) (svc, other *service) {
	svc = s.hosts.services[h.Hostname] // nobody has the empty one
	named := s.names[h.Name]           // nor that
	switch {
	case svc == nil:
		svc = named
	case named != svc:
		other = named
	}
	if svc != nil || h.Name != "" || h.Hostname != "" || h.Port == 0 || identity == "" {
		return svc, other
	}
	for svc := range s.services {
		if svc.name == "" && svc.host == "" && svc.port == h.Port && svc.identity == identity && svc.parked() {
			return svc, nil
		}
	}
	return nil, nil
}

// open gives a new service its public listener.
func (s *Server) open(ctx context.Context, registration net.Listener, svc *service, m *member) error {
	ln, err := s.listenFor(ctx, registration, svc, m)
	port := m.asked.Port
	switch {
	case err == nil:
	case err == ErrServerClosed:
		err = refuse(wire.CodeClosing, "the relay is going away", err)
	case err == errNoHosts:
		err = refuse(wire.CodeHostUnavailable, "this relay serves no hostnames", err)
	case ctx.Err() != nil:
		err = fmt.Errorf("public listener: %w", context.Cause(ctx))
	case errors.Is(err, ports.ErrFull):
		err = refuse(wire.CodeServerFull, "no port is free", err)
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		err = refuse(wire.CodeServerFull, "the relay has no file left", err)
	case errors.Is(err, ports.ErrRange):
		err = refuse(wire.CodePortUnavailable, fmt.Sprintf("port %d is not one of this relay's", port), err)
	case errors.Is(err, ports.ErrInUse):
		err = refuse(wire.CodePortUnavailable, fmt.Sprintf("port %d is in use", port), err)
	default:
		err = refuse(wire.CodePortUnavailable, "the relay cannot listen on its public host", err)
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil && svc.ended { // Shutdown or Disconnect was faster
		ln.Close()
		err = refuse(wire.CodeDisconnected, errDisconnected.Error(), errDisconnected)
		if s.closing {
			err = refuse(wire.CodeClosing, "the relay is going away", ErrServerClosed)
		}
	}
	if err != nil {
		svc.endLocked()
		close(svc.opened)
		return err
	}
	addr := ln.Addr().String()
	if svc.host == "" {
		addr = net.JoinHostPort(s.advertisedHost(ln, m.sess), strconv.Itoa(portOf(ln.Addr())))
	}
	s.attachLocked(svc, m)
	svc.openLocked(ln, addr)
	m.log = svc.log
	return nil
}

// listenFor makes the public listener that m asks for: at its own port, or at a host.
func (s *Server) listenFor(ctx context.Context, registration net.Listener, svc *service, m *member) (net.Listener, error) {
	if svc.host != "" {
		return s.openDoor(svc.host)
	}
	host := s.cfg.publicHost
	if !s.cfg.publicHostSet {
		host = hostOf(registration.Addr())
	}
	return s.cfg.ports.Listen(ctx, host, m.asked.Port, m.grant.FirstPort, m.grant.LastPort)
}

// enterLocked takes a service up in the server's books.
func (s *Server) enterLocked(svc *service) {
	s.services[svc] = struct{}{}
	if svc.name != "" {
		s.names[svc.name] = svc
	}
	if svc.host != "" {
		s.hosts.services[svc.host] = svc
	}
}

// hostOf returns the host to bind for those who register at addr.
func hostOf(addr net.Addr) string {
	if a, ok := addr.(*net.TCPAddr); ok {
		if a.Zone != "" {
			return a.IP.String() + "%" + a.Zone
		}
		if len(a.IP) == 0 {
			return ""
		}
		return a.IP.String()
	}
	return "127.0.0.1" // of this machine, like a Unix socket, or in memory
}

// portOf returns the port of a public listener, which WithListen may have made.
func portOf(addr net.Addr) int {
	if a, ok := addr.(*net.TCPAddr); ok {
		return a.Port
	}
	_, port, _ := net.SplitHostPort(addr.String())
	n, _ := strconv.Atoi(port)
	return n
}

// advertisedHost returns the host of a public address. All addresses are no address
// to be told; the one at which the service came is known to work.
func (s *Server) advertisedHost(ln net.Listener, sess *mux.Session) string {
	if s.cfg.advertisedHost != "" {
		return s.cfg.advertisedHost
	}
	if addr, ok := ln.Addr().(*net.TCPAddr); ok && addr.IP.IsUnspecified() {
		if at, ok := sess.LocalAddr().(*net.TCPAddr); ok {
			return hostOf(at)
		}
	}
	return hostOf(ln.Addr())
}

// reply tells the app its public address: in a line of JSON, and a stock client as
// plain text.
func (m *member) reply(ctx context.Context) error {
	stop := cutShort(ctx, m.control)
	var err error
	if m.lines == nil {
		if _, err = io.WriteString(m.control, m.svc.addr); err == nil {
			err = m.control.Close()
		}
	} else {
		err = m.say(wire.Reply{
			Version:     wire.Version,
			Address:     m.svc.addr,
			Lease:       m.secret,
			HeartbeatMS: int(max(m.srv.cfg.heartbeat.interval, 0) / time.Millisecond),
		})
	}
	late := stop()
	if err == nil && m.sess.Err() != nil {
		return nil // the app may have the reply, and come back with its lease
	}
	if late != nil {
		return late
	}
	return err
}

// refuse tells an app that it was not registered, if it is one, and ends the
// session.
func (m *member) refuse(ctx context.Context, err error) {
	var r *refusal
	if !errors.As(err, &r) || m.control == nil {
		m.sess.CloseWithError(mux.ProtocolError, err)
		return
	}
	defer m.sess.Close()
	defer cutShort(ctx, m.control)()
	if m.say(wire.Reply{Version: wire.Version, Error: &r.told}) != nil || m.control.CloseWrite() != nil {
		return
	}
	timer := time.NewTimer(cmp.Or(min(refusalTime, max(m.srv.cfg.limits.HandshakeTime, 0)), refusalTime))
	defer timer.Stop()
	select {
	case <-m.sess.Done():
	case <-timer.C:
	}
}

// unplace takes a session whose reply failed out of the books: it never had a client.
func (m *member) unplace() {
	m.stopTaking()
	if !m.resumed {
		m.srv.endLease(m) // the app does not know it
	}
	m.release()
	m.leave()
}
