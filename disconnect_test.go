package relay_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

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
