// Package relay gives a program that nobody can dial, because it runs behind NAT or a
// firewall, a public TCP address: Register returns a net.Listener, and whoever
// connects to its address at the relay comes out of Accept. This program is a web
// server on a port of the relay's:
//
//	package main
//
//	import (
//		"context"
//		"fmt"
//		"log"
//		"net/http"
//
//		"github.com/tcprelay/relay"
//	)
//
//	func main() {
//		ln, err := relay.Register(context.Background(), "127.0.0.1:8080")
//		if err != nil {
//			log.Fatal(err)
//		}
//		fmt.Printf("http://%v\n", ln.Addr())
//		srv := &http.Server{Handler: http.HandlerFunc(hello)}
//		log.Fatal(srv.Serve(ln))
//	}
//
//	func hello(w http.ResponseWriter, r *http.Request) {
//		fmt.Fprintf(w, "hello, %s\n", r.RemoteAddr)
//	}
//
// And this is a relay for it:
//
//	srv, err := relay.NewServer(relay.WithPorts(8081, 8180))
//	if err != nil {
//		log.Fatal(err)
//	}
//	log.Fatal(srv.ListenAndServe("127.0.0.1:8080"))
//
// The app dials the relay, once. The relay dials nobody and does not look at the
// bytes:
//
//	client ──TCP──► ┌──────────────┐                      ┌────────────────┐
//	client ──TCP──► │ relay.Server │ ◄─── one session ─── │ relay.Register │
//	client ──TCP──► │ public :8081 │ a stream per client  │ ln.Accept()    │
//	                └──────────────┘   (the app dialled)  └────────────────┘
//
// # What a connection does
//
// An accepted [Conn] does what a *net.TCPConn does, so whatever serves a listener may
// serve this one: http.Server with Hijack, Shutdown and its timeouts, tls.NewListener,
// gRPC, a protocol of your own.
//
//   - RemoteAddr is the client's address. The app hears of a client at once, also if
//     the protocol has the server speak first.
//   - A half-close passes both ways: an app that read io.EOF can still answer.
//   - What ended otherwise is never io.EOF. A client's reset and a lost relay are other
//     errors of Read; what an app aborts, by SetLinger(0) and Close, its client sees as
//     a reset.
//   - Deadlines apply to calls that wait already. Close ends such calls and does not
//     wait, not even for a client that has stopped reading.
//   - Each connection has a window of its own, so that a client or an app that does not
//     read holds up nobody else.
//
// # Concurrency
//
// All methods may be called from any goroutine. A Listener has three goroutines and a
// Conn none. A Server has five for each service and two for each client, beside the
// callers of Serve; its Close returns when they have ended. Nothing is logged unless
// [WithLogger] is given.
//
// # Errors
//
// Register returns a [*RegisterError], whose Code tells what is wrong, unless an option
// is. After Close the error of Accept matches net.ErrClosed; when the session with the
// relay was lost it is another, and the listener is over: register anew. Errors of a
// Conn are *net.OpError around net.ErrClosed, os.ErrDeadlineExceeded (with Timeout
// true), syscall.ECONNRESET, syscall.EPIPE, or why the session ended. A clean end is
// plain io.EOF.
//
// # Limits
//
// There is no access control yet: no tokens, no bounds on services or clients but those
// below. Whoever reaches the registration port may take public ports, and those are
// open to all. Have services register on a loopback or private address, or over
// [WithTLSConfig] with a config that asks for client certificates, and keep the relay
// off the open internet.
//
// A lost session is not resumed yet: its connections end with an error, and so does
// Accept. Nothing probes an idle session but the keep-alive of TCP, if that is what it
// runs on, so that a peer whose machine is gone may be missed for minutes.
//
// All clients of a service share one transport connection, and with it the losses and
// the congestion that it meets. A service has room for some 65,000 clients at a time,
// and for a billion in the life of its session. Of bytes received that nobody has read
// yet, a connection holds at most 256 KiB, or up to 16 MiB if its reader was seen to
// keep up, and a session 256 MiB: beyond that the connection that holds most is reset.
// New clients beyond the backlog ([WithBacklog]) are reset too.
package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tcprelay/relay/internal/ports"
)

