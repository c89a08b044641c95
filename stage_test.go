package relay_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

// goodbye is more than a session takes to end whose peer does not hang up.
const goodbye = time.Second

// A stage is a relay on a network in memory, where the clock is a fake one: waiting
// costs nothing, and takes exactly as long as it takes.
type stage struct {
	*testing.T
	net    *memnet.Network
	srv    *relay.Server
	addr   string
	log    logbook
	events map[relay.EventKind]chan relay.Event
}

// onStage runs f with a relay that has the given options. Afterwards, when all is
// closed, nothing may be left of the network.
func onStage(t *testing.T, f func(t *testing.T, s *stage), opts ...relay.ServerOption) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &stage{T: t, net: memnet.New(), events: make(map[relay.EventKind]chan relay.Event)}
		for _, kind := range []relay.EventKind{relay.EventRegistered, relay.EventLost, relay.EventResumed, relay.EventRefused,
			relay.EventDraining, relay.EventEnded, relay.EventClient, relay.EventClientLeft, relay.EventClientRefused} {
			s.events[kind] = make(chan relay.Event, 20_000)
		}
		t.Cleanup(func() {
			synctest.Wait()
			if conns, lns := s.net.Conns(), s.net.Listeners(); len(conns) > 0 || lns > 0 {
				t.Errorf("%d connections and %d listeners are left", len(conns), lns)
			}
		})
		srv, err := relay.NewServer(append([]relay.ServerOption{
			relay.WithListen(s.net.Listen), relay.WithLogger(s.log.logger()),
			relay.WithEvents(func(ev relay.Event) { s.events[ev.Kind] <- ev }),
		}, opts...)...)
		if err != nil {
			t.Fatal(err)
		}
		ln, err := s.net.Listen(t.Context(), "tcp", "10.0.0.1:7000")
		if err != nil {
			t.Fatal(err)
		}
		s.srv, s.addr = srv, ln.Addr().String()
		serveOn(t, srv, ln)
		f(t, s)
	})
}

// await returns the next event of a kind, however long that takes.
func (s *stage) await(kind relay.EventKind) relay.Event {
	s.Helper()
	select {
	case ev := <-s.events[kind]:
		return ev
	case <-time.After(48 * time.Hour):
		s.Fatalf("no event %q; the log: %+v", kind, s.log.with(""))
		panic("not reached")
	}
}

// dialFrom connects from an IP address.
func (s *stage) dialFrom(ip, addr string) *memnet.Conn {
	s.Helper()
	c, err := s.net.DialFrom(ip)(s.Context(), "tcp", addr)
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { c.Close() })
	return c.(*memnet.Conn)
}

// client connects a client to a public address.
func (s *stage) client(l net.Listener) *memnet.Conn {
	s.Helper()
	return s.dialFrom("10.0.0.7", l.Addr().String())
}

// pair connects a client and has the app accept it.
func (s *stage) pair(l net.Listener) (*memnet.Conn, conn) {
	s.Helper()
	c := s.client(l)
	a := accept(s, l)
	a.SetDeadline(time.Time{})
	return c, a
}

// A stagedApp can be taken off the network.
type stagedApp struct {
	*relay.Listener
	away      atomic.Bool
	mu        sync.Mutex
	transport *memnet.Conn // of its last session
}

// register registers with a token, which is an identity where that matters.
func (s *stage) register(token string, opts ...relay.RegisterOption) *stagedApp {
	s.Helper()
	a := new(stagedApp)
	a.Listener = register(s, s.addr, append([]relay.RegisterOption{
		relay.WithToken(token),
		relay.WithBackoff(time.Millisecond, 10*time.Millisecond),
		relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			if a.away.Load() {
				return nil, errors.New("the app is away")
			}
			c, err := s.net.DialFrom("10.0.0.5")(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return &stagedConn{Conn: c.(*memnet.Conn), app: a}, nil
		}),
	}, opts...)...)
	return a
}

// A stagedConn shows by what it begins with whether it is a session's.
type stagedConn struct {
	*memnet.Conn
	app  *stagedApp
	said bool
}

