package relay_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
	"github.com/tcprelay/relay/internal/pulse"
	"github.com/tcprelay/relay/internal/wire"
)

// However a session is lost, the app is back at the same address after it, which nobody
// else could have meanwhile, and serves those who came.
func TestResume(t *testing.T) {
	ofSessions(t)
	const (
		lost = 14 * time.Second // 3 s after the last ping
		back = 50 * time.Second
	)
	for _, tt := range []struct {
		name         string
		lose         func(a *roamer)
		relay, app   time.Duration // when each notices
		relayErr     error
		appErr       error
		appFrom      string // the IP address of the second session
		whileAway    bool   // there was no way to dial the relay
		returnsEarly bool   // or else at back
	}{
		{
			name:  "reset",
			lose:  func(a *roamer) { a.place(""); a.transport().Cut() },
			relay: lost, app: lost,
			relayErr: syscall.ECONNRESET, appErr: syscall.ECONNRESET,
			appFrom: "10.1.0.1", whileAway: true,
		},
		{
			name: "freeze",
			lose: func(a *roamer) { a.place(""); a.transport().Freeze() },
			// Clients that come and wait do not have it taken for dead any sooner.
			relay: 41 * time.Second, app: 41 * time.Second,
			relayErr: pulse.ErrSilent, appErr: pulse.ErrSilent,
			appFrom: "10.1.0.1", whileAway: true,
		},
		{
			name:  "another address",
			lose:  func(a *roamer) { a.place("10.1.0.2"); a.transport().Freeze() },
			relay: 41 * time.Second, app: 41 * time.Second,
			relayErr: pulse.ErrSilent, appErr: pulse.ErrSilent,
			appFrom: "10.1.0.2", returnsEarly: true,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				r := startOn(t, n, relay.WithLimits(relay.Limits{WaitTime: 2 * time.Minute}))
				start := time.Now()
				a := roam(t, n, relay.WithName("web"))
				addr := a.Addr()
				unguard := guard(t, n, addr)
				sleepUntil(start, time.Second)
				c := client(t, n, addr)
				echoes(t, c) // so that the pings are at 11 s

				sleepUntil(start, lost)
				tt.lose(a)
				visits := make(chan error, 10)
				early := []time.Duration{16, 17, 20, 25, 30, 40}
				for _, at := range early {
					go func() {
						sleepUntil(start, at*time.Second)
						visits <- visit(n, addr)
					}()
				}
				expectReset(t, c)
				expectAt(t, "the client is reset", time.Now(), start, tt.relay)
				synctest.Wait()
				if s := r.service(t); len(s.Sessions) != 0 || s.Draining || s.Address != addr.String() {
					t.Errorf("the service is %+v", s)
				}
				if !tt.returnsEarly {
					sleepUntil(start, back)
					if s := r.service(t); s.Waiting != len(early) || s.Accepted != 1 {
						t.Errorf("the service is %+v", s)
					}
					a.place(tt.appFrom)
				}
				for range early {
					if err := <-visits; err != nil {
						t.Errorf("a client of the gap: %v", err)
					}
				}
				if err := visit(n, addr); err != nil {
					t.Errorf("a client after it: %v", err)
				}
				sleepUntil(start, back+time.Minute)
				unguard()
				a.expectAccepting(t)

				if got := a.Stats(); got.Reconnects != 1 || got.Accepted != int64(2+len(early)) || got.Refused != 0 || got.Live != 0 || !got.Connected {
					t.Errorf("the app's figures: %+v", got)
				}
				if a.Addr().String() != addr.String() {
					t.Errorf("it is at %v and was at %v", a.Addr(), addr)
				}
				want := []relay.EventKind{relay.EventRegistered, relay.EventLost, relay.EventResumed}
				events := r.expect(t, "web", addr.String(), want...)
				expectAt(t, "the relay's loss", events[1].Time, start, tt.relay)
				if !errors.Is(events[1].Err, tt.relayErr) {
					t.Errorf("the relay lost it by %v, want %v", events[1].Err, tt.relayErr)
				}
				if hostOf(events[2].Remote) != tt.appFrom {
					t.Errorf("it came back from %s", events[2].Remote)
				}
				if tt.whileAway {
					want = slices.Insert(want, 2, relay.EventRefused)
				}
				events = a.expect(t, "web", addr.String(), want...)
				expectAt(t, "the app's loss", events[1].Time, start, tt.app)
				if !errors.Is(events[1].Err, tt.appErr) {
					t.Errorf("the app lost it by %v, want %v", events[1].Err, tt.appErr)
				}
				if tt.whileAway && (code(events[2].Err) != relay.CodeUnreachable || !errors.Is(events[2].Err, syscall.ENETUNREACH)) {
					t.Errorf("it was refused by %v", events[2].Err)
				}
				if s := r.service(t); len(s.Sessions) != 1 || s.Waiting != 0 || s.Refused != 0 || len(s.Clients) != 0 {
					t.Errorf("the service is %+v", s)
				}
			})
		})
	}
}

