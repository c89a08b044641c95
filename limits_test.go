package relay_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
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

// Who is over a limit is refused at once and counted, and the log is not filled with
// it. It harms nobody else, and when there is room again, there is.
func TestLimits(t *testing.T) {
	ofSessions(t)
	// Two clients at two services of the limited identity.
	twoClients := func(s *stage) (a, b *stagedApp, c, d *memnet.Conn, release func()) {
		a, b = s.registerEcho("limited"), s.registerEcho("limited")
		c, d = s.client(a), s.client(b)
		s.mustServe(c, d)
		return a, b, c, d, func() {
			c.Close()
			d.Close()
			synctest.Wait()
		}
	}
	registered := func(s *stage, want, got relay.Code) bool {
		if got != "" && got != want {
			s.Errorf("refused with %q, want %q", got, want)
		}
		return got == ""
	}
	waiting := func(s *stage) attempts {
		a := s.registerEcho("limited")
		other := s.registerEcho("other")
		a.leave()
		c, d := s.client(a), s.client(a)
		synctest.Wait()
		for _, info := range s.srv.Services() {
			if info.Address == a.Addr().String() && (info.Waiting != 2 || len(info.Sessions) != 0) {
				s.Errorf("%d wait for %d sessions", info.Waiting, len(info.Sessions))
			}
		}
		return attempts{
			more:   func() bool { return s.served(s.client(a)) },
			others: func() { s.mustServe(s.client(other)) },
			release: func() {
				a.comeBack(s)
				s.mustServe(c, d)
			},
		}
	}

	// Two apps that share a name, one of them lost.
	apps := func(s *stage) attempts {
		web := []relay.RegisterOption{relay.WithName("web"), relay.WithShared()}
		a, b := s.registerEcho("limited", web...), s.registerEcho("limited", web...)
		b.leave()
		return attempts{
			more: func() bool { return registered(s, relay.CodeServerFull, s.registers("10.0.0.5", "limited", web...)) },
			others: func() {
				s.visit(a)
				if code := s.registers("10.0.0.5", "limited", relay.WithName("api"), relay.WithShared()); code != "" {
					s.Errorf("another name: %s", code)
				}
			},
			release: func() {
				s.end(a.Listener)
				b.comeBack(s)
			},
		}
	}

	for _, tt := range []struct {
		name          string
		kind          string
		server, grant relay.Limits
		hold          func(s *stage) attempts
		also          map[string]int64 // what is counted besides
	}{
		{"Pending", "pending", relay.Limits{Pending: 2}, relay.Limits{}, func(s *stage) attempts {
			a := s.registerEcho("a")
			c, d := s.dialFrom("10.1.0.1", s.addr), s.dialFrom("10.1.0.2", s.addr)
			synctest.Wait()
			return attempts{
				more:   func() bool { return registered(s, relay.CodeNotRelay, s.registers("10.1.0.3", "b")) },
				others: func() { s.mustServe(s.client(a)) },
				release: func() {
					c.Close()
					d.Close()
				},
			}
		}, map[string]int64{"broken": 2}},

		{"PendingPerIP", "pending_per_ip", relay.Limits{PendingPerIP: 2}, relay.Limits{}, func(s *stage) attempts {
			a := s.registerEcho("a")
			c, d := s.dialFrom("10.1.0.1", s.addr), s.dialFrom("10.1.0.1", s.addr)
			synctest.Wait()
			return attempts{
				more: func() bool { return registered(s, relay.CodeNotRelay, s.registers("10.1.0.1", "b")) },
				others: func() {
					s.mustServe(s.client(a), s.dialFrom("10.1.0.1", a.Addr().String()))
					if code := s.registers("10.1.0.2", "b"); code != "" {
						s.Errorf("another IP address: %s", code)
					}
				},
				release: func() {
					c.Close()
					d.Close()
				},
			}
		}, map[string]int64{"broken": 2}},

		{"Services", "server_full", relay.Limits{Services: 2}, relay.Limits{}, func(s *stage) attempts {
			a, b := s.registerEcho("a"), s.registerEcho("b")
			return attempts{
				more:    func() bool { return registered(s, relay.CodeServerFull, s.registers("10.0.0.5", "c")) },
				others:  func() { s.visit(a); s.visit(b) },
				release: func() { s.end(a.Listener) },
			}
		}, nil},

		{"Services of an identity", "server_full", relay.Limits{Services: 3}, relay.Limits{Services: 1}, func(s *stage) attempts {
			a := s.registerEcho("limited")
			return attempts{
				more: func() bool { return registered(s, relay.CodeServerFull, s.registers("10.0.0.5", "limited")) },
				others: func() {
					s.visit(a)
					if code := s.registers("10.0.0.5", "other"); code != "" {
						s.Errorf("another identity: %s", code)
					}
				},
				release: func() { s.end(a.Listener) },
			}
		}, nil},

		{"AppsPerService", "server_full", relay.Limits{AppsPerService: 2}, relay.Limits{}, apps, nil},
		{"AppsPerService of an identity", "server_full", relay.Limits{AppsPerService: 1}, relay.Limits{AppsPerService: 2}, apps, nil},

		{"Clients", "clients", relay.Limits{Clients: 2}, relay.Limits{}, func(s *stage) attempts {
			a, _, c, d, release := twoClients(s)
			return attempts{
				more:    func() bool { return s.served(s.dialFrom("10.0.0.8", a.Addr().String())) },
				others:  func() { s.mustServe(c, d) },
				release: release,
			}
		}, nil},

		{"Clients of an identity", "clients", relay.Limits{Clients: 4}, relay.Limits{Clients: 2}, func(s *stage) attempts {
			other := s.registerEcho("other")
			a, _, c, d, release := twoClients(s)
			return attempts{
				more: func() bool { return s.served(s.dialFrom("10.0.0.8", a.Addr().String())) },
				others: func() {
					e := s.client(other)
					s.mustServe(c, d, e)
					e.Close()
				},
				release: release,
			}
		}, nil},

		{"ClientsPerIP", "clients_per_ip", relay.Limits{ClientsPerIP: 2}, relay.Limits{}, func(s *stage) attempts {
			other := s.registerEcho("other")
			a, _, c, d, release := twoClients(s)
			return attempts{
				more:    func() bool { return s.served(s.client(other)) },
				others:  func() { s.mustServe(c, d, s.dialFrom("10.0.0.8", a.Addr().String())) },
				release: release,
			}
		}, nil},

		{"ClientsPerIP of an identity", "clients_per_ip", relay.Limits{}, relay.Limits{ClientsPerIP: 2}, func(s *stage) attempts {
			other := s.registerEcho("other")
			a, _, c, d, release := twoClients(s)
			return attempts{
				more:    func() bool { return s.served(s.client(a)) },
				others:  func() { s.mustServe(c, d, s.client(other), s.dialFrom("10.0.0.8", a.Addr().String())) },
				release: release,
			}
		}, nil},

		{"ClientsPerService", "clients_per_service", relay.Limits{ClientsPerService: 1}, relay.Limits{}, func(s *stage) attempts {
			other := s.registerEcho("other")
			a, _, c, d, release := twoClients(s)
			return attempts{
				more:    func() bool { return s.served(s.dialFrom("10.0.0.8", a.Addr().String())) },
				others:  func() { s.mustServe(c, d, s.client(other)) },
				release: release,
			}
		}, nil},

		// The grant's replaces the server's.
		{"ClientsPerService of an identity", "clients_per_service", relay.Limits{ClientsPerService: 1}, relay.Limits{ClientsPerService: 2}, func(s *stage) attempts {
			other := s.registerEcho("other")
			a, _, c, d, release := twoClients(s)
			s.mustServe(s.client(a))
			return attempts{
				more:    func() bool { return s.served(s.dialFrom("10.0.0.8", a.Addr().String())) },
				others:  func() { s.mustServe(c, d, s.client(other)) },
				release: release,
			}
		}, nil},

		{"Waiting", "waiting", relay.Limits{Waiting: 2}, relay.Limits{}, waiting, nil},
		{"Waiting of an identity", "waiting", relay.Limits{Waiting: 1}, relay.Limits{Waiting: 2}, waiting, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			onStage(t, func(t *testing.T, s *stage) {
				do := tt.hold(s)
				kept := func() (lines []entry) {
					for _, e := range s.log.with("") {
						if e.attrs["kind"] == tt.kind {
							lines = append(lines, e)
						}
					}
					return lines
				}
				refuse := func(n int) {
					for range n {
						if do.more() {
							t.Fatal("not refused")
						}
						synctest.Wait()
					}
				}
				refuse(3)
				if lines := kept(); len(lines) != 1 || lines[0].attrs["suppressed"] != nil {
					t.Errorf("logged at once: %+v", lines)
				}
				time.Sleep(time.Second - 1)
				refuse(1)
				time.Sleep(time.Nanosecond)
				refuse(1)
				if lines := kept(); len(lines) != 2 || lines[1].attrs["suppressed"] != int64(3) {
					t.Errorf("logged after a second: %+v", lines)
				}
				do.others()
				want := map[string]int64{tt.kind: 5}
				s.expectRefusals(want)
				clients := strings.HasPrefix(tt.kind, "clients") || tt.kind == "waiting"
				if clients {
					if got := s.ofServices(); !maps.Equal(got, want) {
						t.Errorf("services refused %v, want %v", got, want)
					}
					if n := len(s.events[relay.EventClientRefused]); n != 5 {
						t.Errorf("%d events of refused clients", n)
					}
				} else if n := len(s.events[relay.EventRefused]); n != 5 && tt.kind == "server_full" {
					t.Errorf("%d events of refused apps", n)
				}

				do.release()
				synctest.Wait()
				if !do.more() {
					t.Errorf("still refused: %v", s.srv.Refusals())
				}
				maps.Copy(want, tt.also)
				s.expectRefusals(want)
			}, relay.WithLimits(tt.server), identify(tt.grant))
		})
	}
}

