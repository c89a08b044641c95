package relay_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

// A cutter is a network on which the next connection of a kind is cut after some bytes.
type cutter struct {
	*memnet.Network
	*book
	slice     int
	transport *memnet.Conn // the app's end of the newest
	dials     int          // of transports
	cutDial   int64        // the next transport is cut after that many bytes; negative: it is not
	cutClient int64        // so is the next client
	client    *memnet.Conn // the newest
}

func newCutter(t testing.TB, n *memnet.Network) *cutter {
	k := &cutter{Network: n, book: newBook(t, n, 1), cutDial: -1, cutClient: -1}
	var dialing sync.Mutex // dedicated connections can be dialed several at once
	n.OnConn(func(c, _ *memnet.Conn) {
		dialing.Lock()
		defer dialing.Unlock()
		c.SetSlice(k.slice)
		if c.RemoteAddr().String() == relayAddr {
			k.transport = c
			k.dials++
			c.CutAfter(k.cutDial)
			k.cutDial = -1
			return
		}
		k.client = c
		c.CutAfter(k.cutClient)
		k.cutClient = -1
		k.dialed(c)
	})
	return k
}

// wasCut reports that a connection ended by a reset.
func wasCut(c *memnet.Conn) bool { return c.WasReset() || c.Peer().WasReset() }

// register registers an app with the identity of a token.
func (k *cutter) register(ctx context.Context, opts ...relay.RegisterOption) (*relay.Listener, error) {
	if overDedicated {
		opts = append(opts, relay.WithDedicated(1)) // so that the newest transport is the next client's
	}
	return signUp(ctx, relayAddr, append([]relay.RegisterOption{
		relay.WithDialer(k.DialFrom("10.1.0.1")), relay.WithBackoff(100*time.Millisecond, time.Second),
	}, opts...)...)
}

// expectServed fails the test unless a transfer goes well, for client and app.
func (k *cutter) expectServed(ln net.Listener) {
	k.t.Helper()
	x := k.book.transfer(dialogue, 100, 100)
	if err := k.visit(x, ln.Addr().String(), time.Hour); err != nil {
		k.t.Errorf("%v: %v", x, err)
	}
	synctest.Wait()
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.app != nil || !x.appOver {
		k.t.Errorf("%v: the app: %v", x, x.app)
	}
}

// namedTLS trusts the relay whatever its address.
func namedTLS() *tls.Config {
	config := clientTLS()
	config.ServerName = "relay.example"
	return config
}

// each is the distance between the bytes at which something is cut. With the race detector
// it takes five times as long, so that is for some of them: all have their turn without it.
func each(n int) int {
	if raceDetector() && !long() {
		return 4 * n
	}
	return n
}

// A registration that is cut at any byte fails with an error that says so or succeeds;
// with WithWait it always succeeds. It leaves nothing behind but a lease for its time,
// which the same identity can take up at once.
func TestCutRegistration(t *testing.T) {
	ofSessions(t)
	token := []relay.ServerOption{relay.WithTokens("of one identity")}
	for _, tt := range []struct {
		name   string
		server []relay.ServerOption
		app    []relay.RegisterOption
		slice  int
		every  int // offset
		codes  []relay.Code
		again  relay.RegisterOption // what the next one needs to succeed
	}{
		{name: "plain", every: each(1)},
		{name: "name and port", app: []relay.RegisterOption{relay.WithName("web"), relay.WithPort(8000)}, again: relay.WithWait(), every: each(1)},
		{name: "shared", app: []relay.RegisterOption{relay.WithName("web"), relay.WithShared()}, every: each(1)},
		{name: "single bytes", app: []relay.RegisterOption{relay.WithPort(8000)}, again: relay.WithWait(), slice: 1, every: each(1)},
		{name: "token", server: token, every: each(1), app: []relay.RegisterOption{
			relay.WithToken("of one identity"), relay.WithName("web"), relay.WithPort(8000)}},
		{name: "TLS", every: each(figure(1, 13, 101)), codes: []relay.Code{relay.CodeTLS},
			server: []relay.ServerOption{relay.WithTLSConfig(relayTLS())},
			app:    []relay.RegisterOption{relay.WithTLSConfig(namedTLS()), relay.WithPort(8000)}, again: relay.WithWait()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, wait := range []bool{false, true} {
				failed, whole := 0, false
				for n := 0; !whole; n += tt.every {
					inMemory(t, func(t *testing.T, net *memnet.Network) {
						r := startOn(t, net, append(tt.server, relay.WithLogger(nil), relay.WithLease(10*time.Second))...)
						k := newCutter(t, net)
						k.slice = tt.slice
						k.cutDial = int64(n)
						var f bool
						f, whole = k.cutRegistration(r, n, wait, tt.codes, tt.app, tt.again)
						if f {
							failed++
						}
					})
					if t.Failed() {
						return
					}
				}
				if !wait && failed < 100/tt.every {
					t.Errorf("only %d registrations failed", failed)
				}
				t.Logf("wait %v: %d registrations failed", wait, failed)
			}
		})
	}
}

