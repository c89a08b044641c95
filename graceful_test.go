package relay_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
	"github.com/tcprelay/relay/internal/wire"
)

// slowLink is a connection that takes its time with what is read from it.
type slowLink struct {
	net.Conn
	rate int // bytes in a second
}

func (c slowLink) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p[:min(len(p), c.rate/100)])
	time.Sleep(time.Duration(n) * time.Second / time.Duration(c.rate))
	return n, err
}

// overSlowLink has an app register over a slow link, which holds little by itself: it
// is the relay that has to wait.
func overSlowLink(rate int) relay.RegisterOption {
	return relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		c.(*net.TCPConn).SetReadBuffer(32 << 10)
		return slowLink{c, rate}, nil
	})
}

// A service that takes no more clients takes what the last one sends to its end, be
// the link to the app slow and nothing left to be said in the other direction.
func TestLastUpload(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(context.Context, *relay.Server, *relay.Listener) error
	}{
		{"Listener.Close", func(_ context.Context, _ *relay.Server, l *relay.Listener) error { return l.Close() }},
		{"Server.Shutdown", func(ctx context.Context, srv *relay.Server, _ *relay.Listener) error { return srv.Shutdown(ctx) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel() // most of the time is the link's
			srv, addr := startRelay(t)
			l := register(t, addr, overSlowLink(1<<20))
			client, app := dial(t, l), accept(t, l)
			app.CloseWrite()
			if b, err := io.ReadAll(client); err != nil || len(b) > 0 {
				t.Fatalf("the client reads %q, %v", b, err)
			}
			ended := make(chan error, 1)
			go func() { ended <- tt.end(t.Context(), srv, l) }()
			eventually(t, "the service draining", func() bool { return srv.Services()[0].Draining })

			want := randomBytes(2 << 20)
			go func() {
				client.Write(want)
				client.CloseWrite()
			}()
			if got, err := io.ReadAll(onlyReader{app}); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the app reads %d bytes of %d, %v", len(got), len(want), err)
			}
			app.Close()
			if err := within(t, "the end", ended); err != nil {
				t.Errorf("%s: %v", tt.name, err)
			}
			l.Close() // or after a shutdown it looks for another relay
			within(t, "Done", l.Done())
			eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
		})
	}
}

// Done is closed when the clients have taken all that was written to them, and not
// with the listener or with its last conn.
func TestDone(t *testing.T) {
	srv, addr := startRelay(t)
	l := register(t, addr)
	client, app := dial(t, l), accept(t, l)
	sent := fill(t, app, 64<<20)
	notYet := func(after string) {
		t.Helper()
		select {
		case <-l.Done():
			t.Fatalf("closed after %s", after)
		default:
		}
		if s := srv.Services(); len(s) != 1 || len(s[0].Clients) != 1 {
			t.Fatalf("after %s: %+v", after, s)
		}
	}
	notYet("nothing")
	l.Close()
	eventually(t, "the service draining", func() bool { return srv.Services()[0].Draining })
	notYet("the listener's Close")
	app.Close()
	notYet("the conn's Close")
	if n, err := io.CopyN(io.Discard, client, 1000); err != nil {
		t.Fatalf("the client reads %d bytes, %v", n, err)
	}
	notYet("the client's first bytes")
	if n, err := io.Copy(io.Discard, client); err != nil || n != sent-1000 {
		t.Errorf("the client reads %d bytes of %d, %v", n, sent-1000, err)
	}
	within(t, "Done", l.Done())
}

// A closed listener is done when its session is lost, whatever conns there are. One that
// is not closed goes on, unless the relay will not have it.
func TestDoneSessionLost(t *testing.T) {
	srv, addr := startRelay(t)
	for _, closed := range []bool{false, true} {
		for name, lose := range map[string]func(net.Conn){
			"transport": func(c net.Conn) { c.Close() },
			"relay":     func(net.Conn) { srv.Disconnect("lost") },
		} {
			told, events := watch(relay.EventResumed)
			l, transport := registerTapped(t, addr, relay.WithName("lost"), told)
			client, app := dial(t, l), accept(t, l)
			sendAndExpect(t, client, app)
			if closed {
				l.Close()
				eventually(t, "the service draining", func() bool { return srv.Services()[0].Draining })
			}
			notDone := func() {
				t.Helper()
				select {
				case <-l.Done():
					t.Errorf("%s, closed %t: Done is closed", name, closed)
				default:
				}
			}
			notDone()
			lose(transport)
			if name == "transport" && !closed {
				next(t, events, relay.EventResumed)
				notDone()
				l.Close()
			}
			within(t, "Done of one whose "+name+" was lost", l.Done())
			// The name is free again when the relay has noticed.
			eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
		}
	}
}

