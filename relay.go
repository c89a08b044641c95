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
// # What a listener does
//
// A [Listener] outlives its sessions with the relay. When one breaks, or the relay goes
// away, it opens another in the background, for as long as it is not closed, and gets
// the same public address: the relay keeps that for it for a while ([WithLease]), and
// new clients wait there. Accept waits too, and fails only after Close, or when the
// relay refuses the app for good. Connections that were accepted in a session that
// broke end with an error. [WithEvents] tells of it.
//
// Services can share one public port, and be told apart by host ([WithHostname],
// [Server.ServeHosts]).
//
// Several apps can share a name and its address ([WithShared]), to be replaced without
// a gap or to share the work.
//
// # Concurrency
//
// All methods may be called from any goroutine. A Listener has one goroutine, two for
// each session and one for each spare connection ([WithDedicated]), and a Conn none. A
// Server has one for each service, four for each session and one for each client, and a
// second one while a client does not take what comes, or is carried by a connection of its
// own, beside the callers of Serve; its Close returns when they have ended. Nothing is
// logged unless [WithLogger] is given.
//
// # Errors
//
// Register returns a [*RegisterError], whose Code tells what is wrong, unless an option
// is. After Close the error of Accept matches net.ErrClosed; when the relay will not
// have the app any longer it is a *RegisterError. Errors of a Conn are *net.OpError
// around net.ErrClosed, os.ErrDeadlineExceeded (with Timeout true),
// syscall.ECONNRESET, syscall.EPIPE, or why the session ended. A clean end is plain
// io.EOF.
//
// # Security
//
// A relay without [WithTokens], [WithAuthorizer] or a TLS config that verifies client
// certificates gives public ports to whoever asks. Those ports are open to all: clients
// are the app's to authenticate. A service belongs to the identity that registered it,
// and so do its name, port and lease. Without TLS ([WithTLSConfig], or [WithPin] for a
// relay known by its key) whoever can read the transport can read and change what it
// carries; tokens are not sent over it. What peers may take is bounded by [Limits].
//
// # Limits
//
// All clients of an app share one transport connection, and with it the losses and the
// congestion that it meets, unless each has one of its own ([WithDedicated]). A session
// has room for some 65,000 clients at a time. Of bytes received that nobody has read yet,
// a connection holds at most 256 KiB, or up to 40 MiB if its reader was seen to keep up,
// and a session 256 MiB: beyond that a connection whose reader has stood still is reset. New clients beyond the backlog
// ([WithBacklog]) are given to another app of a shared name, or reset.
package relay

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tcprelay/relay/internal/quota"
	"github.com/tcprelay/relay/internal/socket"
	"github.com/tcprelay/relay/internal/tally"
)

// ErrServerClosed is what Serve and ListenAndServe return after Shutdown or Close.
var ErrServerClosed = errors.New("relay: server closed")

// A Server is a relay. Services register on the listeners that Serve is given, and
// each gets a public listener of its own, whose clients are carried to it. The
// server never dials anybody, and does not look at the bytes.
type Server struct {
	cfg     serverConfig
	refused *tally.Tally // everything that was over a limit or refused

	mu        sync.Mutex
	listeners map[*net.Listener]struct{} // by pointer: what users pass may not be comparable
	pending   map[*net.Conn]struct{}     // registering
	services  map[*service]struct{}      // with a public listener, a session, or one to come
	names     map[string]*service        // those that were asked for
	leases    map[leaseKey]*lease        // those that can be shown
	gone      []*lease                   // ended just now, of apps that are away; see unlockAndTell
	rules     int                        // how often Reauthorize was called
	closing   bool
	handed    bool // over, or about to be: what registers now the successor would not know
	warned    bool // that anybody may register

	// Who holds how much; each for itself, beside mu.
	pendingIPs quota.Book[netip.Addr]

	hosts     hosts // guarded by mu
	askers    askers
	dedicated atomic.Int64       // connections, spare ones too
	owners    quota.Book[string] // services of each identity
	clients   quota.Book[holder]

	done chan struct{}  // closed when closing is set
	wg   sync.WaitGroup // every goroutine of the server's, but for Serve's own
}