// Who registers has HandshakeTime for it, wherever it hangs, and not a moment more.
func TestHandshakeTime(t *testing.T) {
	certs := relayTLS() // made outside of the bubbles
	hello := rawData(syn, controlID, `{"version":1}`+"\n")
	asking := relay.WithAuthorizer(func(ctx context.Context, _ relay.Registration) (relay.Grant, error) {
		<-ctx.Done()
		return relay.Grant{}, nil // of no use any more
	})
	listening := relay.WithListen(func(ctx context.Context, _, _ string) (net.Listener, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	for _, tt := range []struct {
		name string
		opts []relay.ServerOption
		in   []byte
	}{
		{"nothing", nil, nil},
		{"nothing to TLS", []relay.ServerOption{relay.WithTLSConfig(certs)}, nil},
		{"part of TLS", []relay.ServerOption{relay.WithTLSConfig(certs)}, clientHello(t)[:20]},
		{"part of a header", nil, hello[:5]},
		{"part of a hello", nil, rawData(syn, controlID, `{"ver`)},
		{"a slow authorizer", []relay.ServerOption{asking}, hello},
		{"a slow public listener", []relay.ServerOption{listening}, hello},
	} {
		for limit, want := range map[time.Duration]time.Duration{
			0:               10 * time.Second,
			3 * time.Second: 3 * time.Second,
			-1:              24 * time.Hour, // when the app gives up
		} {
			t.Run(fmt.Sprint(tt.name, " ", limit), func(t *testing.T) {
				onStage(t, func(t *testing.T, s *stage) {
					start := time.Now()
					c := s.dialFrom("10.0.0.5", s.addr)
					c.Write(tt.in)
					if limit < 0 {
						time.AfterFunc(want, func() { c.Close() })
					}
					io.Copy(io.Discard, c)
					if took := time.Since(start); took != want {
						t.Errorf("cut off after %v, want %v", took, want)
					}
					c.Close()
					synctest.Wait()
					if e := s.await(relay.EventRefused); e.Err == nil {
						t.Errorf("event %+v", e)
					}
					n := s.srv.Refusals()
					if limit >= 0 && !maps.Equal(n, map[string]int64{"handshake": 1}) || limit < 0 && n["handshake"] != 0 {
						t.Errorf("refused %v", n)
					}
				}, append(tt.opts, relay.WithLimits(relay.Limits{HandshakeTime: limit}))...)
			})
		}
	}
}

// Nobody who is asked about an app that has gone, or on behalf of a relay that has, is
// waited for.
func TestAuthorizerInVain(t *testing.T) {
	for name, leave := range map[string]func(s *stage, c *memnet.Conn){
		"the app":  func(_ *stage, c *memnet.Conn) { c.Close() },
		"Close":    func(s *stage, _ *memnet.Conn) { s.srv.Close() },
		"Shutdown": func(s *stage, _ *memnet.Conn) { s.srv.Shutdown(s.Context()) },
	} {
		t.Run(name, func(t *testing.T) {
			asked := make(chan context.Context, 1)
			onStage(t, func(t *testing.T, s *stage) {
				c := s.dialFrom("10.0.0.5", s.addr)
				c.Write(rawData(syn, controlID, `{"version":1}`+"\n"))
				ctx := <-asked
				start := time.Now()
				leave(s, c)
				<-ctx.Done()
				if took := time.Since(start); took != 0 {
					t.Errorf("it took %v", took)
				}
				if ctx.Err() != context.Canceled {
					t.Errorf("the context ended with %v", ctx.Err())
				}
				s.expectRefusals(map[string]int64{"broken": 1})
			}, relay.WithLimits(relay.Limits{HandshakeTime: -1}),
				relay.WithAuthorizer(func(ctx context.Context, _ relay.Registration) (relay.Grant, error) {
					asked <- ctx
					<-ctx.Done()
					return relay.Grant{}, ctx.Err()
				}))
		})
	}
}

func TestHelloSize(t *testing.T) {
	for _, tt := range []struct {
		limit int
		fits  bool
	}{{100, false}, {0, true}, {-1, true}, {1000, true}} {
		onStage(t, func(t *testing.T, s *stage) {
			if code := s.registers("10.0.0.5", ""); code != "" {
				t.Errorf("limit %d: a short hello: %s", tt.limit, code)
			}
			want, refused := relay.Code(""), map[string]int64{}
			if !tt.fits {
				want, refused = relay.CodeMalformed, map[string]int64{"malformed": 1}
			}
			if code := s.registers("10.0.0.5", strings.Repeat("t", 100)); code != want {
				t.Errorf("limit %d: a long hello: %q", tt.limit, code)
			}
			s.expectRefusals(refused)
		}, relay.WithLimits(relay.Limits{HelloSize: tt.limit}))
	}
	for _, n := range []int{16<<10 + 1, 1 << 30} {
		if _, err := relay.NewServer(relay.WithLimits(relay.Limits{HelloSize: n})); err == nil {
			t.Errorf("NewServer took a HelloSize of %d", n)
		}
	}
}

// The defaults of what is not registered yet: 16 of an IP address, 256 in all.
func TestPendingDefaults(t *testing.T) {
	ofSessions(t)
	onStage(t, func(t *testing.T, s *stage) {
		for i := range 256 {
			s.dialFrom(fmt.Sprintf("10.1.0.%d", i/16), s.addr)
		}
		s.expectRefusals(map[string]int64{})
		expectReset(t, s.dialFrom("10.1.1.1", s.addr))
		s.expectRefusals(map[string]int64{"pending": 1})
		time.Sleep(10*time.Second + goodbye)
		s.expectRefusals(map[string]int64{"pending": 1, "handshake": 256})
		for range 64 {
			s.dialFrom("10.1.1.1", s.addr)
		}
		synctest.Wait()
		expectReset(t, s.dialFrom("10.1.1.1", s.addr))
		s.expectRefusals(map[string]int64{"pending": 1, "handshake": 256, "pending_per_ip": 1})
	})
}

// The defaults of clients: 10,000 of a service, of which 1,000 may wait for 10 s while
// the app is away.
func TestClientDefaults(t *testing.T) {
	ofSessions(t)
	onStage(t, func(t *testing.T, s *stage) {
		a := s.registerEcho("a")
		last := make(chan *memnet.Conn, 1)
		for i := range 10_000 {
			c := s.dialFrom("10.0.0.7", a.Addr().String())
			if i%1000 == 999 {
				s.mustServe(c)
			}
			if i == 9999 {
				last <- c
			}
		}
		if s.served(s.client(a)) {
			t.Error("10,001 clients")
		}
		(<-last).Close()
		synctest.Wait()
		s.mustServe(s.client(a))
		s.expectRefusals(map[string]int64{"clients_per_service": 1})

		a.leave()
		start := time.Now()
		for range 1000 {
			s.client(a)
		}
		s.expectRefusals(map[string]int64{"clients_per_service": 1})
		if s.served(s.client(a)) {
			t.Error("1,001 clients wait")
		}
		s.expectRefusals(map[string]int64{"clients_per_service": 1, "waiting": 1})
		time.Sleep(10*time.Second - 1)
		s.expectRefusals(map[string]int64{"clients_per_service": 1, "waiting": 1})
		time.Sleep(time.Nanosecond)
		s.expectRefusals(map[string]int64{"clients_per_service": 1, "waiting": 1, "waited": 1000})
		if took := time.Since(start); took != 10*time.Second {
			t.Errorf("it took %v", took)
		}
	}, relay.WithLimits(relay.Limits{Clients: -1}))
}

// A client waits for an app that is away, for WaitTime and no longer.
func TestWaitTime(t *testing.T) {
	ofSessions(t)
	for _, tt := range []struct {
		name          string
		server, grant time.Duration
		want          time.Duration
	}{
		{"default", 0, 0, 10 * time.Second},
		{"server", 3 * time.Second, 0, 3 * time.Second},
		{"identity", 3 * time.Second, 7 * time.Second, 7 * time.Second},
		{"none", -1, 0, 0},
		{"none for an identity", 0, -1, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			onStage(t, func(t *testing.T, s *stage) {
				a := s.registerEcho("limited")
				for range 2 { // the second time too
					// One that is quiet is there.
					time.Sleep(3 * time.Second)
					s.mustServe(s.client(a))

					a.leave()
					start := time.Now()
					c := s.client(a)
					expectReset(t, c)
					if took := time.Since(start); took != tt.want {
						t.Errorf("reset after %v, want %v", took, tt.want)
					}
					if tt.want > 0 {
						d := s.client(a)
						time.Sleep(tt.want / 2)
						a.comeBack(t)
						s.mustServe(d)
					} else {
						a.comeBack(t)
					}
				}
				want := map[string]int64{"waited": 2}
				s.expectRefusals(want)
				if got := s.ofServices(); !maps.Equal(got, want) {
					t.Errorf("services refused %v", got)
				}
			}, relay.WithLimits(relay.Limits{WaitTime: tt.server}), identify(relay.Limits{WaitTime: tt.grant}))
		})
	}
}

// Clients who come to an app that is there, but was quiet, do not count as waiting
// while it is asked whether it is.
func TestWaitingForAnswer(t *testing.T) {
	ofSessions(t)
	onStage(t, func(t *testing.T, s *stage) {
		a := s.registerEcho("a")
		time.Sleep(5 * time.Second)
		a.transport.SetLatency(100 * time.Millisecond)
		var clients []*memnet.Conn
		for range 20 {
			clients = append(clients, s.client(a))
		}
		synctest.Wait()
		if n := s.srv.Services()[0].Waiting; n != 0 {
			t.Errorf("%d wait", n)
		}
		for _, c := range clients {
			echoes(t, c)
		}
		s.expectRefusals(map[string]int64{})
	}, relay.WithLimits(relay.Limits{Waiting: 1}))
}

// With no limit there is none.
func TestNoLimits(t *testing.T) {
	onStage(t, func(t *testing.T, s *stage) {
		for range 300 {
			s.dialFrom("10.1.0.1", s.addr)
		}
		var apps []*stagedApp
		var clients []net.Conn
		for range 5 {
			a := s.registerEcho("limited")
			for range 10 {
				c := s.client(a)
				s.mustServe(c)
				clients = append(clients, c)
			}
			clients[len(clients)-1].(*memnet.Conn).CloseWrite() // which ends it
			clients = clients[:len(clients)-1]
			apps = append(apps, a)
		}
		half, halfApp := s.pair(s.register("limited"))
		half.CloseWrite()
		stopped, stoppedApp := s.pair(s.register("limited"))
		go stoppedApp.Write(make([]byte, 1<<20))
		time.Sleep(2 * time.Hour)
		s.mustServe(clients...)
		halfApp.Write([]byte("x"))
		expectByte(t, half, 'x')
		if _, err := io.ReadFull(stopped, make([]byte, 1<<20)); err != nil {
			t.Errorf("a client that did nothing for hours: %v", err)
		}
		if n := len(apps); n != len(s.srv.Services())-2 {
			t.Errorf("%d services", n)
		}
		s.expectRefusals(map[string]int64{})
	}, relay.WithLimits(relay.Limits{
		HandshakeTime: -1, HelloSize: -1, Pending: -1, PendingPerIP: -1, Services: -1, AppsPerService: -1, Clients: -1, ClientsPerIP: -1,
		ClientsPerService: -1, Waiting: -1, BytesPerSecond: -1, ClientBytesPerSecond: -1, IdleTime: -1, StallTime: -1,
		LingerTime: -1, ClientUnread: -1, SessionUnread: -1,
	}), identify(relay.Limits{Services: -1, Clients: -1, ClientsPerIP: -1, IdleTime: -1, ClientsPerService: -1}))
}

// An end is what a memnet.Conn and a conn have in common.
type end interface {
	net.Conn
	CloseWrite() error
	SetLinger(int) error
}

// A counter counts what is read of a connection.
type counter struct{ n atomic.Int64 }

func count(r io.Reader) *counter {
	c := new(counter)
	go func() {
		b := make([]byte, 32<<10)
		for {
			n, err := r.Read(b)
			c.n.Add(int64(n))
			if err != nil {
				return
			}
		}
	}()
	return c
}

// Rates bound what moves, in each direction for itself: no more than the rate and a
// burst, and no less. The clients of a service share its rate evenly; others are not
// slowed.
func TestRates(t *testing.T) {
	const rate, burst, clients = 100_000, 100_000 / 4, 3
	for _, tt := range []struct {
		name          string
		server, grant relay.Limits
		shared        bool // by all clients
	}{
		{"service", relay.Limits{BytesPerSecond: rate}, relay.Limits{}, true},
		{"service of an identity", relay.Limits{BytesPerSecond: 2 * rate}, relay.Limits{BytesPerSecond: rate}, true},
		{"client", relay.Limits{ClientBytesPerSecond: rate}, relay.Limits{}, false},
		{"client of an identity", relay.Limits{ClientBytesPerSecond: 2 * rate}, relay.Limits{ClientBytesPerSecond: rate}, false},
		{"service more than client", relay.Limits{BytesPerSecond: rate, ClientBytesPerSecond: 2 * rate}, relay.Limits{}, true},
		{"client more than service", relay.Limits{BytesPerSecond: 4 * rate, ClientBytesPerSecond: rate}, relay.Limits{}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			onStage(t, func(t *testing.T, s *stage) {
				a, other := s.register("limited"), s.registerEcho("other")
				start := time.Now()
				var in, out [clients]*counter
				for i := range clients {
					client, app := s.pair(a)
					in[i], out[i] = count(app), count(client)
					go io.Copy(client, onlyReader{zeroes{}})
					go io.Copy(app, onlyReader{zeroes{}})
				}
				for _, seconds := range []int64{1, 10, 30} {
					time.Sleep(time.Until(start.Add(time.Duration(seconds) * time.Second)))
					synctest.Wait()
					least, most := rate*seconds, rate*seconds+burst
					for direction, counters := range map[string][clients]*counter{"in": in, "out": out} {
						var sum int64
						for _, c := range counters {
							n := c.n.Load()
							sum += n
							if !tt.shared && (n < least || n > most) || tt.shared && n < least/clients*3/4 {
								t.Errorf("after %d s a client has moved %d bytes %s", seconds, n, direction)
							}
						}
						if tt.shared && (sum < least || sum > most) {
							t.Errorf("after %d s all have moved %d bytes %s", seconds, sum, direction)
						}
					}
					before := time.Now()
					c := s.client(other)
					go c.Write(make([]byte, burst))
					if _, err := io.ReadFull(c, make([]byte, burst)); err != nil || time.Since(before) != 0 {
						t.Errorf("another service's client had to wait for %v, %v", time.Since(before), err)
					}
					c.Close()
				}
				s.expectRefusals(map[string]int64{})
			}, relay.WithLimits(tt.server), identify(tt.grant))
		})
	}
}

