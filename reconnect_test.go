package relay_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
	"github.com/tcprelay/relay/internal/mux"
	"github.com/tcprelay/relay/internal/wire"
)

// hangsUp is a relay that gives everybody the port asked for and hangs up at once.
func hangsUp(t testing.TB, n *memnet.Network) (stop func()) {
	t.Helper()
	ln, err := n.Listen(t.Context(), "tcp", relayAddr)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			sess := mux.Server(c, mux.Config{})
			if control, err := sess.Accept(); err == nil {
				var hello wire.Hello
				wire.NewReader(control).Read(&hello)
				fmt.Fprintf(control, `{"version":1,"address":"10.0.0.1:%d"}`+"\n", hello.Port)
			}
			sess.Close()
		}
	}()
	return func() { ln.Close(); <-done }
}

// A relay that is not there is tried again after random times, of which the longest
// doubles; and so is one that is there and hangs up.
func TestBackoff(t *testing.T) {
	ofSessions(t)
	const apps = 50 // of which one waits for more than half of each bound
	for _, tt := range []struct {
		name     string
		opt      relay.RegisterOption
		min, max time.Duration
	}{
		{"default", relay.WithBackoff(0, 0), 250 * time.Millisecond, 15 * time.Second},
		{"given", relay.WithBackoff(time.Second, 10*time.Second), time.Second, 10 * time.Second},
		{"constant", relay.WithBackoff(time.Second, time.Second), time.Second, time.Second},
		{"a long one", relay.WithBackoff(time.Minute, 0), time.Minute, time.Minute},
	} {
		for _, answers := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/answers=%t", tt.name, answers), func(t *testing.T) {
				inMemory(t, func(t *testing.T, n *memnet.Network) {
					r := startOn(t, n)
					var all []*roamer
					for range apps {
						all = append(all, roam(t, n, tt.opt, relay.WithLogger(nil)))
					}
					sleepUntil(time.Now(), tt.max+1)
					r.Close()
					lost := time.Now()
					stop := func() {}
					if answers {
						stop = hangsUp(t, n)
					}
					sleepUntil(lost, 8*tt.max)
					expectGaps := func(when string, lost time.Time, from func(*roamer) []time.Time) {
						t.Helper()
						bound := tt.min
						for i := 0; ; i++ {
							longest := time.Duration(0)
							for _, a := range all {
								times := append([]time.Time{lost}, from(a)...)
								if i+1 >= len(times) {
									if i < 6 {
										t.Errorf("%s: only %d times", when, i)
									}
									return
								}
								gap := times[i+1].Sub(times[i])
								if gap < tt.min/10 || gap > bound {
									t.Errorf("%s: wait %d took %v, which is not from %v to %v", when, i+1, gap, tt.min/10, bound)
								}
								longest = max(longest, gap)
							}
							if longest < bound/2 {
								t.Errorf("%s: wait %d took %v at most, and may take %v", when, i+1, longest, bound)
							}
							bound = min(2*bound, tt.max)
						}
					}
					expectGaps("the first time", lost, func(a *roamer) []time.Time { return a.dialled()[1:] })

					// When it was back for long it starts anew.
					stop()
					back := time.Now()
					r = startOn(t, n, relay.WithPublicHost("10.0.0.2")) // where no port is taken
					sleepUntil(back, 3*tt.max)
					had := make(map[*roamer]int)
					for _, a := range all {
						had[a] = len(a.dialled())
						a.expectAccepting(t)
						if !a.Stats().Connected {
							t.Fatal("it is not back")
						}
					}
					r.Close()
					lost = time.Now()
					sleepUntil(lost, 8*tt.max)
					expectGaps("the second time", lost, func(a *roamer) []time.Time { return a.dialled()[had[a]:] })
				})
			})
		}
	}
}

// A backoff that makes no sense is an error.
func TestWithBackoff(t *testing.T) {
	never := relay.WithDialer(func(context.Context, string, string) (net.Conn, error) { return nil, errAway })
	for _, tt := range []struct {
		min, max time.Duration
		ok       bool
	}{
		{0, 0, true},
		{time.Second, 0, true},
		{time.Hour, 0, true},
		{0, time.Hour, true},
		{1, 1, true},
		{time.Second, time.Second - 1, false},
		{0, 100 * time.Millisecond, false}, // less than the default
		{-1, 0, false},
		{0, -1, false},
		{-2, -1, false},
	} {
		_, err := signUp(t.Context(), relayAddr, never, relay.WithBackoff(tt.min, tt.max))
		if _, tried := errors.AsType[*relay.RegisterError](err); tried != tt.ok {
			t.Errorf("WithBackoff(%v, %v): %v", tt.min, tt.max, err)
		}
	}
}