func (k *cutter) cutRegistration(r *memRelay, n int, wait bool, codes []relay.Code, opts []relay.RegisterOption, again relay.RegisterOption) (failed, whole bool) {
	t := k.t
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	first := opts
	if wait {
		first = append(slices.Clip(opts), relay.WithWait())
	}
	l, err := k.register(ctx, first...)
	synctest.Wait()
	if err != nil {
		if wait {
			t.Fatalf("cut after %d bytes: %v", n, err)
		}
		re, ok := err.(*relay.RegisterError)
		if !ok || re.Code != relay.CodeNotRelay && !slices.Contains(codes, re.Code) {
			t.Errorf("cut after %d bytes: %#v", n, err)
		}
		// Whatever the relay has made of it, the app can be had again.
		if l, err = k.register(ctx, append(slices.Clip(opts), again)...); err != nil {
			t.Fatalf("again, after a cut after %d bytes: %v", n, err)
		}
	}
	failed, whole = k.dials > 1, k.dials == 1 && !wasCut(k.transport)
	k.transport.CutAfter(-1) // it is about registering
	served := make(chan error, 1)
	go func() { served <- k.serve(l) }()
	k.expectServed(l)
	if l.Close() != nil || !errors.Is(<-served, net.ErrClosed) {
		t.Errorf("cut after %d bytes: Close or Accept", n)
	}
	<-l.Done()
	time.Sleep(time.Minute) // more than a lease
	synctest.Wait()
	if s := r.Services(); len(s) != 0 || k.Listeners() != 1 || len(k.Conns()) != 0 {
		t.Errorf("cut after %d bytes: left are the services %+v, %d listeners, %d connections", n, s, k.Listeners(), len(k.Conns()))
	}
	if err := listens(k.Network, l.Addr()); err != nil {
		t.Errorf("cut after %d bytes: the port is not free: %v", n, err)
	}
	k.book.close()
	return failed, whole
}

// An app that comes back is cut at any byte of that too, and is back in the end, at its
// address.
func TestCutReturn(t *testing.T) {
	ofSessions(t)
	inMemory(t, func(t *testing.T, net *memnet.Network) {
		startOn(t, net, relay.WithLogger(nil))
		k := newCutter(t, net)
		l, err := k.register(t.Context(), relay.WithName("web"))
		if err != nil {
			t.Fatal(err)
		}
		go k.serve(l)
		addr := l.Addr().String()
		for n, whole := 0, false; !whole && !t.Failed(); n++ {
			dials := k.dials
			k.cutDial = int64(n)
			k.transport.Cut()
			time.Sleep(5 * time.Second)
			synctest.Wait()
			whole = k.dials == dials+1
			k.transport.CutAfter(-1)
			k.expectServed(l)
			if got := l.Addr().String(); got != addr {
				t.Errorf("cut after %d bytes: it is at %s and was at %s", n, got, addr)
			}
		}
		if s := l.Stats(); s.Reconnects < 200 || !s.Connected {
			t.Errorf("the app's figures: %+v", s)
		}
		l.Close()
		<-l.Done()
		k.book.close()
	})
}