// A conn that is held back by a rate ends like any other.
func TestHeldBack(t *testing.T) {
	ofSessions(t)
	const rate, burst, size = 10_000, 4 << 10, 100_000
	const all = time.Second * (size - burst) / rate // how long it takes
	const early = 3 * time.Second
	// expect checks an end and when it came.
	expect := func(s *stage, what string, start time.Time, want time.Duration, n, wantN int64, err, wantErr error) {
		s.Helper()
		took := time.Since(start)
		if took != want || n != wantN && wantN >= 0 || !errors.Is(err, wantErr) {
			s.Errorf("%s ended after %v with %d bytes, %v; want %v, %d, %v", what, took, n, err, want, wantN, wantErr)
		}
	}
	for _, tt := range []struct {
		name string
		f    func(s *stage, client, app end)
	}{
		{"half-closes", func(s *stage, client, app end) {
			for _, d := range []struct{ from, to end }{{client, app}, {app, client}} {
				start := time.Now()
				go func() {
					d.from.Write(make([]byte, size))
					d.from.CloseWrite()
				}()
				n, err := io.Copy(io.Discard, d.to)
				expect(s, "a transfer", start, all, n, size, err, nil)
			}
		}},
		{"app closes", func(s *stage, client, app end) {
			start := time.Now()
			app.Write(make([]byte, size))
			app.Close()
			n, err := io.Copy(io.Discard, client)
			expect(s, "the client", start, all, n, size, err, nil)
		}},
		{"app resets", func(s *stage, client, app end) {
			start := time.Now()
			app.Write(make([]byte, size))
			time.AfterFunc(early, func() { app.SetLinger(0); app.Close() })
			n, err := io.Copy(io.Discard, client)
			expect(s, "the client", start, early, n, -1, err, syscall.ECONNRESET)
		}},
		{"client resets what it gets", func(s *stage, client, app end) {
			start := time.Now()
			go io.Copy(app, onlyReader{zeroes{}})
			time.AfterFunc(early, func() { client.SetLinger(0); client.Close() })
			n, err := io.Copy(io.Discard, app)
			expect(s, "the app", start, early, n, 0, err, syscall.ECONNRESET)
		}},
		{"client resets what it sends", func(s *stage, client, app end) {
			start := time.Now()
			client.Write(make([]byte, 50_000))
			client.SetLinger(0)
			client.Close()
			n, err := io.Copy(io.Discard, app)
			// The reset stands behind the bytes, as on any socket.
			expect(s, "the app", start, time.Second*(50_000-burst)/rate, n, 50_000, err, syscall.ECONNRESET)
		}},
		{"Close", func(s *stage, client, app end) {
			start := time.Now()
			wrote := make(chan error, 1)
			go func() {
				_, err := io.Copy(client, onlyReader{zeroes{}})
				wrote <- err
			}()
			go io.Copy(app, onlyReader{zeroes{}})
			time.AfterFunc(early, func() {
				s.srv.Close()
				expect(s, "Close", start, early, 0, 0, nil, nil)
			})
			n, err := io.Copy(io.Discard, client)
			if err == nil {
				err = <-wrote // a reset is told once
			}
			expect(s, "the client", start, early, n, -1, err, syscall.ECONNRESET)
			n, err = io.Copy(io.Discard, onlyReader{app})
			if err == nil {
				s.Errorf("the app reads %d bytes and a clean end", n)
			}
		}},
		{"Shutdown", func(s *stage, client, app end) {
			start := time.Now()
			app.Write(make([]byte, size))
			app.Close()
			done := make(chan error, 1)
			time.AfterFunc(early, func() {
				done <- s.srv.Shutdown(context.Background())
				expect(s, "Shutdown", start, all, 0, 0, nil, nil)
			})
			n, err := io.Copy(io.Discard, client)
			expect(s, "the client", start, all, n, size, err, nil)
			client.Close()
			if err := within(s, "Shutdown's return", done); err != nil {
				s.Errorf("Shutdown: %v", err)
			}
		}},
		{"Shutdown that is cut short", func(s *stage, client, app end) {
			start := time.Now()
			app.Write(make([]byte, size))
			app.Close()
			done := make(chan error, 1)
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), early)
				defer cancel()
				done <- s.srv.Shutdown(ctx)
				expect(s, "Shutdown", start, early, 0, 0, nil, nil)
			}()
			n, err := io.Copy(io.Discard, client)
			expect(s, "the client", start, early, n, -1, err, syscall.ECONNRESET)
			if err := within(s, "Shutdown's return", done); !errors.Is(err, context.DeadlineExceeded) {
				s.Errorf("Shutdown: %v", err)
			}
		}},
	} {
		for what, limits := range map[string]relay.Limits{
			"service": {BytesPerSecond: rate}, "client": {ClientBytesPerSecond: rate},
		} {
			t.Run(tt.name+" "+what, func(t *testing.T) {
				onStage(t, func(t *testing.T, s *stage) {
					client, app := s.pair(s.register("a"))
					tt.f(s, client, app)
					s.expectRefusals(map[string]int64{})
				}, relay.WithLimits(limits))
			})
		}
	}
}