// expectDraining checks that a listener's first event is that the relay goes away.
func expectDraining(t testing.TB, events <-chan relay.Event) {
	t.Helper()
	next(t, events, relay.EventRegistered)
	if ev := next(t, events, relay.EventDraining); ev.Err != nil || ev.Addr == "" {
		t.Errorf("event %+v", ev)
	}
}

// The app hears that it was a shutdown, with clients or without.
func TestShutdownIsTold(t *testing.T) {
	for range 50 {
		srv, addr := startRelay(t)
		told, events := watch()
		l := register(t, addr, told)
		if err := srv.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		expectDraining(t, events)
		l.Close()
	}
}

// And if what the relay says and the end of the session come at once.
func TestShutdownIsToldAtOnce(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	drain, err := wire.Line(wire.Control{Type: wire.Drain})
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		told, events := watch()
		registered := make(chan *relay.Listener, 1)
		go func() {
			l, err := signUp(t.Context(), ln.Addr().String(), told, relay.WithBackoff(never, never))
			if err != nil {
				t.Error(err)
			}
			registered <- l
		}()
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Read(make([]byte, 1000)); err != nil { // the hello
			t.Fatal(err)
		}
		c.Write(rawData(0, controlID, goodReply))
		l := within(t, "Register's return", registered)
		if l == nil {
			return
		}
		defer l.Close()
		goodbye := rawFrame(typeGoAway, 0, 0, 8, make([]byte, 8)...)
		c.Write(append(rawData(0, controlID, string(drain)), goodbye...))
		c.(*net.TCPConn).CloseWrite()
		expectDraining(t, events)
		l.Close()
	}
}

// A name like an address is a name. It keeps nobody from the address, who then goes by
// it as well.
func TestNameOfAnothersAddress(t *testing.T) {
	first := freePorts(t, 2)
	srv, addr := startRelay(t, relay.WithPorts(first, first+1))
	name := net.JoinHostPort("127.0.0.1", strconv.Itoa(first+1))
	squatter := register(t, addr, relay.WithName(name))
	l := register(t, addr)
	if port(squatter) != first || l.Addr().String() != name {
		t.Fatalf("%s is at %v, and the other at %v", name, squatter.Addr(), l.Addr())
	}
	go serveEcho(l)
	client := dial(t, l)
	echoes(t, client)
	client.Close()
	// The end of the one without a name leaves the name alone.
	l.Close()
	eventually(t, "one service", func() bool { return len(srv.Services()) == 1 })
	if _, err := signUp(t.Context(), addr, relay.WithName(name)); code(err) != relay.CodeNameTaken {
		t.Errorf("a name that is taken: %v", err)
	}
}

// Disconnect ends a service that is draining too, and the next of its name with it.
func TestDisconnectDraining(t *testing.T) {
	srv, addr := startRelay(t)
	l := register(t, addr, relay.WithName("web"))
	client, app := dial(t, l), accept(t, l)
	sendAndExpect(t, client, app)
	l.Close()
	eventually(t, "the service draining", func() bool { return srv.Services()[0].Draining })
	if err := srv.Disconnect("web"); err != nil {
		t.Fatal(err)
	}
	if s := srv.Services(); len(s) > 0 {
		t.Errorf("services %+v", s)
	}
	expectReset(t, client)
	if err := srv.Disconnect("web"); err != relay.ErrNoService {
		t.Errorf("Disconnect again: %v", err)
	}

	old := register(t, addr, relay.WithName("web"))
	client, app = dial(t, old), accept(t, old)
	sendAndExpect(t, client, app)
	old.Close()
	eventually(t, "the service draining", func() bool { return srv.Services()[0].Draining })
	next := register(t, addr, relay.WithName("web"))
	if err := srv.Disconnect("web"); err != nil {
		t.Fatal(err)
	}
	expectReset(t, client)
	expectDisconnected(t, next)
	if err := srv.Disconnect("web"); err != relay.ErrNoService {
		t.Errorf("Disconnect of both, again: %v", err)
	}
}