// Over real sockets too the port is the app's throughout, and clients that come in the
// gap are served behind it.
func TestResumeOverTCP(t *testing.T) {
	ofSessions(t)
	check := nothingLeft(t)
	srv, err := relay.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	transports := make(chan net.Conn, 10)
	serveOn(t, srv, tappedListener{ln, transports})

	var events diary
	gate := make(chan struct{}, 1) // lets one dial through
	gate <- struct{}{}
	l := register(t, ln.Addr().String(), relay.WithEvents(events.note), relay.WithBackoff(time.Millisecond, 10*time.Millisecond),
		relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			select {
			case <-gate:
				return new(net.Dialer).DialContext(ctx, network, addr)
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}))
	ended := make(chan error, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				ended <- err
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	addr := l.Addr().String()

	done, guarded := make(chan struct{}), make(chan int, 1)
	stop := sync.OnceFunc(func() { close(done) })
	defer stop()
	go func() { // tries to get the port, without a pause
		tries := 0
		defer func() { guarded <- tries }()
		for {
			if ln, err := net.Listen("tcp", addr); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("listening on the public address, try %d: %v", tries, err)
				if err == nil {
					ln.Close()
				}
				return
			}
			tries++
			select {
			case <-done:
				return
			default:
			}
		}
	}()

	const rounds, perGap = 5, 4
	for i := range rounds {
		before := dial(t, l)
		echoes(t, before)
		hangUp := within(t, "the transport", transports)
		hangUp.(*net.TCPConn).SetLinger(0)
		hangUp.Close()
		expectReset(t, before)
		eventually(t, "the loss at both ends", func() bool {
			s := srv.Services()
			return len(s) == 1 && len(s[0].Sessions) == 0 && len(events.of(relay.EventLost)) == i+1
		})
		var gap []*net.TCPConn
		want := randomBytes(10_000)
		for range perGap {
			c := dial(t, l)
			if _, err := c.Write(want); err != nil {
				t.Fatal(err)
			}
			gap = append(gap, c)
		}
		eventually(t, "all clients wait", func() bool { return srv.Services()[0].Waiting == perGap })
		gate <- struct{}{}
		for _, c := range gap {
			got := make([]byte, len(want))
			if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("a client of gap %d: %v, or it got other bytes", i, err)
			}
			echoes(t, c)
			c.Close()
		}
		before.Close()
		eventually(t, "the app told", func() bool { return len(events.of(relay.EventResumed)) == i+1 })
	}
	stop()
	if tries := <-guarded; tries < 10 {
		t.Errorf("tried only %d times to get the port", tries)
	}
	if s := l.Stats(); s.Reconnects != rounds || s.Accepted != rounds*(1+perGap) || s.Refused != 0 {
		t.Errorf("the app's figures: %+v", s)
	}
	if s := srv.Services(); len(s) != 1 || s[0].Address != addr || s[0].Refused != 0 {
		t.Errorf("services %+v", s)
	}
	select {
	case err := <-ended:
		t.Errorf("Accept: %v", err)
	default:
	}
	l.Close()
	expectClosed(t, "Accept", within(t, "Accept's return", ended))
	within(t, "Done", l.Done())
	srv.Close()
	check()
}