// Who is held back by a rate is not cut off for it, however low that is.
func TestHeldBackIsNotStalled(t *testing.T) {
	for _, limits := range []relay.Limits{
		{ClientBytesPerSecond: 400, IdleTime: time.Minute},
		{BytesPerSecond: 4000, StallTime: 30 * time.Second},
	} {
		onStage(t, func(t *testing.T, s *stage) {
			a := s.register("a")
			var clients sync.WaitGroup
			for range 5 {
				client, app := s.pair(a)
				go func() {
					app.Write(make([]byte, 500_000))
					app.Close()
				}()
				clients.Go(func() {
					if n, err := io.Copy(io.Discard, client); n != 500_000 || err != nil {
						t.Errorf("%d bytes, %v: %v", n, err, s.srv.Refusals())
					}
				})
			}
			clients.Wait()
			s.expectRefusals(map[string]int64{})
		}, relay.WithLimits(limits))
	}
}

// A client is reset when its time is over, not before, and not while it need not be.
func TestCutOff(t *testing.T) {
	exchange := func(s *stage, from, to end) {
		s.Helper()
		from.Write([]byte("x"))
		expectByte(s, to, 'x')
	}
	for _, tt := range []struct {
		kind   string
		name   string
		limits func(time.Duration) relay.Limits
		usual  time.Duration // the default; 0: none
		begin  func(s *stage, client *memnet.Conn, app conn)
		keep   func(s *stage, client *memnet.Conn, app conn) // what makes the time begin anew
		whole  string                                        // who had all that the other had to say
	}{
		{"idle", "idle", func(d time.Duration) relay.Limits { return relay.Limits{IdleTime: d} }, 0,
			func(s *stage, client *memnet.Conn, app conn) { exchange(s, client, app) },
			func(s *stage, client *memnet.Conn, app conn) { exchange(s, app, client) },
			"",
		},
		{"stalled", "stalled", func(d time.Duration) relay.Limits { return relay.Limits{StallTime: d} }, 5 * time.Minute,
			func(s *stage, client *memnet.Conn, app conn) {
				client.SetBuffer(2000)
				go app.Write(make([]byte, 1<<20))
			},
			func(s *stage, client *memnet.Conn, app conn) {
				if _, err := io.ReadFull(client, make([]byte, 5000)); err != nil { // more than a piece of the gauge
					s.Fatalf("a client that takes a little: %v", err)
				}
			},
			"",
		},
		{"lingered", "the client has half-closed", func(d time.Duration) relay.Limits { return relay.Limits{LingerTime: d} }, 5 * time.Minute,
			func(s *stage, client *memnet.Conn, app conn) { client.CloseWrite() },
			func(s *stage, client *memnet.Conn, app conn) { exchange(s, app, client) },
			"",
		},
		{"lingered", "the app has half-closed", func(d time.Duration) relay.Limits { return relay.Limits{LingerTime: d} }, 5 * time.Minute,
			func(s *stage, client *memnet.Conn, app conn) { app.CloseWrite() },
			func(s *stage, client *memnet.Conn, app conn) { exchange(s, client, app) },
			"client",
		},
	} {
		for _, by := range []struct {
			name          string
			server, grant relay.Limits
			want          time.Duration
		}{
			{"server", tt.limits(time.Minute), relay.Limits{}, time.Minute},
			{"identity", tt.limits(time.Hour), tt.limits(time.Minute), time.Minute},
			{"identity, longer", tt.limits(time.Minute), tt.limits(20 * time.Minute), 20 * time.Minute},
			{"default", relay.Limits{}, relay.Limits{}, tt.usual},
			{"none for an identity", tt.limits(time.Minute), tt.limits(-1), 0},
		} {
			t.Run(tt.name+" "+by.name, func(t *testing.T) {
				onStage(t, func(t *testing.T, s *stage) {
					a := s.register("limited")
					kept := by.want
					if kept == 0 {
						kept = 10 * time.Minute
					}
					cut := int64(0)
					// Whenever it begins, and however long nothing was amiss before.
					for _, wait := range []time.Duration{0, 7300 * time.Millisecond, 29900 * time.Millisecond, 10 * time.Minute} {
						client, app := s.pair(a)
						sendAndExpect(s, client, app)
						if tt.kind != "idle" {
							time.Sleep(wait)
						}
						tt.begin(s, client, app)
						for range 10 {
							time.Sleep(kept / 5)
							tt.keep(s, client, app)
						}
						s.expectRefusals(s.ofServices())
						start := time.Now()
						if by.want == 0 {
							time.Sleep(time.Hour)
							if tt.kind == "stalled" {
								client.SetBuffer(0)
							}
							tt.keep(s, client, app)
							s.expectRefusals(map[string]int64{})
							client.Close()
							app.Close()
							continue
						}
						ev := s.await(relay.EventClientLeft)
						took := ev.Time.Sub(start)
						if most := by.want + min(by.want/4, 30*time.Second); took < by.want || took > most {
							t.Errorf("cut off after %v, want %v, or up to %v", took, by.want, most)
						}
						if ev.Err == nil {
							t.Error("the event tells of an end in order")
						}
						synctest.Wait()
						for who, from := range map[string]end{"client": client, "app": app} {
							_, rerr := io.Copy(io.Discard, onlyReader{from})
							_, werr := from.Write([]byte("x"))
							whole := who == tt.whole
							if overDedicated && tt.name == "the client has half-closed" {
								whole = whole || who == "app" // a TCP reset takes no end back that came before
							}
							if (rerr == nil) != whole || rerr != nil && !isReset(rerr) || !isReset(werr) {
								t.Errorf("the %s reads to %v and writes to %v", who, rerr, werr)
							}
						}
						client.Close()
						app.Close()
						cut++
						want := map[string]int64{tt.kind: cut}
						s.expectRefusals(want)
						if got := s.ofServices(); !maps.Equal(got, want) {
							t.Errorf("services counted %v, want %v", got, want)
						}
						if e := s.log.with("client cut off"); len(e) == 0 || e[len(e)-1].attrs["kind"] != tt.kind {
							t.Errorf("logged %+v", e)
						}
					}
				}, relay.WithLimits(by.server), identify(by.grant))
			})
		}
	}
}