// NewServer returns a Server. Without options any free port serves as a public one,
// on the host that services register at, and anybody who reaches the registration
// listener may register.
func NewServer(opts ...ServerOption) (*Server, error) {
	s := &Server{
		cfg: serverConfig{
			log:       slog.New(slog.DiscardHandler),
			events:    new(events),
			heartbeat: heartbeat{defaultHeartbeat, 3 * defaultHeartbeat},
			lease:     defaultLease,
		},
		listeners: make(map[*net.Listener]struct{}),
		pending:   make(map[*net.Conn]struct{}),
		services:  make(map[*service]struct{}),
		names:     make(map[string]*service),
		leases:    make(map[leaseKey]*lease),
		done:      make(chan struct{}),
		hosts: hosts{
			services: make(map[string]*service),
			greeting: make(map[net.Conn]struct{}),
		},
	}
	for _, o := range opts {
		if o == nil {
			continue
		}
		if err := o.applyServer(&s.cfg); err != nil {
			return nil, err
		}
	}
	if s.cfg.tokens != nil {
		if s.cfg.authorize != nil {
			return nil, errors.New("relay: WithTokens and WithAuthorizer exclude each other")
		}
		s.cfg.authorize = s.cfg.tokens.authorize
	}
	s.cfg.limits = s.cfg.limits.forServer()
	s.refused = tally.New(s.cfg.log)
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
		if !s.spawn(func() { s.handleRegistration(ln, conn) }) {
			hangUp(conn)
		}
	})
}

