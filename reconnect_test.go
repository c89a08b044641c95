package relay_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
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

// WithWait has Register wait until there is room, and without it nobody waits.
func TestWithWait(t *testing.T) {
	const room = 30 * time.Second // comes then
	full := func(opts []relay.ServerOption, theirs ...relay.RegisterOption) func(t *testing.T, n *memnet.Network) func() {
		return func(t *testing.T, n *memnet.Network) func() {
			startOn(t, n, opts...)
			other := roam(t, n, theirs...)
			return func() { other.Close() }
		}
	}
	for _, tt := range []struct {
		name    string
		opts    []relay.RegisterOption
		prepare func(t *testing.T, n *memnet.Network) (makeRoom func())
		code    relay.Code
		is      error
	}{
		{
			name:    "nobody there",
			prepare: func(t *testing.T, n *memnet.Network) func() { return func() { startOn(t, n) } },
			code:    relay.CodeUnreachable,
			is:      syscall.ECONNREFUSED,
		},
		{
			name:    "no port left",
			prepare: full([]relay.ServerOption{relay.WithPorts(8005, 8005)}),
			code:    relay.CodeServerFull,
		},
		{
			name:    "no service left",
			prepare: full([]relay.ServerOption{relay.WithLimits(relay.Limits{Services: 1})}),
			code:    relay.CodeServerFull,
		},
		{
			name:    "name taken",
			opts:    []relay.RegisterOption{relay.WithName("web")},
			prepare: full(nil, relay.WithName("web")),
			code:    relay.CodeNameTaken,
		},
		{
			name:    "port taken by an app",
			opts:    []relay.RegisterOption{relay.WithPort(8005)},
			prepare: full(nil, relay.WithPort(8005)),
			code:    relay.CodePortUnavailable,
		},
		{
			name: "port taken by another program",
			opts: []relay.RegisterOption{relay.WithPort(8005)},
			prepare: func(t *testing.T, n *memnet.Network) func() {
				startOn(t, n)
				ln, err := n.Listen(t.Context(), "tcp", "10.0.0.1:8005")
				if err != nil {
					t.Fatal(err)
				}
				return func() { ln.Close() }
			},
			code: relay.CodePortUnavailable,
		},
		{
			name: "something else there",
			prepare: func(t *testing.T, n *memnet.Network) func() {
				ln, err := n.Listen(t.Context(), "tcp", relayAddr)
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					for {
						c, err := ln.Accept()
						if err != nil {
							return
						}
						c.Close()
					}
				}()
				return func() { ln.Close(); startOn(t, n) }
			},
			code: relay.CodeNotRelay,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				makeRoom := tt.prepare(t, n)
				a := newRoamer(n)
				opts := a.options(tt.opts)
				start := time.Now()
				_, err := signUp(t.Context(), relayAddr, opts...)
				expectRegisterError(t, err, relayAddr, tt.code)
				if !errors.Is(err, tt.is) && tt.is != nil {
					t.Errorf("without WithWait: %v", err)
				}
				expectAt(t, "without WithWait it fails", time.Now(), start, 0)

				// The context ends it, and the reason is not lost.
				opts = append(opts, relay.WithWait())
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				_, err = signUp(ctx, relayAddr, opts...)
				expectRegisterError(t, err, relayAddr, relay.CodeTimeout)
				expectAt(t, "with a deadline it fails", time.Now(), start, 10*time.Second)
				expectReason(t, err, context.DeadlineExceeded, tt.code, tt.is)
				cause := errors.New("on second thoughts")
				ctx, cancelFor := context.WithCancelCause(t.Context())
				time.AfterFunc(5*time.Second, func() { cancelFor(cause) })
				_, err = signUp(ctx, relayAddr, opts...)
				expectRegisterError(t, err, relayAddr, relay.CodeCanceled)
				expectAt(t, "cancelled it fails", time.Now(), start, 15*time.Second)
				expectReason(t, err, cause, tt.code, tt.is)
				if n := len(a.dialled()); n < 1+5+3 || n > 1+100+50 {
					t.Errorf("tried %d times", n)
				}

				registered := make(chan error, 1)
				go func() {
					l, err := signUp(t.Context(), relayAddr, opts...)
					a.Listener = l
					registered <- err
				}()
				sleepUntil(start, room)
				makeRoom()
				if err := <-registered; err != nil {
					t.Fatal(err)
				}
				defer a.Close()
				if took := time.Since(start); took < room || took > room+time.Second {
					t.Errorf("registered after %v", took)
				}
				go a.serve()
				if err := visit(n, a.Addr()); err != nil {
					t.Error(err)
				}
				if events := a.sessions(); len(events) != 2 || events[0].Kind != relay.EventRefused || events[0].Addr != "" || events[1].Kind != relay.EventRegistered {
					t.Errorf("events %+v", events)
				}
			})
		})
	}
}