// Whatever a listener is at when it is closed, it ends soon.
func TestCloseWhileAway(t *testing.T) {
	for _, tt := range []struct {
		name  string
		opts  []relay.RegisterOption
		lose  func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer)
		after time.Duration // Done
	}{
		{
			name: "between two tries",
			opts: []relay.RegisterOption{relay.WithBackoff(time.Hour, time.Hour)},
			lose: func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer) { a.transport().Cut() },
		},
		{
			name: "a dialer that ends with its context",
			lose: func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer) { a.place("nowhere"); a.transport().Cut() },
		},
		{
			name: "a dialer that takes its time",
			lose: func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer) {
				a.slow(time.Now().Add(8 * time.Second))
				a.transport().Cut()
			},
			after: 3 * time.Second,
		},
		{
			name: "a relay that does not answer",
			lose: func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer) {
				n.OnConn(func(dialed, accepted *memnet.Conn) { dialed.Freeze() })
				a.transport().Cut()
			},
			after: 250 * time.Millisecond, // the moment for its goodbye
		},
		{
			name:  "a session that is dead",
			lose:  func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer) { a.transport().Freeze() },
			after: 30*time.Second - 5*time.Second + 250*time.Millisecond,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				r := startOn(t, n)
				a := newRoamer(n)
				dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
					a.mu.Lock()
					hang := a.ip == "nowhere"
					a.mu.Unlock()
					if hang {
						<-ctx.Done()
						return nil, ctx.Err()
					}
					return a.dial(ctx, network, addr)
				}
				a.Listener = register(t, relayAddr, append(a.options(tt.opts), relay.WithDialer(dial))...)
				go a.serve()
				lost := time.Now()
				tt.lose(t, n, r, a)
				sleepUntil(lost, 5*time.Second)
				a.expectAccepting(t)
				closed := time.Now()
				if err := a.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
				expectClosed(t, "Accept", <-a.over)
				expectAt(t, "Accept's return", time.Now(), closed, 0)
				<-a.Done()
				expectAt(t, "Done", time.Now(), closed, tt.after)
				if s := a.Stats(); s.Connected {
					t.Errorf("when it is closed: %+v", s)
				}
				n.OnConn(nil)
				sleepUntil(closed, 2*time.Minute)
				if s := r.Services(); len(s) != 0 { // the lease has run out
					t.Errorf("services %+v", s)
				}
				if err := listens(n, a.Addr()); err != nil {
					t.Errorf("listening: %v", err)
				}
			})
		})
	}
}