// A transfer that is cut at any byte, of the app's connection to the relay or of the
// client's, is whole at an end or that end has an error; and the next one at the same
// address goes well.
func TestCutTransfer(t *testing.T) {
	for _, tt := range []struct {
		name     string
		habit    habit
		up, down int
		client   bool // it is the client's connection that is cut
		slice    int
		every    int // offset
	}{
		{name: "a request's session", habit: request, up: 3000, down: 3000, every: each(figure(1, 3, 31))},
		{name: "a dialogue's session", habit: dialogue, up: 3000, down: 3000, every: each(figure(1, 5, 31))},
		{name: "a short request's session", habit: request, up: 100, down: 100, every: each(1)},
		{name: "a short dialogue's session, in single bytes", habit: dialogue, up: 100, down: 100, slice: 1, every: each(1)},
		{name: "a long request's session", habit: request, up: 600_000, down: 600_000, every: each(figure(499, 9973, 99991))},
		{name: "a request's client", habit: request, up: 3000, down: 3000, client: true, every: each(figure(1, 3, 31))},
		{name: "a duplex's client", habit: duplex, up: 3000, down: 3000, client: true, every: each(figure(1, 5, 31))},
		{name: "a short request's client", habit: request, up: 100, down: 100, client: true, every: each(1)},
		{name: "a short dialogue's client, in single bytes", habit: dialogue, up: 100, down: 100, client: true, slice: 1, every: each(1)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, net *memnet.Network) {
				r := startOn(t, net, relay.WithLogger(nil))
				k := newCutter(t, net)
				k.slice = tt.slice
				l, err := k.register(t.Context(), relay.WithName("web"))
				if err != nil {
					t.Fatal(err)
				}
				go k.serve(l)
				addr := l.Addr().String()
				synctest.Wait() // for a dedicated connection
				k.expectServed(l)
				failed, n := 0, 0
				for whole := false; !whole && !t.Failed(); n += tt.every {
					cut := k.transport
					if tt.client {
						k.cutClient = int64(n)
					} else {
						cut.CutAfter(int64(n))
					}
					x := k.book.transfer(tt.habit, tt.up, tt.down)
					if k.visit(x, addr, time.Hour) != nil {
						failed++
					}
					synctest.Wait()
					if !k.quiet() {
						t.Fatalf("%v, cut after %d bytes, is not over at the app", x, n)
					}
					if tt.client {
						cut = k.client
					}
					whole = !wasCut(cut)
					cut.CutAfter(-1)
					k.expectServed(l)
					if got := l.Addr().String(); got != addr {
						t.Fatalf("it is at %s and was at %s", got, addr)
					}
				}
				if least := (tt.up + tt.down) / tt.every; failed < least {
					t.Errorf("%d transfers failed, want %d at least", failed, least)
				}
				t.Logf("cut up to byte %d, %d transfers failed", n, failed)
				if s := r.service(t); len(s.Clients) != 0 || s.Waiting != 0 {
					t.Errorf("left are clients: %+v", s)
				}
				l.Close()
				<-l.Done()
				k.book.close()
			})
		})
	}
}

// A client that takes nothing and whose connection is then reset, which may show in a
// write to it first, is not taken by the app for one that is done.
func TestCutWhileBothWait(t *testing.T) {
	for name, limits := range map[string]relay.Limits{"plain": {}, "throttled": {ClientBytesPerSecond: 1 << 40}} {
		t.Run(name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, net *memnet.Network) {
				startOn(t, net, relay.WithLogger(nil), relay.WithLimits(limits))
				k := newCutter(t, net)
				l, err := k.register(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				for range figure(5000, 500, 200) { // it takes some to hit the moment
					c := client(t, net, l.Addr())
					app, err := l.Accept()
					if err != nil {
						t.Fatal(err)
					}
					go app.Write(make([]byte, 128<<10)) // more than the client's buffers hold
					c.Write([]byte("not all"))
					read := make(chan error)
					go func() {
						_, err := io.Copy(io.Discard, app)
						read <- err
					}()
					synctest.Wait()
					c.Cut()
					if err := <-read; !isReset(err) {
						t.Fatalf("the app reads %v", err)
					}
					app.Close()
					c.Close()
				}
			})
		})
	}
}