// An app that crashed has lost its lease and not its identity: started anew, it has its
// name and port again, if the old one is not there any more.
func TestAppStartedAnew(t *testing.T) {
	for _, tt := range []struct {
		name    string
		opts    []relay.RegisterOption
		service string
		live    relay.Code // while the old one lives
		parked  relay.Code // and when it was lost, for nobody in particular
	}{
		{"by name", []relay.RegisterOption{relay.WithName("web")}, "web", relay.CodeNameTaken, relay.CodeNameTaken},
		{"by name and port", []relay.RegisterOption{relay.WithName("web"), relay.WithPort(8003)}, "web",
			relay.CodeNameTaken, relay.CodeNameTaken},
		{"by port", []relay.RegisterOption{relay.WithPort(8003)}, "10.0.0.1:8003", relay.CodePortUnavailable, relay.CodePortUnavailable},
		{"by shared name", []relay.RegisterOption{relay.WithName("web"), relay.WithShared()}, "web", "", ""},
	} {
		for _, identity := range []string{"token", ""} {
			t.Run(tt.name+"/"+identity, func(t *testing.T) {
				inMemory(t, func(t *testing.T, n *memnet.Network) {
					serverOpts := []relay.ServerOption{relay.WithPorts(8003, 8009), relay.WithLimits(relay.Limits{WaitTime: 30 * time.Second})}
					opts := tt.opts
					if identity != "" {
						serverOpts = append(serverOpts, relay.WithTokens(identity))
						opts = append(opts, relay.WithToken(identity))
					}
					r := startOn(t, n, serverOpts...)
					start := time.Now()
					old := roam(t, n, opts...)
					addr := old.Addr().String()
					again := newRoamer(n)
					register := func() (err error) {
						again.Listener, err = signUp(t.Context(), relayAddr, again.options(opts)...)
						return err
					}
					if tt.live != "" {
						if err := register(); code(err) != tt.live {
							t.Fatalf("while the old one lives: %v", err)
						}
					}
					sleepUntil(start, 5*time.Second)
					old.place("")
					old.transport().Cut()
					synctest.Wait()
					waiting := make(chan error, 1)
					go func() { waiting <- visit(n, old.Addr()) }()
					sleepUntil(start, 10*time.Second)
					err := register()
					if identity == "" && tt.parked != "" {
						if code(err) != tt.parked {
							t.Fatalf("when the old one was lost: %v", err)
						}
						old.place("10.1.0.1") // whose it is still
						if err := <-waiting; err != nil {
							t.Errorf("a client of the gap: %v", err)
						}
						old.expectAccepting(t)
						return
					}
					if err != nil {
						t.Fatal(err)
					}
					defer again.Close()
					go again.serve()
					if got := again.Addr().String(); got != addr {
						t.Fatalf("it is at %s and was at %s", got, addr)
					}
					if err := <-waiting; err != nil {
						t.Errorf("a client of the gap: %v", err)
					}
					s := r.service(t)
					if s.Name != tt.service || len(s.Sessions) != 1 || s.Accepted != 1 || s.Refused != 0 {
						t.Errorf("the service is %+v", s)
					}

					// If the old one was not dead it comes too late, unless they share.
					old.place("10.1.0.1")
					sleepUntil(start, 20*time.Second)
					if tt.live == "" {
						if s := r.service(t); len(s.Sessions) != 2 || !old.Stats().Connected {
							t.Errorf("the service is %+v", s)
						}
						return
					}
					old.expectAccepting(t)
					if refused := old.of(relay.EventRefused); code(refused[len(refused)-1].Err) != tt.live || old.Stats().Connected {
						t.Errorf("the old one was refused by %v", refused[len(refused)-1])
					}
					again.Close()
					sleepUntil(start, 30*time.Second) // until which it kept trying
					if s := r.service(t); !old.Stats().Connected || old.Addr().String() != addr || s.Address != addr {
						t.Errorf("when there was room: %+v, %+v", old.Stats(), s)
					}
				})
			})
		}
	}
}