// ErrServerClosed is what Serve and ListenAndServe return after Shutdown or Close.
var ErrServerClosed = errors.New("relay: server closed")

// A Server is a relay. Services register on the listeners that Serve is given, and
// each gets a public listener of its own, whose clients are carried to it. The
// server never dials anybody, and does not look at the bytes.
type Server struct {
	cfg serverConfig

	mu        sync.Mutex
	listeners map[*net.Listener]struct{} // by pointer: what users pass may not be comparable
	pending   map[*net.Conn]struct{}     // registering
	services  map[*service]struct{}      // with a public listener or clients
	names     map[string]*service        // with a public listener and a name of their own
	closing   bool

	done chan struct{}  // closed when closing is set
	wg   sync.WaitGroup // every goroutine of the server's, but for Serve's own
}

// NewServer returns a Server. Without options any free port serves as a public one,
// on the host that services register at.
func NewServer(opts ...ServerOption) (*Server, error) {
	s := &Server{
		cfg: serverConfig{
			log:   slog.New(slog.DiscardHandler),
			ports: new(ports.Pool),
		},
		listeners: make(map[*net.Listener]struct{}),
		pending:   make(map[*net.Conn]struct{}),
		services:  make(map[*service]struct{}),
		names:     make(map[string]*service),
		done:      make(chan struct{}),
	}
	for _, o := range opts {
		if o == nil {
			continue
		}
		if err := o.applyServer(&s.cfg); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// ListenAndServe has services register on the TCP address addr. It always returns
// an error, as Serve does.
func (s *Server) ListenAndServe(addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	return s.Serve(ln)
}

// Serve has services register on ln, which may be of any kind, until the server or
// ln is closed; it closes ln. Several may be served at once. The error is never nil
// and is ErrServerClosed after Shutdown or Close.
func (s *Server) Serve(ln net.Listener) error {
	defer ln.Close()
	if !s.track(&ln) {
		return ErrServerClosed
	}
	defer s.untrack(&ln)
	s.cfg.log.Info("listening", "addr", ln.Addr().String())
	return s.acceptLoop(ln, func(conn net.Conn) {
		s.handleRegistration(ln, conn)
	})
}

// acceptLoop runs handle in a goroutine for each connection. Errors that pass, such
// as that no file descriptor is left, are waited out.
func (s *Server) acceptLoop(ln net.Listener, handle func(net.Conn)) error {
	var delay time.Duration
	for {
		conn, err := ln.Accept()
		if err == nil {
			delay = 0
			if !s.spawn(func() { handle(conn) }) {
				hangUp(conn)
			}
			continue
		}
		if s.isClosing() {
			return ErrServerClosed
		}
		//lint:ignore SA1019 there is no other sign of an error that passes
		if ne, ok := err.(net.Error); !ok || !ne.Temporary() {
			return err
		}
		delay = min(max(2*delay, 5*time.Millisecond), time.Second)
		s.cfg.log.Warn("accept failed", "addr", ln.Addr().String(), "err", err, "retry_in", delay)
		select {
		case <-time.After(delay):
		case <-s.done:
		}
	}
}

// hangUp closes a connection that was not served. It is a reset, which nobody takes
// for an answer of no bytes.
func hangUp(conn net.Conn) {
	if tc, ok := conn.(*net.TCPConn); ok {
		tc.SetLinger(0)
	}
	conn.Close()
}

// spawn runs f in a goroutine that Close and Shutdown wait for. It reports false,
// and does not, once the server is closing.
func (s *Server) spawn(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.wg.Go(f)
	return true
}

func (s *Server) isClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing
}

func (s *Server) track(ln *net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.listeners[ln] = struct{}{}
	return true
}

func (s *Server) untrack(ln *net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, ln)
}

