package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/tcprelay/relay/internal/join"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/ports"
	"github.com/tcprelay/relay/internal/wire"
)

// refusalTime is how long a refused service may take to hang up, so that our
// hanging up does not overtake the reply.
const refusalTime = 2 * time.Second

// drainNotice is how long a service that takes nothing may delay being told that the
// relay goes away.
const drainNotice = time.Second

// A service is one registration: a session with the app, and a public listener
// whose clients are each a stream of it.
//
// Three kinds of goroutine run for it: run, which ends it, the accept loop, and two
// for each client.
type service struct {
	srv     *Server
	log     *slog.Logger
	name    string
	named   bool   // by itself; otherwise name is addr
	addr    string // the public address, as the service was told
	since   time.Time
	sess    *mux.Session
	control *mux.Stream
	lines   *wire.Reader  // of control; nil for a stock muxado client
	ln      net.Listener  // public
	pending *net.Conn     // its key in the server's book of those registering
	replied chan struct{} // closed when the service was told its address

	mu       sync.Mutex
	clients  map[*client]struct{}
	active   int // clients, and those for whom a stream is being opened
	accepted int64
	refused  int64
	bytesIn  int64 // of clients that have left
	bytesOut int64
	draining bool
	cut      bool          // cutOff was called
	idle     chan struct{} // closed when draining and the last client has left
}

// A client is a connection to a public listener.
type client struct {
	conn   *net.TCPConn
	st     *mux.Stream
	since  time.Time
	header int64 // bytes of st that are not the client's
}

func (c *client) counts() (in, out int64) {
	in, out = c.st.Counts()
	return in - c.header, out
}

// register takes a connection through TLS, the hello and the reply, and leaves a
// service with a public listener. It owns the connection, which is pending until the
// service is in the books.
func (s *Server) register(ctx context.Context, ln net.Listener, pending *net.Conn) (*service, error) {
	conn, err := s.tlsServer(ctx, *pending)
	if err != nil {
		return nil, err
	}
	// Room for the control stream, and for one more that comes with it: run makes a
	// protocol error of that one too.
	sess := mux.Server(conn, mux.Config{Backlog: 2})
	svc := &service{srv: s, sess: sess, pending: pending,
		clients: make(map[*client]struct{}), idle: make(chan struct{}), replied: make(chan struct{})}
	hello, err := svc.readHello(ctx)
	if err == nil {
		err = svc.listen(s, ln, hello)
	}
	if err == nil {
		err = svc.reply(ctx)
		close(svc.replied)
		if err != nil {
			svc.stopAccepting()
			s.remove(svc)
		}
	}
	if err != nil {
		svc.refuse(ctx, err)
		return nil, err
	}
	return svc, nil
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
func (svc *service) readHello(ctx context.Context) (*wire.Hello, error) {
	select {
	case svc.control = <-svc.sess.Accepting():
	case <-svc.sess.Done():
		return nil, svc.sess.Err()
	case <-ctx.Done():
		return nil, fmt.Errorf("no control stream: %w", context.Cause(ctx))
	}
	svc.sess.ForbidStreams()
	stop := cutShort(ctx, svc.control)
	svc.lines = wire.NewReader(svc.control)
	var hello wire.Hello
	err := svc.lines.Read(&hello)
	if late := stop(); late != nil {
		err = late
	}
	var syntax *wire.SyntaxError
	switch {
	case err == io.EOF:
		svc.lines = nil
		return &wire.Hello{Version: wire.Version}, nil
	case errors.Is(err, wire.ErrTooLong), errors.Is(err, wire.ErrCut), errors.As(err, &syntax):
		return nil, refuse(wire.CodeMalformed, "the hello is not one line of JSON", fmt.Errorf("hello: %w", err))
	case err != nil:
		return nil, fmt.Errorf("hello: %w", err)
	case hello.Version != wire.Version:
		return nil, refuse(wire.CodeVersion, fmt.Sprintf("this relay speaks version %d", wire.Version),
			fmt.Errorf("hello of version %d", hello.Version))
	case len(hello.Name) > maxName:
		return nil, refuse(wire.CodeMalformed, fmt.Sprintf("the name is longer than %d bytes", maxName),
			fmt.Errorf("name of %d bytes", len(hello.Name)))
	case hello.Port < 0 || hello.Port > 65535:
		return nil, refuse(wire.CodePortUnavailable, "not a port", fmt.Errorf("port %d asked for", hello.Port))
	}
	svc.sess.EnableStop()
	return &hello, nil
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

// listen opens the public listener and enters the service in the server's books.
func (svc *service) listen(s *Server, registration net.Listener, hello *wire.Hello) error {
	host := s.cfg.publicHost
	if !s.cfg.publicHostSet {
		host = hostOf(registration.Addr())
	}
	ln, err := s.cfg.ports.Listen(host, hello.Port)
	switch {
	case errors.Is(err, ports.ErrFull):
		return refuse(wire.CodeServerFull, "no port is free", err)
	case errors.Is(err, ports.ErrRange):
		return refuse(wire.CodePortUnavailable, fmt.Sprintf("port %d is not one of this relay's", hello.Port), err)
	case errors.Is(err, ports.ErrInUse):
		return refuse(wire.CodePortUnavailable, fmt.Sprintf("port %d is in use", hello.Port), err)
	case err != nil:
		return refuse(wire.CodePortUnavailable, "the relay cannot listen on its public host", err)
	}
	svc.ln = ln
	svc.since = time.Now()
	svc.addr = net.JoinHostPort(s.advertisedHost(ln, svc.sess), strconv.Itoa(ln.Addr().(*net.TCPAddr).Port))
	svc.name = cmp.Or(hello.Name, svc.addr)
	svc.named = hello.Name != ""
	svc.log = s.cfg.log.With("service", svc.name, "addr", svc.addr)
	if err := s.add(svc); err != nil {
		ln.Close()
		return err
	}
	return nil
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

// advertisedHost returns the host of a public address. All addresses are no address
// to be told; the one at which the service came is known to work.
func (s *Server) advertisedHost(ln net.Listener, sess *mux.Session) string {
	if s.cfg.advertisedHost != "" {
		return s.cfg.advertisedHost
	}
	addr := ln.Addr().(*net.TCPAddr)
	if addr.IP.IsUnspecified() {
		if at, ok := sess.LocalAddr().(*net.TCPAddr); ok {
			return hostOf(at)
		}
	}
	return hostOf(addr)
}

func (s *Server) add(svc *service) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return refuse(wire.CodeClosing, "the relay is going away", ErrServerClosed)
	}
	if svc.named && s.names[svc.name] != nil {
		return refuse(wire.CodeNameTaken, fmt.Sprintf("another service is called %q", svc.name), fmt.Errorf("name %q is taken", svc.name))
	}
	if svc.named {
		s.names[svc.name] = svc
	}
	s.services[svc] = struct{}{}
	delete(s.pending, svc.pending) // from here on it is drained, not dropped
	return nil
}

func (s *Server) remove(svc *service) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.services, svc)
}