// Who shows a lease has it, also from an app that lives.
func TestSupersede(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n)
		start := time.Now()
		a := roam(t, n, relay.WithName("web"))
		addr := a.Addr()
		c := client(t, n, addr)
		echoes(t, c)
		unguard := guard(t, n, addr)
		sleepUntil(start, 3*time.Second)

		newer := mustKnock(t, n, wire.Hello{Lease: a.transport().lease(t)})
		if newer.reply.Address != addr.String() {
			t.Errorf("the newer session is at %s", newer.reply.Address)
		}
		expectReset(t, c)
		a.expectRefused(t, relay.CodeSuperseded)
		expectAt(t, "all that", time.Now(), start, 3*time.Second)

		c = client(t, n, addr)
		st, err := newer.Accept()
		if err != nil {
			t.Fatal(err)
		}
		header := wire.AppendProxy(nil, c.LocalAddr(), addr)
		if _, err := io.ReadFull(st, make([]byte, len(header))); err != nil {
			t.Fatal(err)
		}
		sendAndExpect(t, c, st)
		c.Close()
		st.Close()
		sleepUntil(start, time.Minute) // the old one does not come back
		unguard()

		resumed, lost := r.one(t, relay.EventResumed), r.one(t, relay.EventLost)
		if got := len(r.sessions()); got != 3 {
			t.Errorf("%d events: %+v", got, r.sessions()) // of the old session's end none
		}
		expectAt(t, "the newer session", resumed.Time, start, 3*time.Second)
		if hostOf(resumed.Remote) != "10.1.0.9" {
			t.Errorf("the newer session: %+v", resumed)
		}
		expectAt(t, "the newer session's end, which says nothing", lost.Time, start, 33*time.Second)
		events := a.expect(t, "web", addr.String(), relay.EventRegistered, relay.EventLost, relay.EventEnded)
		for _, ev := range events[1:] {
			if code(ev.Err) != relay.CodeSuperseded {
				t.Errorf("the app's event %+v", ev)
			}
		}
		if n := len(a.dialled()); n != 1 {
			t.Errorf("it dialled %d times", n)
		}
	})
}

// A session that is dead and was not found to be holds nobody up: the app that comes
// back takes its place, and its clients are reset then.
func TestEvict(t *testing.T) {
	ofSessions(t)
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n, relay.WithHeartbeat(time.Minute, 3*time.Minute))
		start := time.Now()
		a := roam(t, n, relay.WithName("web"), relay.WithHeartbeat(time.Second, 3*time.Second),
			relay.WithBackoff(100*time.Millisecond, 100*time.Millisecond))
		addr := a.Addr()
		c := client(t, n, addr)
		echoes(t, c)
		sleepUntil(start, 10*time.Second)
		a.place("10.1.0.2")
		a.transport().Freeze()
		expectReset(t, c)
		synctest.Wait()
		dials := a.dialled()
		if len(dials) != 2 {
			t.Fatalf("dialled at %v", dials)
		}
		back := dials[1].Sub(start)
		if back < 13*time.Second || back > 13*time.Second+400*time.Millisecond {
			t.Errorf("back after %v", back)
		}
		expectAt(t, "the client's reset", time.Now(), start, back)
		if err := visit(n, addr); err != nil {
			t.Error(err)
		}
		sleepUntil(start, 2*time.Minute)
		a.expectAccepting(t)
		if s := r.service(t); len(s.Sessions) != 1 || s.Sessions[0].Draining || s.Refused != 0 {
			t.Errorf("the service is %+v", s)
		}
		expectAt(t, "resumed", r.one(t, relay.EventResumed).Time, start, back)
		if got := len(r.sessions()); got != 2 {
			t.Errorf("%d events: %+v", got, r.sessions())
		}
	})
}