// Of Close calls at once one closes, an aborting one too, and the conn's bytes
// are counted once.
func TestAbortTwice(t *testing.T) {
	addr, sessions := fakeRelay(t, goodReply)
	l := register(t, addr)
	sess := within(t, "a session", sessions)
	const rounds, callers = 2000, 4
	for i := range rounds {
		if _, err := sess.Open(append(wire.AppendProxy(nil, nil, nil), "x"...)); err != nil {
			t.Fatal(err)
		}
		app := accept(t, l)
		expectByte(t, app, 'x')
		app.SetLinger(0)
		var calls sync.WaitGroup
		var ready, closed atomic.Int32
		for range callers {
			calls.Go(func() {
				for ready.Add(1); ready.Load() < callers; {
					runtime.Gosched()
				}
				if err := app.Close(); err == nil {
					closed.Add(1)
				} else if !errors.Is(err, net.ErrClosed) {
					t.Errorf("Close: %v", err)
				}
			})
		}
		calls.Wait()
		if n := closed.Load(); n != 1 {
			t.Fatalf("time %d: %d calls of Close closed", i, n)
		}
	}
	if got := l.Stats(); got.BytesIn != rounds || got.Live != 0 {
		t.Errorf("stats %+v", got)
	}
}

// What ended Register is told by its error's code, and matches what one would test for.
func TestRegisterErrorKinds(t *testing.T) {
	silent := relay.WithDialer(func(context.Context, string, string) (net.Conn, error) {
		near, far := net.Pipe()
		go func() {
			defer far.Close()
			io.Copy(io.Discard, far)
		}()
		return near, nil
	})
	unreachable := relay.WithDialer(func(ctx context.Context, _, _ string) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	for _, tt := range []struct {
		name     string
		dial     relay.RegisterOption
		deadline bool
		want     relay.Code
		is       []error
	}{
		{"canceled", silent, false, relay.CodeCanceled, []error{context.Canceled}},
		{"canceled while dialling", unreachable, false, relay.CodeCanceled, []error{context.Canceled}},
		{"deadline", silent, true, relay.CodeTimeout, []error{os.ErrDeadlineExceeded, context.DeadlineExceeded}},
		{"deadline while dialling", unreachable, true, relay.CodeTimeout, []error{os.ErrDeadlineExceeded, context.DeadlineExceeded}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				if tt.deadline {
					ctx, cancel = context.WithTimeout(t.Context(), time.Second)
				} else {
					time.AfterFunc(time.Second, cancel)
				}
				defer cancel()
				_, err := signUp(ctx, "relay.example:1", tt.dial)
				expectRegisterError(t, err, "relay.example:1", tt.want)
				for _, is := range tt.is {
					if !errors.Is(err, is) {
						t.Errorf("Register: %v, which is not %v", err, is)
					}
				}
				if errors.Is(err, os.ErrDeadlineExceeded) != tt.deadline {
					t.Errorf("Register: %v; a deadline: %t", err, !tt.deadline)
				}
				if ne, ok := err.(net.Error); !ok || ne.Timeout() != tt.deadline {
					t.Errorf("Register: %#v is no net.Error, or not its kind", err)
				}
			})
		})
	}
}

// What an app wrote before it closed its listener reaches a client who takes it minutes
// later, and Done does not come before.
func TestDoneAwaitsSlowClient(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		r := startOn(t, n)
		a := newRoamer(n)
		a.Listener = register(t, relayAddr, a.options(nil)...)
		c, app := client(t, n, a.Addr()), accept(t, a)
		want := randomBytes(100_000) // fits what the way holds
		if _, err := app.Write(want); err != nil {
			t.Fatal(err)
		}
		app.Close()
		a.Close()
		time.Sleep(4 * time.Minute)
		synctest.Wait()
		if isClosed(a.Done()) {
			t.Error("done before the client has all")
		}
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the client reads %d bytes of %d, %v", len(got), len(want), err)
		}
		within(t, "Done", a.Done())
		synctest.Wait()
		if ended := r.one(t, relay.EventEnded); ended.Err != nil {
			t.Errorf("ended by %v", ended.Err)
		}
	})
}