// Over TCP, where the system takes much for a slow client at once and then nothing for
// long, one who takes a little now and then is not taken for one who takes nothing.
func TestSlowOverTCP(t *testing.T) {
	srv, addr := startRelay(t, relay.WithLimits(relay.Limits{StallTime: 3 * time.Second}))
	l := register(t, addr)
	pair := func() *net.TCPConn {
		client := dial(t, l)
		client.SetReadBuffer(16 << 10)
		client.SetDeadline(time.Time{})
		app := accept(t, l)
		app.SetDeadline(time.Time{})
		go io.Copy(app, onlyReader{zeroes{}})
		return client
	}
	slow := pair()
	// Until the window that it had at first has come down to its buffer.
	if _, err := io.CopyN(io.Discard, slow, 1<<20); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var taken int64
	// As long as it takes to cut off two others, one after the other.
	for n := range int64(2) {
		pair()
		for srv.Refusals()["stalled"] == n {
			<-tick.C
			m, err := slow.Read(make([]byte, 1<<10))
			if taken += int64(m); err != nil {
				t.Fatalf("the slow client after %d bytes: %v", taken, err)
			}
		}
	}
	there := slices.ContainsFunc(srv.Services()[0].Clients, func(c relay.ClientInfo) bool {
		return c.Remote == slow.LocalAddr().String()
	})
	if n := srv.Refusals()["stalled"]; n != 2 || !there {
		t.Errorf("%d were cut off; the slow one, after %d bytes, is there: %t", n, taken, there)
	}
}