func (c *stagedConn) Write(b []byte) (int, error) {
	if !c.said {
		c.said = true
		if !bytes.HasPrefix(b, []byte(preface)) {
			c.app.mu.Lock()
			c.app.transport = c.Conn
			c.app.mu.Unlock()
		}
	}
	return c.Conn.Write(b)
}

func (s *stage) registerEcho(token string, opts ...relay.RegisterOption) *stagedApp {
	s.Helper()
	a := s.register(token, opts...)
	go serveEcho(a)
	return a
}

// registers tries to register from an IP address, and returns the code of the refusal,
// which has to come at once, or else "".
func (s *stage) registers(ip, token string, opts ...relay.RegisterOption) relay.Code {
	s.Helper()
	start := time.Now()
	l, err := signUp(s.Context(), s.addr,
		append([]relay.RegisterOption{relay.WithToken(token), relay.WithDialer(s.net.DialFrom(ip))}, opts...)...)
	if took := time.Since(start); took != 0 {
		s.Errorf("Register took %v", took)
	}
	if err != nil {
		expectRegisterError(s, err, s.addr, code(err))
		return code(err)
	}
	s.end(l)
	return ""
}

// end closes a listener and waits until the relay has forgotten it.
func (s *stage) end(l *relay.Listener) {
	s.Helper()
	l.Close()
	within(s, "the end of a listener", l.Done())
	synctest.Wait()
}

// leave cuts the app off the network.
func (a *stagedApp) leave() {
	a.away.Store(true)
	a.transport.Cut()
	synctest.Wait()
}

// comeBack returns when the app has a session again.
func (a *stagedApp) comeBack(t testing.TB) {
	t.Helper()
	a.away.Store(false)
	eventually(t, "the app back", func() bool { return a.Stats().Connected })
}

// served reports whether a client is served, by an app that echoes. One who is not has
// to be reset at once.
func (s *stage) served(c net.Conn) bool {
	s.Helper()
	start := time.Now()
	synctest.Wait()
	b := []byte("x")
	_, err := c.Write(b)
	if err == nil {
		_, err = io.ReadFull(c, b)
	}
	took := time.Since(start)
	if took != 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
		s.Fatalf("neither served nor refused at once: %v after %v", err, took)
	}
	return err == nil
}

func (s *stage) mustServe(cs ...net.Conn) {
	s.Helper()
	for _, c := range cs {
		if !s.served(c) {
			s.Errorf("%v was refused at %v: %v", c.LocalAddr(), c.RemoteAddr(), s.srv.Refusals())
		}
	}
}

// visit has a client come, be served, and go.
func (s *stage) visit(l net.Listener) {
	s.Helper()
	c := s.client(l)
	s.mustServe(c)
	c.Close()
	synctest.Wait()
}

// expectRefusals checks what the relay has counted in all, and of services.
func (s *stage) expectRefusals(want map[string]int64) {
	s.Helper()
	synctest.Wait()
	got := s.srv.Refusals()
	if overDedicated && want["broken"] == 0 {
		delete(got, "broken") // connections that an app was opening when it closed
	}
	if !maps.Equal(got, want) {
		s.Errorf("refused %v, want %v", got, want)
	}
}

// ofServices sums up what the services have counted.
func (s *stage) ofServices() map[string]int64 {
	all := make(map[string]int64)
	for _, info := range s.srv.Services() {
		for kind, n := range info.Refusals {
			all[kind] += n
		}
	}
	return all
}

// identify grants everybody his token as the identity, and one named "limited" limits.
func identify(limits relay.Limits) relay.ServerOption {
	return relay.WithAuthorizer(func(_ context.Context, r relay.Registration) (relay.Grant, error) {
		g := relay.Grant{Identity: r.Token}
		if r.Token == "limited" {
			g.Limits = limits
		}
		return g, nil
	})
}

// attempts are what a case of TestLimits does when somebody holds all that there is.
type attempts struct {
	more    func() bool // reports whether one more gets in
	others  func()      // those whom the limit does not concern
	release func()      // gives it all back
}