func (s *Server) freeName(svc *service) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.names[svc.name] == svc {
		delete(s.names, svc.name)
	}
}

// reply tells the service its public address: in a line of JSON, and a stock client
// as plain text.
func (svc *service) reply(ctx context.Context) error {
	stop := cutShort(ctx, svc.control)
	var err error
	if svc.lines == nil {
		if _, err = io.WriteString(svc.control, svc.addr); err == nil {
			err = svc.control.Close()
		}
	} else {
		err = svc.say(wire.Reply{Version: wire.Version, Address: svc.addr})
	}
	if late := stop(); late != nil {
		return late
	}
	return err
}

func (svc *service) say(v any) error {
	line, err := wire.Line(v)
	if err != nil {
		return err
	}
	_, err = svc.control.Write(line)
	return err
}

// refuse tells a service that it was not registered, if it is one, and ends the
// session.
func (svc *service) refuse(ctx context.Context, err error) {
	var r *refusal
	if !errors.As(err, &r) {
		svc.sess.CloseWithError(mux.ProtocolError, err)
		return
	}
	defer svc.sess.Close()
	defer cutShort(ctx, svc.control)()
	if svc.say(wire.Reply{Version: wire.Version, Error: &r.told}) != nil || svc.control.CloseWrite() != nil {
		return
	}
	timer := time.NewTimer(refusalTime)
	defer timer.Stop()
	select {
	case <-svc.sess.Done():
	case <-timer.C:
	}
}

// run serves the service until its session ends, or until it has said that it takes
// no more clients and the last one has left.
func (svc *service) run() {
	svc.log.Info("registered", "remote", svc.sess.RemoteAddr().String(), "protocol", svc.protocol())
	svc.srv.spawn(svc.acceptClients)
	if svc.lines != nil {
		svc.srv.spawn(svc.readControl)
	}
	select {
	case <-svc.sess.Done():
	case <-svc.idle:
		svc.sess.Finish() // what clients sent last may still be on its way
	case <-svc.sess.Accepting():
		svc.sess.CloseWithError(mux.ProtocolError, errors.New("the service opened a stream"))
	}
	err := svc.sess.Err()
	svc.sess.Close()
	svc.stopAccepting()
	<-svc.idle // clients see the session's end
	svc.srv.remove(svc)
	info := svc.info()
	svc.log.Info("service ended", "accepted", info.Accepted, "refused", info.Refused,
		"bytes_in", info.BytesIn, "bytes_out", info.BytesOut, "err", err)
}

// protocol names what the service speaks, for the log.
func (svc *service) protocol() string {
	if svc.lines == nil {
		return "muxado"
	}
	return "relay"
}