// A lease ends when its time is over, and not before: then port and name are free, and
// those who waited are reset.
func TestLeaseExpires(t *testing.T) {
	for _, tt := range []struct {
		name  string
		lease time.Duration
		after time.Duration
	}{
		{"default", 0, time.Minute},
		{"given", 20 * time.Second, 20 * time.Second},
		{"an hour", time.Hour, time.Hour},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				r := startOn(t, n, relay.WithLease(tt.lease), relay.WithLimits(relay.Limits{WaitTime: 3 * time.Hour}))
				a := roam(t, n, relay.WithName("web"))
				addr := a.Addr()
				sleepUntil(time.Now(), 5*time.Second)
				start := time.Now()
				a.place("")
				a.transport().Cut()
				sleepUntil(start, time.Second)
				waiting := []*memnet.Conn{client(t, n, addr), client(t, n, addr)}
				reset := make(chan time.Time, len(waiting))
				for _, c := range waiting {
					c.SetDeadline(time.Time{})
					go func() {
						expectReset(t, c)
						reset <- time.Now()
					}()
				}
				web := viaRegister(n, "10.1.0.3", relay.WithName("web"), relay.WithPort(port(a)))

				sleepUntil(start, tt.after-1)
				if err := listens(n, addr); !errors.Is(err, syscall.EADDRINUSE) {
					t.Errorf("listening in the last moment: %v", err)
				}
				if addr, code := web(); code != wire.CodeNameTaken {
					t.Errorf("registering in the last moment: at %q, %q", addr, code)
				}
				if s := r.service(t); s.Waiting != 2 || s.Draining || s.Name != "web" {
					t.Errorf("in the last moment: %+v", s)
				}
				sleepUntil(start, tt.after)
				for range waiting {
					expectAt(t, "a waiting client's reset", <-reset, start, tt.after)
				}
				if err := listens(n, addr); err != nil {
					t.Errorf("listening afterwards: %v", err)
				}
				if len(r.Services()) != 0 {
					t.Errorf("afterwards: %+v", r.Services())
				}
				if got, code := web(); got != addr.String() {
					t.Errorf("registering afterwards: at %q, %q", got, code)
				}
				ended := r.of(relay.EventEnded)
				if len(ended) == 0 || ended[0].Err == nil || ended[0].Service != "web" || ended[0].Addr != addr.String() || ended[0].Remote != "" {
					t.Fatalf("ended: %+v", ended)
				}
				expectAt(t, "the end", ended[0].Time, start, tt.after)
				if got := len(r.of(relay.EventClientRefused)); got != 2 {
					t.Errorf("%d clients refused", got)
				}
				a.expectAccepting(t) // it does not know, and has its address in the end

				a.place("10.1.0.1")
				sleepUntil(start, tt.after+time.Minute)
				if s := r.service(t); !a.Stats().Connected || s.Address != addr.String() || s.Name != "web" {
					t.Errorf("in the end: %+v, %+v", a.Stats(), s)
				}
			})
		})
	}
}