// A relay that was started anew knows nothing, and gives an app the port that it asks
// for: the one it had.
func TestRestart(t *testing.T) {
	for _, tt := range []struct {
		name string
		opts []relay.RegisterOption
		// What somebody else has of it when the app is back, and what the app is told.
		other []relay.RegisterOption
		code  relay.Code
	}{
		{name: "port", opts: nil},
		{name: "name", opts: []relay.RegisterOption{relay.WithName("web")}},
		{name: "name and port", opts: []relay.RegisterOption{relay.WithName("web"), relay.WithPort(8005)}},
		{name: "shared name", opts: []relay.RegisterOption{relay.WithName("web"), relay.WithShared()}},
		{name: "its port is taken", other: []relay.RegisterOption{relay.WithPort(8001)}, code: relay.CodePortUnavailable},
		{
			name: "the port of its name is taken", opts: []relay.RegisterOption{relay.WithName("web")},
			other: []relay.RegisterOption{relay.WithPort(8001), relay.WithName("other")}, code: relay.CodePortUnavailable,
		},
		{
			name: "its name is taken", opts: []relay.RegisterOption{relay.WithName("web")},
			other: []relay.RegisterOption{relay.WithName("web"), relay.WithPort(8009)}, code: relay.CodeNameTaken,
		},
		{
			name: "the relay is full", opts: []relay.RegisterOption{relay.WithPort(8001)},
			other: []relay.RegisterOption{relay.WithPort(8002)}, code: relay.CodeServerFull,
		},
	} {
		for _, how := range []string{"Close", "Shutdown"} {
			t.Run(tt.name+"/"+how, func(t *testing.T) {
				inMemory(t, func(t *testing.T, n *memnet.Network) {
					opts := []relay.ServerOption{relay.WithPorts(8001, 8010)}
					if tt.code == relay.CodeServerFull {
						opts = append(opts, relay.WithLimits(relay.Limits{Services: 1}))
					}
					r := startOn(t, n, opts...)
					start := time.Now()
					a := roam(t, n, tt.opts...)
					addr := a.Addr()
					c := client(t, n, addr)
					echoes(t, c)
					if how == "Shutdown" {
						c.Close()
						synctest.Wait()
						if err := r.Shutdown(t.Context()); err != nil {
							t.Fatal(err)
						}
					} else {
						r.Close()
						expectReset(t, c)
					}
					sleepUntil(start, 5*time.Second)
					if err := listens(n, addr); err != nil {
						t.Errorf("without a relay: %v", err)
					}
					var other *roamer
					r = startOn(t, n, opts...)
					if tt.other != nil {
						other = roam(t, n, tt.other...)
					}
					back := time.Now()
					sleepUntil(back, 10*time.Second)
					a.expectAccepting(t)
					if tt.other != nil {
						if a.Stats().Connected {
							t.Fatal("it is back")
						}
						refused := a.of(relay.EventRefused)
						if last := refused[len(refused)-1]; code(last.Err) != tt.code || time.Since(last.Time) > time.Second {
							t.Errorf("refused: %+v", last)
						}
						last := r.of(relay.EventRefused)[0]
						if hostOf(last.Remote) != "10.1.0.1" || last.Err == nil {
							t.Errorf("the relay refused: %+v", last)
						}
						other.Close()
						sleepUntil(back, 12*time.Second)
					}
					if s := r.service(t); s.Address != addr.String() || a.Addr().String() != addr.String() || !a.Stats().Connected {
						t.Errorf("it is at %v: %+v", a.Addr(), s)
					}
					if err := visit(n, addr); err != nil {
						t.Error(err)
					}
					a.expectAccepting(t)
					want := []relay.EventKind{relay.EventRegistered, relay.EventLost, relay.EventRefused, relay.EventResumed}
					if how == "Shutdown" {
						want[1] = relay.EventDraining
					}
					name := addr.String()
					if tt.name != "port" && tt.name != "its port is taken" && tt.code != relay.CodeServerFull {
						name = "web"
					}
					a.expect(t, name, addr.String(), want...)
					if s := a.Stats(); s.Reconnects != 1 || s.Accepted != 2 {
						t.Errorf("the app's figures: %+v", s)
					}
				})
			})
		}
	}
}