// handleRegistration runs a connection to a registration listener, from the
// handshake to the end of the service that it registers.
func (s *Server) handleRegistration(ln net.Listener, conn net.Conn) {
	if !s.setPending(&conn, true) {
		conn.Close()
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	defer cancel()
	svc, err := s.register(ctx, ln, &conn)
	s.setPending(&conn, false)
	if err != nil {
		s.cfg.log.Warn("registration failed", "remote", conn.RemoteAddr().String(), "err", err)
		return
	}
	cancel()
	svc.run()
}

func (s *Server) setPending(conn *net.Conn, is bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !is {
		delete(s.pending, conn)
		return true
	}
	if !s.closing {
		s.pending[conn] = struct{}{}
	}
	return !s.closing
}

func (s *Server) tlsServer(ctx context.Context, conn net.Conn) (net.Conn, error) {
	if s.cfg.tls == nil {
		return conn, nil
	}
	tc := tls.Server(conn, s.cfg.tls)
	if err := tc.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("TLS handshake: %w", err)
	}
	return tc, nil
}

// Shutdown closes the registration listeners and all public ones, tells the
// services, and waits until their clients have left; then it ends their sessions.
// If ctx ends first it does what Close does and returns ctx's error.
func (s *Server) Shutdown(ctx context.Context) error {
	var told sync.WaitGroup
	for _, svc := range s.stopListening() {
		told.Go(svc.drain)
	}
	done := make(chan struct{})
	go func() {
		told.Wait()
		s.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		s.Close()
		<-done
		return ctx.Err()
	}
}

// Close closes all listeners and ends all sessions, which resets their clients. It
// returns when all goroutines of the server's have ended.
func (s *Server) Close() error {
	var all sync.WaitGroup
	for _, svc := range s.stopListening() {
		all.Go(svc.cutOff)
	}
	all.Wait()
	s.wg.Wait()
	return nil
}

// stopListening takes no more services and no more registrations, and returns the
// services that there are.
func (s *Server) stopListening() []*service {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closing {
		s.closing = true
		close(s.done)
	}
	for ln := range s.listeners {
		(*ln).Close()
	}
	for conn := range s.pending {
		(*conn).Close()
	}
	all := make([]*service, 0, len(s.services))
	for svc := range s.services {
		all = append(all, svc)
	}
	return all
}

// ErrNoService is what Disconnect returns for a name that no service has.
var ErrNoService = errors.New("relay: no service of that name")

// Disconnect ends the session of the named service, and of earlier ones of that name
// that are draining, which resets their clients. Name and port are free when it
// returns.
func (s *Server) Disconnect(name string) error {
	var named []*service
	s.mu.Lock()
	for svc := range s.services {
		if svc.name == name {
			named = append(named, svc)
		}
	}
	s.mu.Unlock()
	if named == nil {
		return ErrNoService
	}
	for _, svc := range named {
		svc.stopAccepting()
		svc.cutOff()
		s.remove(svc)
	}
	return nil
}

// ServiceInfo describes a registered service at one moment.
type ServiceInfo struct {
	Name    string    // as given, or else the public address
	Address string    // the public address, as the service was told
	Remote  string    // where the service registered from
	Since   time.Time // of the registration
	// Draining says that the service takes no more clients.
	Draining bool

	Clients  []ClientInfo // connected now, in order of arrival
	Accepted int64        // clients since the registration
	Refused  int64        // clients that could not be carried to the service
	BytesIn  int64        // from clients to the service
	BytesOut int64        // from the service to clients
}

// ClientInfo describes a connected client at one moment.
type ClientInfo struct {
	Remote   string
	Since    time.Time
	BytesIn  int64 // from the client to the service
	BytesOut int64 // from the service to the client
}

// Services returns a snapshot of the services, sorted by name.
func (s *Server) Services() []ServiceInfo {
	s.mu.Lock()
	all := make([]*service, 0, len(s.services))
	for svc := range s.services {
		all = append(all, svc)
	}
	s.mu.Unlock()
	infos := make([]ServiceInfo, len(all))
	for i, svc := range all {
		infos[i] = svc.info()
	}
	slices.SortFunc(infos, func(a, b ServiceInfo) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return a.Since.Compare(b.Since)
	})
	return infos
}