// expectReason checks the error of a Register that waited and was ended by ctx.
func expectReason(t testing.TB, err, ended error, want relay.Code, is error) {
	t.Helper()
	re, _ := errors.AsType[*relay.RegisterError](err)
	before, ok := errors.AsType[*relay.RegisterError](re.Err)
	if !ok || before.Code != want || !errors.Is(err, ended) || is != nil && !errors.Is(err, is) {
		t.Errorf("Register: %v; want %v in it, and before it code %q and %v", err, ended, want, is)
	}
}

// A deadline that falls into a try does not hide why those before it failed.
func TestWithWaitCutShort(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		tries := 0
		dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
			if tries++; tries < 3 {
				return n.Dial(ctx, network, addr)
			}
			<-ctx.Done()
			return nil, ctx.Err()
		}
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := signUp(ctx, relayAddr, relay.WithDialer(dial), relay.WithWait())
		expectRegisterError(t, err, relayAddr, relay.CodeTimeout)
		expectReason(t, err, context.DeadlineExceeded, relay.CodeUnreachable, syscall.ECONNREFUSED)
		expectAt(t, "it fails", time.Now(), start, time.Minute)
		if tries != 3 {
			t.Errorf("%d tries", tries)
		}
	})
}

// What waiting would not help fails at once, also behind something that it might have.
func TestWithWaitInVain(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		register := func() error {
			_, err := signUp(t.Context(), relayAddr, relay.WithDialer(n.Dial), relay.WithWait(), relay.WithToken("wrong"),
				relay.WithBackoff(100*time.Millisecond, time.Second))
			return err
		}
		start := time.Now()
		failed := make(chan error, 1)
		go func() { failed <- register() }()
		sleepUntil(start, 10*time.Second)
		startOn(t, n, relay.WithTokens("right"))
		expectRegisterError(t, <-failed, relayAddr, relay.CodeUnauthorized)
		if took := time.Since(start); took > 11*time.Second {
			t.Errorf("it failed after %v", took)
		}
		start = time.Now()
		expectRegisterError(t, register(), relayAddr, relay.CodeUnauthorized)
		expectAt(t, "it fails", time.Now(), start, 0)
	})
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

// A relay that will not have the app any longer ends its listener.
func TestRefusedForGood(t *testing.T) {
	for _, tt := range []struct {
		name string
		anew []relay.ServerOption
		want relay.Code
	}{
		{"token removed", []relay.ServerOption{relay.WithTokens("another")}, relay.CodeUnauthorized},
		{
			"name not granted", []relay.ServerOption{relay.WithAuthorizer(func(context.Context, relay.Registration) (relay.Grant, error) {
				return relay.Grant{Names: []string{"api-*"}}, nil
			})}, relay.CodeUnauthorized,
		},
		{"hello too large", []relay.ServerOption{relay.WithLimits(relay.Limits{HelloSize: 20})}, relay.CodeMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				r := startOn(t, n, relay.WithTokens("token"))
				a := roam(t, n, relay.WithName("web"), relay.WithToken("token"))
				addr := a.Addr()
				c := client(t, n, addr)
				echoes(t, c)
				r.Close()
				expectReset(t, c)
				startOn(t, n, tt.anew...)
				a.expectRefused(t, tt.want)
				dials := len(a.dialled())
				sleepUntil(time.Now(), time.Hour)
				if n := len(a.dialled()); n != dials {
					t.Errorf("dialled %d times more", n-dials)
				}
				if _, err := a.Accept(); code(err) != tt.want { // again
					t.Errorf("Accept: %v", err)
				}
				events := a.expect(t, "web", addr.String(), relay.EventRegistered, relay.EventLost, relay.EventRefused, relay.EventEnded)
				for _, ev := range events[2:] {
					if code(ev.Err) != tt.want {
						t.Errorf("event %+v", ev)
					}
				}
				if err := a.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
				_, err := a.Accept()
				expectClosed(t, "Accept", err)
			})
		})
	}
}