// readControl handles what the service says until it says no more.
func (svc *service) readControl() {
	for {
		var m wire.Control
		err := svc.lines.Read(&m)
		if err == nil {
			switch m.Type {
			case wire.Ping:
				err = svc.say(wire.Control{Type: wire.Pong, ID: m.ID})
			case wire.Close:
				svc.stopAccepting()
			}
		}
		if err == io.EOF {
			svc.stopAccepting()
			return
		}
		if err != nil {
			if svc.sess.Err() == nil { // otherwise it has ended, perhaps taking its time
				svc.sess.CloseWithError(mux.ProtocolError, fmt.Errorf("control stream: %w", err))
			}
			return
		}
	}
}

// drain tells the service that the relay is going away, and takes no more clients
// for it.
func (svc *service) drain() {
	<-svc.replied // so that the reply comes first
	if svc.lines != nil {
		svc.control.SetWriteDeadline(time.Now().Add(drainNotice))
		svc.say(wire.Control{Type: wire.Drain})
		svc.control.SetWriteDeadline(time.Time{})
	}
	svc.stopAccepting()
}

// stopAccepting closes the public listener and gives up the name. The clients that
// there are stay; when the last one has left the service is idle.
func (svc *service) stopAccepting() {
	svc.ln.Close()
	svc.srv.freeName(svc)
	svc.mu.Lock()
	defer svc.mu.Unlock()
	if svc.draining {
		return
	}
	svc.draining = true
	if svc.active == 0 {
		close(svc.idle)
	}
}

func (svc *service) acceptClients() {
	err := svc.srv.acceptLoop(svc.ln, func(conn net.Conn) { svc.carry(conn.(*net.TCPConn)) })
	if !errors.Is(err, net.ErrClosed) && err != ErrServerClosed {
		svc.log.Warn("public listener failed", "err", err)
		svc.stopAccepting()
	}
}

// carry opens a stream for a client and carries its bytes until both are done.
func (svc *service) carry(conn *net.TCPConn) {
	c, err := svc.open(conn)
	if errors.Is(err, mux.ErrStreamsExhausted) {
		svc.stopAccepting() // the app hears of it when the last client has left
	}
	if err != nil {
		hangUp(conn)
		svc.log.Warn("client refused", "client", conn.RemoteAddr().String(), "err", err)
		return
	}
	err = join.Join(conn, c.st)
	in, out := svc.forget(c)
	svc.log.Info("client left", "client", conn.RemoteAddr().String(),
		"bytes_in", in, "bytes_out", out, "seconds", time.Since(c.since).Seconds(), "err", err)
}

func (svc *service) open(conn *net.TCPConn) (*client, error) {
	if !svc.enter() {
		return nil, errors.New("the service takes no more clients")
	}
	var header []byte
	if svc.lines != nil {
		var room [64]byte
		header = wire.AppendProxy(room[:0], conn.RemoteAddr(), conn.LocalAddr())
	}
	st, err := svc.sess.Open(header)

	svc.mu.Lock()
	defer svc.mu.Unlock()
	if err != nil {
		svc.refused++
		svc.leaveLocked()
		return nil, err
	}
	c := &client{conn: conn, st: st, since: time.Now(), header: int64(len(header))}
	svc.clients[c] = struct{}{}
	svc.accepted++
	if svc.cut {
		hangUp(conn)
	}
	return c, nil
}

// cutOff ends the session and resets all clients, also those who were sent everything
// by an app that then closed, and have not taken it: the session's end leaves these
// alone.
func (svc *service) cutOff() {
	svc.sess.Close()
	svc.mu.Lock()
	defer svc.mu.Unlock()
	svc.cut = true
	for c := range svc.clients {
		hangUp(c.conn)
	}
}

func (svc *service) enter() bool {
	svc.mu.Lock()
	defer svc.mu.Unlock()
	if svc.draining {
		svc.refused++
		return false
	}
	svc.active++
	return true
}

func (svc *service) leaveLocked() {
	svc.active--
	if svc.draining && svc.active == 0 {
		close(svc.idle)
	}
}

func (svc *service) forget(c *client) (in, out int64) {
	in, out = c.counts()
	svc.mu.Lock()
	defer svc.mu.Unlock()
	delete(svc.clients, c)
	svc.bytesIn += in
	svc.bytesOut += out
	svc.leaveLocked()
	return in, out
}

func (svc *service) info() ServiceInfo {
	svc.mu.Lock()
	defer svc.mu.Unlock()
	info := ServiceInfo{
		Name:     svc.name,
		Address:  svc.addr,
		Remote:   svc.sess.RemoteAddr().String(),
		Since:    svc.since,
		Draining: svc.draining,
		Clients:  make([]ClientInfo, 0, len(svc.clients)),
		Accepted: svc.accepted,
		Refused:  svc.refused,
		BytesIn:  svc.bytesIn,
		BytesOut: svc.bytesOut,
	}
	for c := range svc.clients {
		in, out := c.counts()
		info.BytesIn += in
		info.BytesOut += out
		info.Clients = append(info.Clients, ClientInfo{c.conn.RemoteAddr().String(), c.since, in, out})
	}
	slices.SortFunc(info.Clients, func(a, b ClientInfo) int { return a.Since.Compare(b.Since) })
	return info
}
