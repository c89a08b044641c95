package relay_test

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

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