// What a client may leave unread grows up to ClientUnread if it has kept up.
func TestClientUnread(t *testing.T) {
	ofSessions(t)
	const buffers = 64<<10 + 4<<10 // between relay and client
	for _, tt := range []struct{ limit, least, most int }{
		{1, 120 << 10, 256 << 10}, // window is given back by halves
		{1 << 20, 300 << 10, 1 << 20},
		{0, 2 << 20, 16 << 20},
		{-1, 2 << 20, 16 << 20},
	} {
		onStage(t, func(t *testing.T, s *stage) {
			a := s.register("a")
			a.transport.SetLatency(10 * time.Millisecond)
			a.transport.SetBuffer(64 << 20)
			client, app := s.pair(a)
			var most int
			for rounds := 0; rounds < 5 || most < tt.least && rounds < 50; rounds++ {
				const first = 40 << 20
				go app.Write(make([]byte, first))
				if _, err := io.ReadFull(client, make([]byte, first)); err != nil {
					t.Fatal(err)
				}
				app.SetWriteDeadline(time.Now().Add(time.Minute))
				n, err := app.Write(make([]byte, 32<<20))
				if most = max(most, n); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatal(err)
				}
				app.SetWriteDeadline(time.Time{})
				if _, err := io.ReadFull(client, make([]byte, n)); err != nil {
					t.Fatal(err)
				}
			}
			if most < tt.least || most > tt.most+buffers {
				t.Errorf("limit %d: the app writes up to %d bytes, want %d to %d", tt.limit, most, tt.least, tt.most)
			}
			s.expectRefusals(map[string]int64{})
		}, relay.WithLimits(relay.Limits{ClientUnread: tt.limit}))
	}
}