// acceptLoop calls handle with each connection. Errors that pass, such as that no file
// descriptor is left, are waited out.
func (s *Server) acceptLoop(ln net.Listener, handle func(net.Conn)) error {
	socket.Unpaced(ln)
	var delay time.Duration
	for {
		conn, err := ln.Accept()
		if err == nil {
			delay = 0
			handle(conn)
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
		s.refused.Add("accept", "accept failed", "addr", ln.Addr().String(), "err", err, "retry_in", delay)
		select {
		case <-time.After(delay):
		case <-s.done:
		}
	}
}

// hangUp closes a connection that was not served. It is a reset, which nobody takes
// for an answer of no bytes.
func hangUp(conn net.Conn) {
	if c, ok := conn.(interface{ SetLinger(int) error }); ok {
		c.SetLinger(0)
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

// track enters a registration listener, and warns of one that is open to all.
func (s *Server) track(ln *net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.listeners[ln] = struct{}{}
	addr, ok := (*ln).Addr().(*net.TCPAddr)
	if ok && !addr.IP.IsLoopback() && !s.cfg.guarded() && !s.warned {
		s.warned = true
		s.cfg.log.Warn("anybody who reaches this address may register services; see WithTokens, WithAuthorizer and WithTLSConfig",
			"addr", addr.String())
	}
	return true
}

func (s *Server) untrack(ln *net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, ln)
}

// Shutdown closes the registration listeners and all public ones, tells the
// services, and waits until their clients have left; then it ends their sessions.
// If ctx ends first it does what Close does and returns ctx's error.
func (s *Server) Shutdown(ctx context.Context) error {
	s.stopHosts(ctx)
	var told sync.WaitGroup
	for _, m := range s.stopListening() {
		told.Go(m.drain)
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
	for _, m := range s.stopListening() {
		all.Go(func() { m.cutOff(ErrServerClosed) })
	}
	all.Wait()
	s.wg.Wait()
	return nil
}

// stopListening takes no more services, clients and registrations, and returns the
// sessions that there are.
func (s *Server) stopListening() (all []*member) {
	var closers []io.Closer // a user's, which may take their time
	defer func() {
		for _, c := range closers {
			c.Close()
		}
	}()
	s.mu.Lock()
	defer s.unlockAndTell(ErrServerClosed)
	if !s.closing {
		s.closing = true
		close(s.done)
	}
	for ln := range s.listeners {
		closers = append(closers, *ln)
	}
	for _, ln := range s.hosts.listeners {
		closers = append(closers, *ln)
	}
	for conn := range s.pending {
		closers = append(closers, *conn)
	}
	for conn := range s.hosts.greeting {
		closers = append(closers, conn)
	}
	for svc := range s.services {
		all = append(all, svc.endLocked()...)
	}
	for key, l := range s.leases { // of those that Disconnect ended
		l.expiry.Stop()
		delete(s.leases, key)
	}
	return all
}

// ErrNoService is what Disconnect returns for a name that no service has.
var ErrNoService = errors.New("relay: no service of that name")

// Disconnect ends the sessions of the named service, those that are draining too,
// which resets their clients, and its leases. The apps are told, so that their Accept
// fails with CodeDisconnected and they do not come back by themselves; one that is away
// is told when it comes back, unless that takes longer than WithLease. Who shall never
// come back must not be authorized. Name and port are free when it returns.
func (s *Server) Disconnect(name string) error {
	var named []*service
	var members []*member
	s.mu.Lock()
	for svc := range s.services {
		if svc.name == name {
			named = append(named, svc)
		}
	}
	if named == nil { // or the address of one without a name, which is nobody's name
		for svc := range s.services {
			if svc.title() == name {
				named = append(named, svc)
			}
		}
	}
	for _, svc := range named {
		members = append(members, svc.dismissLocked()...)
	}
	s.unlockAndTell(errDisconnected)
	if named == nil {
		return ErrNoService
	}
	var all sync.WaitGroup
	for _, m := range members {
		all.Go(m.disconnect)
	}
	all.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, svc := range named {
		s.dropLocked(svc) // its sessions have ended, if not noticed it yet
	}
	return nil
}

// Refusals counts, since the server began, the registrations and clients that were
// refused or cut off, by why: the codes of registration errors, and the names in
// Limits. There are also, of registrations, "tls" (a handshake that failed), "broken"
// (not the protocol, or hung up before the reply), "revoked" (by Reauthorize), and of dedicated connections "secret"
// (nobody had asked for it) and "files" (no files left for it); of clients "no_app" (no app
// took it), and of those who come by a host "unknown_host" and "greeting" (none that names
// a host, in time or at all); and "accept" (Accept of a listener failed, and was tried
// again).
func (s *Server) Refusals() map[string]int64 { return s.refused.Counts() }

// ServiceInfo describes a public address at one moment.
type ServiceInfo struct {
	Name     string    // as given, or else the hostname, or the public address
	Address  string    // the public address, as the service was told
	Hostname string    // that clients reach it by; empty if it has a port of its own
	Identity string    // whose it is
	Shared   bool      // several apps may have it
	Since    time.Time // when it was first registered
	// Draining says that it takes no more clients.
	Draining bool

	// Sessions are those of the apps behind it, in order of arrival. There is none
	// while an app that was lost has still time to come back.
	Sessions []SessionInfo
	Clients  []ClientInfo // connected now, in order of arrival
	Waiting  int          // clients that wait for an app to come back

	Accepted int64            // clients that were connected to an app, also if it refused them
	Refused  int64            // clients that were not, or that no app took
	Refusals map[string]int64 // and those that were cut off, by why; see Limits
	BytesIn  int64            // from clients to the app
	BytesOut int64            // from the app to clients
}

// SessionInfo describes the session of an app at one moment.
type SessionInfo struct {
	Remote    string        // where the app registered from
	Since     time.Time     // when it did
	LastHeard time.Time     // when anything last came from it
	RoundTrip time.Duration // of the last ping; 0 before one was answered
	Clients   int           // connected through it now
	Draining  bool          // it gets no more clients
}

// ClientInfo describes a connected client at one moment.
type ClientInfo struct {
	Remote   string    // its address
	Since    time.Time // when it came
	BytesIn  int64     // from the client to the app
	BytesOut int64     // from the app to the client
}

// Services returns a snapshot of the services, sorted by name.
func (s *Server) Services() []ServiceInfo {
	s.mu.Lock()
	all := make([]*service, 0, len(s.services))
	for svc := range s.services {
		if svc.isOpen() {
			all = append(all, svc)
		}
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