// Without leases nothing is kept, for nobody.
func TestNoLease(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n, relay.WithLease(-1))
		start := time.Now()
		a := roam(t, n, relay.WithName("web"))
		addr := a.Addr()
		c := client(t, n, addr)
		echoes(t, c)
		sleepUntil(start, 3*time.Second)
		a.place("")
		a.transport().Cut()
		expectReset(t, c)
		synctest.Wait()
		if err := listens(n, addr); err != nil {
			t.Errorf("listening: %v", err)
		}
		if len(r.Services()) != 0 {
			t.Errorf("services %+v", r.Services())
		}
		events := r.expect(t, "web", addr.String(), relay.EventRegistered, relay.EventEnded)
		expectAt(t, "the end", events[1].Time, start, 3*time.Second)
		if !errors.Is(events[1].Err, syscall.ECONNRESET) {
			t.Errorf("ended by %v", events[1].Err)
		}
		// The app asks for what it had all the same.
		a.place("10.1.0.1")
		sleepUntil(start, 10*time.Second)
		a.expectAccepting(t)
		if s := r.service(t); a.Stats().Reconnects != 1 || s.Address != addr.String() || s.Name != "web" {
			t.Errorf("in the end: %+v, %+v", a.Stats(), s)
		}
		if err := visit(n, addr); err != nil {
			t.Error(err)
		}
		want := []relay.EventKind{relay.EventRegistered, relay.EventEnded, relay.EventRegistered}
		r.expect(t, "web", addr.String(), want...)
	})
}

// In the last moment is in time.
func TestBackInTheLastMoment(t *testing.T) {
	ofSessions(t)
	const lease = 20 * time.Second
	for _, tt := range []struct {
		late time.Duration
		want bool
	}{{-1, true}, {1, false}} {
		inMemory(t, func(t *testing.T, n *memnet.Network) {
			r := startOn(t, n, relay.WithLease(lease), relay.WithLimits(relay.Limits{WaitTime: time.Minute}))
			a := roam(t, n, relay.WithName("web"))
			addr := a.Addr()
			start := time.Now()
			a.slow(start.Add(lease + tt.late))
			a.transport().Cut()
			synctest.Wait()
			visited := make(chan error, 1)
			go func() { visited <- visit(n, addr) }()
			sleepUntil(start, lease+tt.late)
			if s := r.service(t); len(s.Sessions) != 1 || s.Address != addr.String() || !a.Stats().Connected {
				t.Errorf("the service is %+v", s)
			}
			if err := <-visited; (err == nil) != tt.want {
				t.Errorf("a client of the gap: %v", err)
			}
			// It goes on for good: the old expiry is not waiting for it.
			sleepUntil(start, 5*lease)
			a.expectAccepting(t)
			if err := visit(n, addr); err != nil {
				t.Error(err)
			}
			want := []relay.EventKind{relay.EventRegistered, relay.EventLost, relay.EventResumed}
			if !tt.want {
				want = []relay.EventKind{relay.EventRegistered, relay.EventLost, relay.EventEnded, relay.EventRegistered}
			}
			events := r.expect(t, "web", addr.String(), want...)
			expectAt(t, "back", events[len(events)-1].Time, start, lease+tt.late)

			// And a second loss has a lease's time of its own.
			again := time.Now()
			a.place("")
			a.transport().Cut()
			sleepUntil(again, lease-1)
			r.service(t)
			sleepUntil(again, lease)
			if len(r.Services()) != 0 {
				t.Errorf("services %+v", r.Services())
			}
		})
	}
}

// Without leases a dead session that was not found to be keeps its own app out, until it
// is found.
func TestNoLeaseNoEviction(t *testing.T) {
	for name, want := range map[string]relay.Code{"web": relay.CodeNameTaken, "": relay.CodePortUnavailable} {
		inMemory(t, func(t *testing.T, n *memnet.Network) {
			r := startOn(t, n, relay.WithLease(-1))
			start := time.Now()
			a := roam(t, n, relay.WithName(name), relay.WithHeartbeat(time.Second, 3*time.Second))
			addr := a.Addr()
			sleepUntil(start, 5*time.Second)
			a.place("10.1.0.2")
			a.transport().Freeze()
			heard := r.service(t).Sessions[0].LastHeard
			sleepUntil(heard, 30*time.Second-1)
			if refused := a.of(relay.EventRefused); len(refused) < 10 || code(refused[len(refused)-1].Err) != want {
				t.Errorf("refused: %+v", refused)
			}
			sleepUntil(heard, 32*time.Second)
			a.expectAccepting(t)
			if s := r.service(t); !a.Stats().Connected || a.Stats().Reconnects != 1 || s.Address != addr.String() {
				t.Errorf("in the end: %+v, %+v", a.Stats(), s)
			}
		})
	}
}

