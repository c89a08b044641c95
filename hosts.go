package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tcprelay/relay/internal/greeting"
)

const (
	// haste is what clients that say slowly whom they want have left when the server
	// shuts down.
	haste = time.Second

	kindUnknownHost = "unknown_host"
	kindGreeting    = "greeting"
)

// hosts are the services that clients reach by name, through listeners that they share.
// Server.mu guards them.
type hosts struct {
	services  map[string]*service // by hostname, which may be a wildcard
	listeners []*net.Listener     // of ServeHosts, in the order of the calls
	greeting  map[net.Conn]struct{}
	greeters  sync.WaitGroup // for each of them, and for the accept loops
	closed    bool           // the listeners are
}

// ServeHosts has the clients that come to the listeners reach the services that were
// registered with [WithHostname]: by the name in a TLS handshake (server_name) or in the
// first request of HTTP/1 in clear (Host). What a client says reaches the app byte for
// byte, TLS ends there, and all that it says later on the same connection goes to the same
// app.
//
// Apps are told the port of the first listener, which has to be served before they
// register; more may be served later. Whom a client wants it has to say within
// Limits.HandshakeTime and Limits.HelloSize; until then it counts as one of Limits.Clients
// and ClientsPerIP. Who wants somebody unknown gets an alert of TLS (unrecognized_name) or
// a 404, and if the app is away and does not come back in time another alert, or a 503.
//
// It returns as Serve does, when one of the listeners ends, and closes them all; HandOver
// ends it too.
func (s *Server) ServeHosts(listeners ...net.Listener) error {
	closeAll := func() {
		for _, ln := range listeners {
			ln.Close()
		}
	}
	defer closeAll()
	s.mu.Lock()
	closed := s.closing || s.hosts.closed
	if !closed {
		for i := range listeners {
			s.hosts.listeners = append(s.hosts.listeners, &listeners[i])
			s.hosts.greeters.Add(1)
		}
	}
	s.mu.Unlock()
	if closed {
		return ErrServerClosed
	}
	ended := make(chan error)
	for i, ln := range listeners {
		s.cfg.log.Info("listening for hosts", "addr", ln.Addr().String())
		go func() {
			err := s.acceptLoop(ln, s.greet)
			s.forgetHosts(&listeners[i])
			s.hosts.greeters.Done()
			ended <- err
		}()
	}
	var err error
	for range listeners {
		if e := <-ended; err == nil {
			err = e
			closeAll() // one without the others is none
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hosts.closed || err == nil {
		err = ErrServerClosed
	}
	return err
}

func (s *Server) forgetHosts(ln *net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, l := range s.hosts.listeners {
		if l == ln {
			s.hosts.listeners = append(s.hosts.listeners[:i:i], s.hosts.listeners[i+1:]...)
			break
		}
	}
}

// greet finds out whom a client wants, in a goroutine of its own.
func (s *Server) greet(conn net.Conn) {
	if d := s.cfg.limits.HandshakeTime; d > 0 {
		conn.SetReadDeadline(time.Now().Add(d))
	}
	s.mu.Lock()
	closing := s.closing
	if !closing {
		if s.hosts.closed {
			conn.SetReadDeadline(time.Now().Add(haste))
		}
		s.hosts.greeting[conn] = struct{}{}
		s.hosts.greeters.Add(1)
		s.wg.Go(func() { s.serveGreeting(conn) })
	}
	s.mu.Unlock()
	if closing {
		hangUp(conn)
	}
}

// serveGreeting has a client that says whom it wants reach that service.
func (s *Server) serveGreeting(conn net.Conn) {
	defer s.hosts.greeters.Done()
	limits := &s.cfg.limits
	claims := []claim{{holder{}, limits.Clients, kindClients}}
	if ip := ipOf(conn.RemoteAddr()); ip.IsValid() {
		claims = append(claims, claim{holder{ip: ip}, limits.ClientsPerIP, kindClientsPerIP})
	}
	refuse := func(kind string, err error) {
		s.refused.Add(kind, "client refused", "remote", conn.RemoteAddr().String(), "err", cleanErr(err))
	}
	if kind := s.clientsOver(claims); kind != "" {
		s.endGreeting(conn)
		refuse(kind, errOverLimit)
		hangUp(conn)
		return
	}
	g, err := greeting.Read(conn, limits.HelloSize)
	why := greeting.Unknown
	switch svc := s.serviceOf(g.Host); {
	case err != nil:
		why = greeting.ReasonOf(err)
		refuse(kindGreeting, err)
	case svc == nil:
		refuse(kindUnknownHost, fmt.Errorf("host %.100q", g.Host))
	default:
		s.endGreeting(conn)
		s.giveBack(claims)
		if svc.ln.(*door).pass(&greeted{conn, g}) {
			return
		}
		refuse(kindUnknownHost, errClosed) // just now
		sayLast(conn, g.Answer(greeting.Away))
		return
	}
	farewell(conn, time.Now().Add(refusalTime), g.Answer(why)) // it counts until then
	s.endGreeting(conn)
	s.giveBack(claims)
}

// endGreeting takes note that a client is not greeting any more, and has all the time again.
func (s *Server) endGreeting(conn net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.hosts.greeting, conn)
	conn.SetReadDeadline(time.Time{})
}

// serviceOf returns the service that has a host: by its own name, or by a wildcard for its
// first label; nil if there is none.
func (s *Server) serviceOf(host string) *service {
	s.mu.Lock()
	defer s.mu.Unlock()
	svc := s.hosts.services[host]
	if svc == nil {
		if _, rest, ok := strings.Cut(host, "."); ok {
			svc = s.hosts.services["*."+rest]
		}
	}
	if svc == nil || !svc.isOpen() {
		return nil
	}
	return svc
}

// openDoor returns what a service with a hostname has for a public listener.
func (s *Server) openDoor(host string) (net.Listener, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hosts.closed {
		return nil, ErrServerClosed
	}
	if len(s.hosts.listeners) == 0 {
		return nil, errNoHosts
	}
	port := portOf((*s.hosts.listeners[0]).Addr())
	return newDoor(net.JoinHostPort(host, strconv.Itoa(port))), nil
}

var errNoHosts = errors.New("no listener for hosts")

// stopHosts takes no more clients that come by a host, and waits for those that have not
// said whom they want, for a moment or until ctx ends: until then services take clients.
func (s *Server) stopHosts(ctx context.Context) {
	s.mu.Lock()
	s.hosts.closed = true
	listeners := s.hosts.listeners
	for conn := range s.hosts.greeting {
		conn.SetReadDeadline(time.Now().Add(haste))
	}
	s.mu.Unlock()
	for _, ln := range listeners {
		(*ln).Close()
	}
	done := make(chan struct{})
	go func() {
		s.hosts.greeters.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// farewell tells a client something before it hangs up, which is not to overtake that:
// the client has some time to hang up first. With nothing to say it is a reset.
func farewell(conn net.Conn, until time.Time, b []byte) {
	if len(b) == 0 {
		hangUp(conn)
		return
	}
	conn.SetDeadline(until)
	if _, err := conn.Write(b); err == nil {
		if c, ok := conn.(interface{ CloseWrite() error }); ok {
			c.CloseWrite()
		}
		io.Copy(io.Discard, conn)
	}
	conn.Close()
}

// sayLast is farewell for who has read all that the client has said, so that hanging up is
// no reset, and waits for nothing.
func sayLast(conn net.Conn, b []byte) {
	conn.SetWriteDeadline(time.Now().Add(haste)) // there is room for it
	conn.Write(b)
	conn.Close()
}

// A door is the public listener of a service that has no port of its own: what it accepts
// came by a listener for all hosts.
type door struct {
	addr   hostAddr
	conns  chan *greeted
	closed chan struct{}
	once   sync.Once
}

func newDoor(addr string) *door {
	return &door{addr: hostAddr(addr), conns: make(chan *greeted), closed: make(chan struct{})}
}

// greeted is a client that has said whom it wants.
type greeted struct {
	net.Conn
	greeting greeting.Greeting
}

// pass gives a client to whoever accepts. It reports false if nobody does any more.
func (d *door) pass(g *greeted) bool {
	select {
	case d.conns <- g:
		return true
	case <-d.closed:
		return false
	}
}

func (d *door) Accept() (net.Conn, error) {
	select {
	case g := <-d.conns:
		return g, nil
	case <-d.closed:
		return nil, net.ErrClosed
	}
}

func (d *door) Close() error {
	d.once.Do(func() { close(d.closed) })
	return nil
}

func (d *door) Addr() net.Addr { return d.addr }

// checkHostname returns what is wrong with a host that an app wants to be reached by:
// letters, digits, hyphens and underscores between dots, with "*" for a first label that
// may be any.
func checkHostname(host string) error {
	labels := strings.Split(strings.TrimPrefix(host, "*."), ".")
	if len(host) > 253 || len(labels) < 2 && strings.HasPrefix(host, "*") {
		return fmt.Errorf("%.300q is not a hostname", host)
	}
	for _, label := range labels {
		ok := label != "" && len(label) <= 63 && label[0] != '-' && label[len(label)-1] != '-'
		for _, c := range label {
			ok = ok && ('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_')
		}
		if !ok {
			return fmt.Errorf("%.300q is not a hostname (in lower case, and what is not ASCII as xn--...)", host)
		}
	}
	return nil
}