// A session that is over has some minutes to end, however much its app still says, and
// counts for its owner until then.
func TestOverIsOver(t *testing.T) {
	onStage(t, func(t *testing.T, s *stage) {
		c := s.dialFrom("10.1.0.9", s.addr)
		data := func(flags byte, v any) error { // on the control stream
			line, err := wire.Line(v)
			if err != nil {
				t.Fatal(err)
			}
			_, err = c.Write(append([]byte{byte(len(line) >> 16), byte(len(line) >> 8), byte(len(line)), 1<<4 | flags, 0, 0, 0, 3}, line...))
			return err
		}
		const syn = 2
		data(syn, wire.Hello{Version: wire.Version, Token: "limited"})
		synctest.Wait()
		data(0, wire.Control{Type: wire.Close})
		start := time.Now()
		io.Copy(io.Discard, c) // the relay has said its last
		for time.Since(start) < time.Hour && data(0, wire.Control{Type: wire.Ping}) == nil {
			if code := s.registers("10.0.0.5", "limited"); code != relay.CodeServerFull && time.Since(start) < 5*time.Minute {
				t.Errorf("another one after %v: %q", time.Since(start), code)
			}
			time.Sleep(20 * time.Second)
		}
		if took := time.Since(start); took < 5*time.Minute || took > 6*time.Minute {
			t.Errorf("it ended after %v", took)
		}
		synctest.Wait()
		if code := s.registers("10.0.0.5", "limited"); code != "" {
			t.Errorf("after it: %q", code)
		}
	}, identify(relay.Limits{Services: 1}))
}

// Every registration that is told of is told to have ended.
func TestEventsPair(t *testing.T) {
	lose := func(a *roamer) {
		a.place("")
		a.transport().Cut()
		synctest.Wait()
	}
	for name, f := range map[string]func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer) (want []error){
		"closed": func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer) []error {
			r.Close()
			return []error{relay.ErrServerClosed}
		},
		"shut down": func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer) []error {
			r.Shutdown(t.Context())
			return []error{relay.ErrServerClosed}
		},
		"closed while it was away": func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer) []error {
			lose(a)
			r.Close()
			return []error{relay.ErrServerClosed}
		},
		"its owner came back without it": func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer) []error {
			lose(a)
			b := roam(t, n, relay.WithName("web"), relay.WithToken("x"))
			synctest.Wait()
			if got := len(r.of(relay.EventEnded)); got != 1 {
				t.Errorf("%d ends at once", got)
			}
			b.Close()
			return []error{errAny, nil}
		},
		"its owner came back elsewhere": func(t *testing.T, n *memnet.Network, r *memRelay, a *roamer) []error {
			lose(a)
			b := roam(t, n, relay.WithName("web"), relay.WithToken("x"), relay.WithPort(4711))
			b.Close()
			return []error{errAny, nil}
		},
	} {
		t.Run(name, func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				r := startOn(t, n, relay.WithTokens("x"))
				a := roam(t, n, relay.WithName("web"), relay.WithToken("x"))
				want := f(t, n, r, a)
				time.Sleep(2 * time.Minute)
				synctest.Wait()
				a.Close()
				ended := r.of(relay.EventEnded)
				if got := len(r.of(relay.EventRegistered)); got != len(want) || len(ended) != len(want) {
					t.Fatalf("%d registered, ended %+v", got, ended)
				}
				for i, ev := range ended {
					if want[i] == errAny && ev.Err != nil && !errors.Is(ev.Err, relay.ErrServerClosed) {
						continue
					}
					if !errors.Is(ev.Err, want[i]) {
						t.Errorf("ended by %v, want %v", ev.Err, want[i])
					}
				}
			})
		})
	}
}

var errAny = errors.New("any")