// A client that was sent everything, and takes its time to read it, has no need of the
// session: it does not hold the lease when that has ended.
func TestSlowClientHoldsNoLease(t *testing.T) {
	ofSessions(t)
	const lease = 20 * time.Second
	for name, then := range map[string]func(t *testing.T, n *memnet.Network, r *memRelay, addr net.Addr, lost time.Time){
		"the lease expires": func(t *testing.T, n *memnet.Network, r *memRelay, addr net.Addr, lost time.Time) {
			sleepUntil(lost, lease-1)
			if err := listens(n, addr); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("listening in the last moment: %v", err)
			}
			sleepUntil(lost, lease)
			if err := listens(n, addr); err != nil {
				t.Errorf("listening afterwards: %v", err)
			}
			expectAt(t, "the end", r.one(t, relay.EventEnded).Time, lost, lease)
			if s := r.service(t); !s.Draining || len(s.Clients) != 1 {
				t.Errorf("afterwards: %+v", s)
			}
			// The name is anybody's.
			web := viaRegister(n, "10.1.0.3", relay.WithName("web"), relay.WithToken("rival"))
			if _, code := web(); code != "" {
				t.Errorf("registering afterwards: %q", code)
			}
		},
		"its owner has come back without it": func(t *testing.T, n *memnet.Network, r *memRelay, addr net.Addr, lost time.Time) {
			again := roam(t, n, relay.WithName("web"), relay.WithToken("owner"))
			expectAt(t, "the return", time.Now(), lost, 0)
			if again.Addr().String() != addr.String() {
				t.Errorf("it is at %v and was at %v", again.Addr(), addr)
			}
			if err := visit(n, addr); err != nil {
				t.Errorf("a client after it: %v", err)
			}
			sleepUntil(lost, 2*lease) // what was left of the old lease has gone
			if err := visit(n, addr); err != nil {
				t.Errorf("a client long after it: %v", err)
			}
			synctest.Wait()
			if s := r.service(t); s.Draining || len(s.Sessions) != 2 || len(s.Clients) != 1 || s.Refused != 0 {
				t.Errorf("the service is %+v", s)
			}
			again.expectAccepting(t)
		},
	} {
		t.Run(name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				r := startOn(t, n, relay.WithTokens("owner"), relay.WithTokens("rival"), relay.WithLease(lease))
				old := newRoamer(n)
				old.Listener = register(t, relayAddr, old.options([]relay.RegisterOption{relay.WithName("web"), relay.WithToken("owner")})...)
				addr := old.Addr()
				slow, app := client(t, n, addr), accept(t, old)
				want := randomBytes(200_000) // more than its connection holds, and less than a window
				if _, err := app.Write(want); err != nil {
					t.Fatal(err)
				}
				app.Close()
				time.Sleep(time.Second)
				synctest.Wait()

				lost := time.Now()
				old.place("")
				old.transport().Cut()
				synctest.Wait()
				expectAt(t, "the loss", r.one(t, relay.EventLost).Time, lost, 0)
				then(t, n, r, addr, lost)
				if got, err := io.ReadAll(slow); err != nil || !bytes.Equal(got, want) {
					t.Errorf("the slow client reads %d bytes of %d, %v", len(got), len(want), err)
				}
				slow.Close()
				synctest.Wait()
				for _, s := range r.Services() {
					if len(s.Sessions) != 1 || len(s.Clients) != 0 {
						t.Errorf("in the end: %+v", s)
					}
				}
			})
		})
	}
}