// The end of a relay, or of a listener, in a gap.
func TestEndInTheGap(t *testing.T) {
	ofSessions(t)
	gap := func(t *testing.T, f func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer, waiting *memnet.Conn)) {
		inMemory(t, func(t *testing.T, n *memnet.Network) {
			r := startOn(t, n, relay.WithLimits(relay.Limits{WaitTime: time.Hour}))
			a := roam(t, n, relay.WithName("web"))
			a.place("")
			a.transport().Cut()
			synctest.Wait()
			c := client(t, n, a.Addr())
			synctest.Wait()
			if s := r.service(t); s.Waiting != 1 || len(s.Sessions) != 0 {
				t.Fatalf("the service is %+v", s)
			}
			f(t, n, r, a, c)
		})
	}
	expectGone := func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer, waiting *memnet.Conn) {
		t.Helper()
		start := time.Now()
		expectReset(t, waiting)
		synctest.Wait()
		expectAt(t, "the reset", time.Now(), start, 0)
		if err := listens(n, a.Addr()); err != nil {
			t.Errorf("listening: %v", err)
		}
		if s := r.Services(); len(s) != 0 {
			t.Errorf("services %+v", s)
		}
	}
	t.Run("Shutdown", func(t *testing.T) {
		gap(t, func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer, waiting *memnet.Conn) {
			start := time.Now()
			if err := r.Shutdown(t.Context()); err != nil {
				t.Errorf("Shutdown: %v", err)
			}
			expectAt(t, "Shutdown's return", time.Now(), start, 0)
			expectGone(t, n, r, a, waiting)
			a.place("10.1.0.1")
			sleepUntil(start, time.Minute)
			a.expectAccepting(t)
		})
	})
	t.Run("Server.Close", func(t *testing.T) {
		gap(t, func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer, waiting *memnet.Conn) {
			r.Close()
			expectGone(t, n, r, a, waiting)
		})
	})
	t.Run("Disconnect", func(t *testing.T) {
		gap(t, func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer, waiting *memnet.Conn) {
			if err := r.Disconnect("web"); err != nil {
				t.Errorf("Disconnect: %v", err)
			}
			expectGone(t, n, r, a, waiting)
			if err := r.Disconnect("web"); err != relay.ErrNoService {
				t.Errorf("Disconnect again: %v", err)
			}
		})
	})
	t.Run("Listener.Close", func(t *testing.T) {
		gap(t, func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer, waiting *memnet.Conn) {
			start := time.Now()
			a.Close()
			<-a.Done()
			expectAt(t, "Done", time.Now(), start, 0)
			a.place("10.1.0.1")
			// The relay cannot know: the lease runs out.
			sleepUntil(start, time.Minute-1)
			if s := r.service(t); s.Waiting != 1 || s.Draining {
				t.Errorf("the service is %+v", s)
			}
			sleepUntil(start, time.Minute)
			expectGone(t, n, r, a, waiting)
			if n := len(a.dialled()); n != 1 {
				t.Errorf("dialled %d times", n)
			}
		})
	})
}

// Who is disconnected is told so, and does not come back.
func TestDisconnected(t *testing.T) {
	ofSessions(t)
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n)
		start := time.Now()
		a := roam(t, n, relay.WithName("web"))
		addr := a.Addr()
		c := client(t, n, addr)
		echoes(t, c)
		if err := r.Disconnect("web"); err != nil {
			t.Fatal(err)
		}
		if err := listens(n, addr); err != nil {
			t.Errorf("listening: %v", err)
		}
		expectReset(t, c)
		a.expectRefused(t, relay.CodeDisconnected)
		sleepUntil(start, time.Hour)
		if n := len(a.dialled()); n != 1 || len(r.Services()) != 0 {
			t.Errorf("dialled %d times, services %+v", n, r.Services())
		}
		a.expect(t, "web", addr.String(), relay.EventRegistered, relay.EventLost, relay.EventEnded)
		events := r.expect(t, "web", addr.String(), relay.EventRegistered, relay.EventEnded)
		if err := events[1].Err; err == nil || errors.Is(err, net.ErrClosed) {
			t.Errorf("ended by %v", err)
		}
	})
}

