package relay_test

import (
	"context"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
)

// A wrapper is a listener in memory whose conns are the test's.
type wrapper struct {
	net.Listener
	wrap func(*memnet.Conn) net.Conn
}

func (w wrapper) Accept() (net.Conn, error) {
	c, err := w.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return w.wrap(c.(*memnet.Conn)), nil
}

// wrapping has the public listeners wrap their conns.
func wrapping(n *memnet.Network, wrap func(*memnet.Conn) net.Conn) relay.ServerOption {
	return relay.WithListen(func(ctx context.Context, network, address string) (net.Listener, error) {
		ln, err := n.Listen(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return wrapper{ln, wrap}, nil
	})
}

// A stuckConn is one whose Close, or SetLinger, waits for a word.
type stuckConn struct {
	*memnet.Conn
	in    string          // which of them
	stuck chan<- struct{} // told when it waits
	free  <-chan struct{} // closed to let it go on
}

func (c stuckConn) wait(in string) {
	if in != c.in {
		return
	}
	select {
	case c.stuck <- struct{}{}:
	default: // the second call
	}
	<-c.free
}

func (c stuckConn) SetLinger(sec int) error {
	c.wait("SetLinger")
	return c.Conn.SetLinger(sec)
}

func (c stuckConn) Close() error {
	c.wait("Close")
	return c.Conn.Close()
}

// The conns of a public listener are the user's. One that takes its time when the relay
// hangs up on its client holds up nobody else: no lock is held meanwhile.
func TestHangUpIsStuck(t *testing.T) {
	const idle = 10 * time.Second
	for _, tt := range []struct {
		name string
		app  func(a *roamer, want []byte)        // what it does with the client
		hang func(r *memRelay, c net.Conn) error // ends when the client was hung up on
		next string                              // a name that can be had meanwhile
	}{
		{
			// A client that was sent everything outlives its session, so that it has to
			// be hung up on by itself.
			name: "Disconnect",
			app: func(a *roamer, want []byte) {
				if c, err := a.Accept(); err == nil {
					c.Write(want)
					c.Close()
				}
			},
			hang: func(r *memRelay, _ net.Conn) error { return r.Disconnect("web") },
			next: "web",
		},
		{
			name: "IdleTime",
			app:  func(a *roamer, _ []byte) { a.serve() },
			hang: func(*memRelay, net.Conn) error { return nil },
			next: "web 2",
		},
		{
			name: "abort",
			app: func(a *roamer, _ []byte) {
				if c, err := a.Accept(); err == nil {
					c.Read(make([]byte, 1))
					c.(conn).SetLinger(0)
					c.Close()
				}
				a.serve()
			},
			hang: func(_ *memRelay, c net.Conn) error {
				_, err := c.Write([]byte("x"))
				return err
			},
			next: "web 2",
		},
	} {
		for _, in := range []string{"Close", "SetLinger"} {
			if in == "SetLinger" && tt.name == "abort" {
				continue // it is called by the session's reader, which is why WithListen forbids it
			}
			t.Run(tt.name+"/"+in, func(t *testing.T) {
				// Who waits for a lock stops the clock of a bubble, and nothing in it
				// could end the test: so this is not of the bubble, nor its clock.
				free := make(chan struct{})
				release := sync.OnceFunc(func() { close(free) })
				var late atomic.Bool
				watchdog := time.AfterFunc(patience, func() {
					late.Store(true)
					release()
				})
				defer watchdog.Stop()

				inMemory(t, func(t *testing.T, n *memnet.Network) {
					stuck := make(chan struct{}, 1)
					r := startOn(t, n, identify(relay.Limits{IdleTime: idle}), wrapping(n, func(c *memnet.Conn) net.Conn {
						if hostOf(c.RemoteAddr().String()) == "10.2.0.1" { // as client has it
							return stuckConn{c, in, stuck, free}
						}
						return c
					}))
					t.Cleanup(release) // or the server would not close
					other := roam(t, n, relay.WithName("other"))
					bystander, err := n.DialFrom("10.2.0.3")(t.Context(), "tcp", other.Addr().String())
					if err != nil {
						t.Fatal(err)
					}
					defer bystander.Close()
					echoes(t, bystander)
					web := newRoamer(n)
					web.Listener = register(t, relayAddr, web.options([]relay.RegisterOption{
						relay.WithName("web"), relay.WithToken("limited")})...)
					go tt.app(web, make([]byte, 200_000))
					c := client(t, n, web.Addr())
					time.Sleep(idle / 2)
					synctest.Wait()

					hung := make(chan error, 1)
					go func() { hung <- tt.hang(r, c) }()
					within(t, "the client hung up on", stuck)
					// The clock stands still from here on, so that nobody is over a limit.
					if got := serviceNames(r.Server); !slices.Contains(got, "other") {
						t.Errorf("services %q", got)
					}
					echoes(t, bystander)
					if err := visit(n, other.Addr()); err != nil {
						t.Errorf("a client of another service: %v", err)
					}
					if tt.next != "web" { // which is there still
						if err := visit(n, web.Addr()); err != nil {
							t.Errorf("another client: %v", err)
						}
					}
					try := viaRegister(n, "10.1.0.3", relay.WithName(tt.next), relay.WithToken("another"))
					if _, code := try(); code != "" {
						t.Errorf("registering: %q", code)
					}
					if late.Load() {
						t.Fatalf("held up until %s returned", in)
					}
					release()
					if err := within(t, "the end of it", hung); err != nil {
						t.Error(err)
					}
					expectReset(t, c)
				})
			})
		}
	}
}

// A client that was accepted before the relay closed the public listener is still
// connected, and has no more time to be idle than others, though it comes in when the
// service seemed to have no clients any more.
func TestLateClientIsIdle(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		const idle = 8 * time.Second
		known := make(chan struct{})
		r := startOn(t, n, relay.WithLimits(relay.Limits{IdleTime: idle}), wrapping(n, func(c *memnet.Conn) net.Conn {
			return lateConn{c, known}
		}))
		a := newRoamer(n)
		a.Listener = register(t, relayAddr, a.options(nil)...)
		c := client(t, n, a.Addr())
		synctest.Wait()
		over := make(chan error, 1)
		go func() { over <- r.Shutdown(t.Context()) }()
		time.Sleep(idle) // nobody is to be looked after
		if s := r.service(t); !s.Draining || len(s.Clients) != 0 || s.Refused != 0 {
			t.Errorf("the service is %+v", s)
		}
		close(known)
		accept(t, a)
		start := time.Now()
		expectReset(t, c)
		if took := time.Since(start); took < idle || took > idle*3/2 {
			t.Errorf("an idle client is reset after %v", took)
		}
		synctest.Wait()
		if got := r.Refusals()["idle"]; got != 1 {
			t.Errorf("refused %v", r.Refusals())
		}
		if err := within(t, "Shutdown's return", over); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	})
}

// A lateConn does not know at once whose it is, as one that reads a PROXY header first.
type lateConn struct {
	*memnet.Conn
	known <-chan struct{}
}

func (c lateConn) RemoteAddr() net.Addr {
	<-c.known
	return c.Conn.RemoteAddr()
}