// Of clients that leave too much unread, all together, some are reset, and nobody else.
func TestSessionUnread(t *testing.T) {
	ofSessions(t)
	const stopped, window, limit = 16, 256 << 10, 1 << 20
	for _, tt := range []struct{ limit, least, most int64 }{
		{limit, stopped - 2*limit/window, stopped - limit/window/2},
		{0, 0, 0},
		{-1, 0, 0},
	} {
		onStage(t, func(t *testing.T, s *stage) {
			a, other := s.register("a"), s.registerEcho("other")
			busy, busyApp := s.pair(a)
			var clients []*memnet.Conn
			var held sync.WaitGroup
			for range stopped {
				client, app := s.pair(a)
				clients = append(clients, client)
				held.Go(func() { app.Write(make([]byte, 2*window)) })
				synctest.Wait()
				sendAndExpect(s, busy, busyApp)
			}
			s.visit(other)
			cut := s.srv.Refusals()["unread"]
			if cut < tt.least || cut > tt.most {
				t.Errorf("limit %d: %d clients were reset, want %d to %d", tt.limit, cut, tt.least, tt.most)
			}
			// The others get all that they were sent, but for some that are over the limit when
			// they do.
			whole := int64(0)
			for _, c := range clients {
				n, err := io.ReadFull(c, make([]byte, 2*window))
				if err == nil {
					whole++
				} else if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("a client reads %d bytes, %v", n, err)
				}
			}
			held.Wait()
			want := map[string]int64{}
			if whole < stopped {
				want["unread"] = stopped - whole
			}
			s.expectRefusals(want)
			if got := s.ofServices(); !maps.Equal(got, want) {
				t.Errorf("services counted %v, want %v", got, want)
			}
			if whole == 0 {
				t.Errorf("limit %d: nobody got all", tt.limit)
			}
		}, relay.WithLimits(relay.Limits{SessionUnread: int(tt.limit)}))
	}
}

const childEnv = "RELAY_TEST_CHILD"