// An app that was away when it was disconnected is told so when it comes back, as long as
// its lease would have lasted. After that it is nobody that the relay knows.
func TestDisconnectedWhileAway(t *testing.T) {
	for _, tt := range []struct {
		back  time.Duration
		there bool
	}{
		{29 * time.Second, false},
		{31 * time.Second, true},
	} {
		t.Run(tt.back.String(), func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				r := startOn(t, n, relay.WithLease(30*time.Second))
				a := roam(t, n, relay.WithName("web"))
				a.place("")
				a.transport().Cut()
				synctest.Wait()
				start := time.Now()
				if err := r.Disconnect("web"); err != nil {
					t.Fatal(err)
				}
				expectAt(t, "the end", r.one(t, relay.EventEnded).Time, start, 0)
				sleepUntil(start, tt.back)
				a.place("10.1.0.1")
				if !tt.there {
					a.expectRefused(t, relay.CodeDisconnected)
					return
				}
				sleepUntil(start, time.Minute)
				a.expectAccepting(t)
				if err := visit(n, a.Addr()); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// An app that is disconnected while it registers is told so too.
func TestDisconnectedWhileRegistering(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		opening, open := make(chan struct{}), make(chan struct{})
		r := startOn(t, n, relay.WithListen(func(ctx context.Context, network, address string) (net.Listener, error) {
			close(opening)
			<-open
			return n.Listen(ctx, network, address)
		}))
		failed := make(chan error, 1)
		go func() {
			_, err := signUp(context.Background(), relayAddr, relay.WithDialer(n.DialFrom("10.1.0.1")), relay.WithName("web"))
			failed <- err
		}()
		within(t, "the public listener being opened", opening)
		if err := r.Disconnect("web"); err != nil {
			t.Fatal(err)
		}
		close(open)
		if err := within(t, "Register's error", failed); code(err) != relay.CodeDisconnected {
			t.Errorf("Register: %v", err)
		}
	})
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

// Of a service with a name and one whose address is just that, the name is the former's.
func TestDisconnectNameLikeAddress(t *testing.T) {
	for _, namedFirst := range []bool{true, false} {
		t.Run(fmt.Sprintf("named first %t", namedFirst), func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				r := startOn(t, n, relay.WithPorts(9001, 9002))
				const name = "10.0.0.1:9001"
				var named, nameless *roamer
				squat := func() { named = roam(t, n, relay.WithName(name), relay.WithPort(9002)) }
				if namedFirst {
					squat()
				}
				nameless = roam(t, n, relay.WithPort(9001))
				if !namedFirst {
					squat()
				}
				if got := nameless.Addr().String(); got != name {
					t.Fatalf("the one without a name is at %s", got)
				}
				ofNamed, ofNameless := client(t, n, named.Addr()), client(t, n, nameless.Addr())
				echoes(t, ofNamed)
				echoes(t, ofNameless)

				if err := r.Disconnect(name); err != nil {
					t.Fatal(err)
				}
				expectReset(t, ofNamed)
				named.expectRefused(t, relay.CodeDisconnected)
				echoes(t, ofNameless)
				nameless.expectAccepting(t)
				if s := r.service(t); s.Name != name || s.Address != name || s.Draining {
					t.Errorf("the service is %+v", s)
				}
				// Nobody has the name now, and it stands for the address.
				if err := r.Disconnect(name); err != nil {
					t.Fatal(err)
				}
				expectReset(t, ofNameless)
				nameless.expectRefused(t, relay.CodeDisconnected)
				if err := r.Disconnect(name); err != relay.ErrNoService {
					t.Errorf("Disconnect a third time: %v", err)
				}
			})
		})
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