// A session whose streams are soon used up is replaced by another one, which no client
// notices.
func TestRotation(t *testing.T) {
	ofSessions(t)
	for _, tt := range []struct {
		name     string
		maxOpens int
		pause    time.Duration // between two clients
	}{
		{"in time", 10_003, 100 * time.Millisecond},
		{"in time, at once", 10_003, 0},
		{"used up", 3, 100 * time.Millisecond},
		{"used up at once", 3, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				r := startOn(t, n, relay.WithMaxOpens(tt.maxOpens), relay.WithLimits(relay.Limits{WaitTime: time.Minute}))
				start := time.Now()
				a := roam(t, n, relay.WithName("web"))
				addr := a.Addr()
				unguard := guard(t, n, addr)
				const clients = 30
				failed := make(chan error, 2*clients)
				again := make(chan struct{})
				goOn := sync.OnceFunc(func() { close(again) })
				defer goOn()
				for i := range clients {
					go func() {
						time.Sleep(time.Duration(i) * tt.pause)
						c, err := n.DialFrom("10.2.0.3")(t.Context(), "tcp", addr.String())
						if err == nil {
							defer c.Close()
							c.SetDeadline(start.Add(time.Hour))
							if err = echoed(c, i); err == nil {
								failed <- nil
								<-again
								err = echoed(c, -i) // over the session that it began in
							}
						}
						failed <- err
					}()
				}
				expectNone := func() {
					t.Helper()
					for range clients {
						if err := <-failed; err != nil {
							t.Error(err)
						}
					}
				}
				expectNone()
				sleepUntil(start, time.Minute)
				s := r.service(t)
				if len(s.Clients) != clients || s.Accepted != clients || s.Refused != 0 || s.Address != addr.String() || s.Waiting != 0 {
					t.Errorf("the service is %+v", s)
				}
				taking := 0
				for _, s := range s.Sessions {
					if !s.Draining {
						taking++
					}
				}
				rotations := int(a.Stats().Reconnects)
				if len(s.Sessions) != rotations+1 || taking != 1 || rotations < 1 || tt.maxOpens == 3 && rotations < clients/3-1 {
					t.Errorf("%d rotations, %d sessions, %d of them take clients", rotations, len(s.Sessions), taking)
				}
				goOn()
				expectNone()
				sleepUntil(start, 2*time.Minute) // the old sessions end with their clients
				unguard()
				a.expectAccepting(t)
				if s := r.service(t); len(s.Sessions) != 1 || s.Address != addr.String() {
					t.Errorf("the service is %+v", s)
				}
				if got := a.Stats(); got.Accepted != clients || got.Refused != 0 || got.Live != 0 || a.Addr().String() != addr.String() {
					t.Errorf("the app's figures: %+v", got)
				}
				if got := len(r.of(relay.EventResumed)); got != rotations || len(r.of(relay.EventLost)) != 0 {
					t.Errorf("%d rotations and events %+v", rotations, r.sessions())
				}
				for _, ev := range r.of(relay.EventEnded) {
					if ev.Err != nil {
						t.Errorf("event %+v", ev)
					}
				}
				if got := len(a.of(relay.EventResumed)); got != rotations || len(a.of(relay.EventDraining)) != rotations || len(a.of(relay.EventLost)) != 0 {
					t.Errorf("%d rotations and the app's events %+v", rotations, a.sessions())
				}

				// The lease is the last session's.
				if s := r.service(t).Sessions[0]; s.Draining {
					t.Errorf("the session is %+v", s)
				}
				a.place("")
				a.transport().Cut()
				synctest.Wait()
				if s := r.service(t); len(s.Sessions) != 0 {
					t.Errorf("the service is %+v", s)
				}
				a.place("10.1.0.1")
				if err := visit(n, addr); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// Wherever a registration is cut off, the next one succeeds: of an app that is new, and
// of one that resumes its lease.
func TestCutWhileRegistering(t *testing.T) {
	ofSessions(t)
	for _, resumes := range []bool{false, true} {
		whole := int64(0) // bytes of a registration, when it is known
		for cut := int64(0); whole == 0 || cut <= whole; cut++ {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				r := startOn(t, n, relay.WithTokens("token"), relay.WithLogger(nil))
				a := newRoamer(n)
				opts := a.options([]relay.RegisterOption{relay.WithName("web"), relay.WithPort(8005), relay.WithToken("token"), relay.WithWait()})
				was := "10.0.0.1:8005"
				var dials []*memnet.Conn
				n.OnConn(func(dialed, accepted *memnet.Conn) {
					dials = append(dials, dialed)
					if len(dials) == 1 && !resumes || len(dials) == 2 && resumes {
						dialed.CutAfter(cut)
					}
				})
				start := time.Now()
				a.Listener = register(t, relayAddr, opts...)
				go a.serve()
				if resumes {
					a.transport().Cut()
				}
				sleepUntil(start, 5*time.Second)
				a.expectAccepting(t)
				n.OnConn(nil)
				if len(dials) == 1 && !resumes || len(dials) == 2 && resumes {
					whole = cut // which was beyond its end
					dials[len(dials)-1].CutAfter(-1)
				}
				if registered := len(r.of(relay.EventRegistered)); resumes && registered != 1 {
					t.Fatalf("cut after %d bytes: it was resumed as %d services", cut, registered)
				}
				if s := r.service(t); a.Addr().String() != was || s.Address != was || s.Name != "web" || len(s.Sessions) != 1 || !a.Stats().Connected {
					t.Fatalf("cut after %d bytes: at %v, %+v", cut, a.Addr(), s)
				}
				echoes(t, client(t, n, a.Addr()))
			})
			if t.Failed() {
				return
			}
		}
		if whole < 100 {
			t.Errorf("resumes=%t: a registration of %d bytes", resumes, whole)
		}
	}
}

// A listener that dials what accepts and says nothing is not connected.
func TestNotConnected(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n)
		a := roam(t, n)
		r.Close()
		synctest.Wait()
		ln, err := n.Listen(t.Context(), "tcp", relayAddr)
		if err != nil {
			t.Fatal(err)
		}
		dialled := make(chan net.Conn, 100)
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					close(dialled)
					return
				}
				dialled <- c
			}
		}()
		c := within(t, "a try", dialled)
		synctest.Wait()
		if a.Stats().Connected {
			t.Error("connected to nobody")
		}
		a.Close()
		ln.Close()
		c.Close()
		for c := range dialled {
			c.Close()
		}
	})
}