// inChild reports whether this is the process that withFiles started.
func inChild() bool { return os.Getenv(childEnv) != "" }

// withFiles prepares to run the same test in a process that may have n files open.
func withFiles(t *testing.T, n int) *exec.Cmd {
	t.Helper()
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Skip("there is no shell to limit the files of a process: ", err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), shell, "-c", fmt.Sprintf(`ulimit -n %d && exec "$0" "$@"`, n),
		exe, "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), childEnv+"=1")
	return cmd
}

// By default there may be as many clients as 80 % of the files that the process may
// have open.
func TestClientsByFiles(t *testing.T) {
	ofSessions(t)
	if !inChild() {
		if out, err := withFiles(t, 100).CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS")) {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	onStage(t, func(t *testing.T, s *stage) {
		a := s.registerEcho("a")
		first := s.client(a)
		s.mustServe(first)
		for range 79 {
			s.mustServe(s.client(a))
		}
		if s.served(s.client(a)) {
			t.Error("81 clients of a process that may have 100 files")
		}
		s.expectRefusals(map[string]int64{"clients": 1})
		first.Close()
		synctest.Wait()
		s.mustServe(s.client(a))
	})
}

// A relay whose process has no file left goes on with those that are connected, and
// takes others again when there are: clients as well as apps.
func TestOutOfFiles(t *testing.T) {
	ofSessions(t)
	if inChild() {
		relayForOutOfFiles(t)
		return
	}
	cmd := withFiles(t, 64)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	type line struct{ Msg, Kind, Addr, Err string }
	lines := make(chan line, 10_000)
	output := new(strings.Builder) // to be read when lines is closed
	go func() {
		defer close(lines)
		for sc := bufio.NewScanner(stdout); sc.Scan(); {
			output.WriteString(sc.Text() + "\n")
			var l line
			if json.Unmarshal(sc.Bytes(), &l) == nil {
				lines <- l
			}
		}
	}()
	await := func(msg string) line {
		t.Helper()
		for {
			l := within(t, "a line of the relay's process", lines)
			if l == (line{}) {
				t.Fatalf("the relay's process has ended:\n%s", output)
			}
			if l.Msg == msg {
				return l
			}
		}
	}
	addr := await("listening").Addr
	l := register(t, addr)
	go serveEcho(l)
	old := dial(t, l)
	echoes(t, old)

	// More than it can take. Those it cannot are connected all the same.
	var clients []*net.TCPConn
	for range 100 {
		clients = append(clients, dial(t, l))
	}
	if e := await("accept failed"); e.Kind != "accept" || e.Addr == "" || e.Err == "" {
		t.Errorf("logged %+v", e)
	}
	client := make(chan error, 1)
	go func() {
		c, err := net.Dial("tcp", l.Addr().String())
		if err == nil {
			defer c.Close()
			_, err = c.Write([]byte("x"))
		}
		if err == nil {
			_, err = c.Read(make([]byte, 1))
		}
		client <- err
	}()
	registered := make(chan error, 1)
	go func() {
		l, err := signUp(context.Background(), addr, relay.WithWait(), relay.WithBackoff(0, time.Second))
		if err == nil {
			l.Close()
			<-l.Done()
		}
		registered <- err
	}()
	for range 2 { // for as long as this takes
		await("accept failed")
		echoes(t, old)
	}
	select {
	case err := <-client:
		t.Errorf("a client was served without a file: %v", err)
	case err := <-registered:
		t.Errorf("an app was registered without a file: %v", err)
	default:
	}

	for _, c := range clients {
		c.Close()
	}
	if err := within(t, "a client's service", client); err != nil {
		t.Errorf("a client: %v", err)
	}
	if err := within(t, "a registration", registered); err != nil {
		t.Errorf("an app: %v", err)
	}
	echoes(t, old)
	echoes(t, dial(t, l))
	l.Close()
	stdin.Close()
	for range lines { // until it has ended
	}
	if err := cmd.Wait(); err != nil || !strings.Contains(output.String(), "--- PASS") {
		t.Errorf("the relay's process: %v\n%s", err, output)
	}
}

// relayForOutOfFiles is the relay of TestOutOfFiles, until nothing comes from stdin
// any more.
func relayForOutOfFiles(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close() // now the runtime has the files that it needs for that
	check := nothingLeft(t)
	srv, err := relay.NewServer(relay.WithLimits(relay.Limits{Clients: -1}),
		relay.WithLogger(slog.New(slog.NewJSONHandler(os.Stdout, nil))))
	if err != nil {
		t.Fatal(err)
	}
	serve(t, srv, "127.0.0.1:0")
	io.Copy(io.Discard, os.Stdin)
	refused := srv.Refusals()
	delete(refused, "server_full") // the app may have been taken before there was a file for its listener
	if refused["accept"] < 3 || len(refused) != 1 {
		t.Errorf("refused %v", refused)
	}
	srv.Close()
	check()
}

// Clients that wait for their rate, however long, are not taken for stalled or idle.
func TestRateIsNotStalling(t *testing.T) {
	onStage(t, func(t *testing.T, s *stage) {
		const clients, size = 300, 200 << 10
		a := s.register("a")
		go func() {
			for {
				c, err := a.Accept()
				if err != nil {
					return
				}
				go func() {
					c.Write(make([]byte, size))
					c.Close()
				}()
			}
		}()
		result := make(chan error, clients)
		for range clients {
			c := s.client(a)
			go func() {
				n, err := io.Copy(io.Discard, c)
				if err == nil && n != size {
					err = fmt.Errorf("%d bytes", n)
				}
				result <- err
			}()
		}
		for range clients {
			if err := <-result; err != nil {
				t.Errorf("a client: %v", err)
			}
		}
		s.expectRefusals(map[string]int64{})
	}, relay.WithLimits(relay.Limits{BytesPerSecond: 1 << 20, StallTime: 5 * time.Second, IdleTime: 5 * time.Second}))
}
