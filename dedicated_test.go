package relay_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay"
	"github.com/tcprelay/relay/internal/memnet"
	"github.com/tcprelay/relay/internal/wire"
)

// TestOverDedicated runs the tests of this package once more, with apps that take their
// clients over connections of their own.
func TestOverDedicated(t *testing.T) {
	if overDedicated {
		t.Skip("this is it")
	}
	// Those of this file take such connections in any case.
	args := []string{"-test.timeout=10m", "-test.skip=^TestDedicated"}
	for _, arg := range os.Args[1:] { // with the same settings, but of one run
		switch name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "="); name {
		case "test.short", "test.v", "test.parallel", "test.cpu":
			args = append(args, arg)
		}
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), "RELAY_TEST_DEDICATED=1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out.Bytes())
	}
	if !bytes.Contains(out.Bytes(), []byte("PASS")) {
		t.Fatalf("nothing ran:\n%s", out.Bytes())
	}
}

// dedicated registers an app at which the tests of this file look, whatever the others'
// take.
func dedicated(t testing.TB, addr string, n int, opts ...relay.RegisterOption) *relay.Listener {
	t.Helper()
	l, err := relay.Register(t.Context(), addr, append([]relay.RegisterOption{relay.WithDedicated(n)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// A preface is what tells the connections to a relay apart.
const preface = "relay/1d"

// A census counts an app's connections to the relay.
type census struct {
	sessions, dedicated atomic.Int64
	refuse              atomic.Bool // dedicated ones get no further than their preface
}

func (c *census) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return &counted{TCPConn: conn.(*net.TCPConn), census: c}, nil
}

type counted struct {
	*net.TCPConn
	census *census
	said   bool
}

func (c *counted) Write(b []byte) (int, error) {
	if !c.said {
		c.said = true
		if !bytes.HasPrefix(b, []byte(preface)) {
			c.census.sessions.Add(1)
		} else if c.census.dedicated.Add(1); c.census.refuse.Load() {
			c.SetLinger(0)
			c.Close()
			return 0, syscall.ECONNREFUSED
		}
	}
	return c.TCPConn.Write(b)
}

func (c *counted) NetConn() net.Conn { return c.TCPConn }

// Each client has a connection of its own, and as many as were asked for are ready for
// the next ones.
func TestDedicated(t *testing.T) {
	_, addr := startRelay(t)
	for _, n := range []int{0, 1, 5} {
		var c census
		l := dedicated(t, addr, n, relay.WithDialer(c.dial))
		settled := func(clients int) {
			t.Helper()
			least := int64(clients + n - (n+1)/2 + 1) // it is refilled by halves
			if n == 0 {
				least = int64(clients)
			}
			eventually(t, "the connections wanted", func() bool { return c.dedicated.Load() >= least })
			if got := c.dedicated.Load(); got > int64(clients+n) {
				t.Errorf("%d spare ones: %d connections for %d clients", n, got, clients)
			}
		}
		settled(0)
		for i := range 10 {
			client := dial(t, l)
			client.Write([]byte("x"))
			app := accept(t, l)
			expectByte(t, app, 'x')
			sendAndExpect(t, client, app)
			if app.RemoteAddr().String() != client.LocalAddr().String() || app.LocalAddr().String() != l.Addr().String() {
				t.Errorf("the app sees %v at %v", app.RemoteAddr(), app.LocalAddr())
			}
			settled(i + 1)
		}
		if c.sessions.Load() != 1 {
			t.Errorf("%d sessions", c.sessions.Load())
		}
		l.Close()
	}
}

// A relay that shuts down closes what has not said what it is, but none that has become a
// client's meanwhile.
func TestDedicatedComesAtShutdown(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln := &slowListener{Listener: inner, closing: make(chan struct{}), closes: make(chan struct{})}
	srv := newServer(t)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	l := dedicated(t, inner.Addr().String(), 0)
	var shut <-chan error
	begin := func() {
		shut = shutdown(t, srv)
		within(t, "the closing of the listeners", ln.closing)
	}
	ln.hook.Store(&begin)
	client := dial(t, l)
	app := accept(t, l)
	sendAndExpect(t, client, app)
	close(ln.closes)
	within(t, "the end of Serve", done)
	sendAndExpect(t, client, app)
	client.Close()
	app.Close()
	if err := within(t, "the end of Shutdown", shut); err != nil {
		t.Error(err)
	}
}

// The Close of a slowListener takes its time, which a server that closes one thing after
// the other waits for. It calls hook before anything is read from the next connection.
type slowListener struct {
	net.Listener
	hook    atomic.Pointer[func()]
	once    sync.Once
	closing chan struct{} // closed when Close was called
	closes  chan struct{} // to be closed when it is to go on
}

func (l *slowListener) Close() error {
	l.once.Do(func() { close(l.closing) })
	<-l.closes
	return l.Listener.Close()
}

func (l *slowListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if hook := l.hook.Swap(nil); err == nil && hook != nil {
		conn = &hookedConn{TCPConn: conn.(*net.TCPConn), hook: sync.OnceFunc(*hook)}
	}
	return conn, err
}

type hookedConn struct {
	*net.TCPConn
	hook func()
}

func (c *hookedConn) Read(p []byte) (int, error) {
	c.hook()
	return c.TCPConn.Read(p)
}

// Where no further connection gets through, streams carry the clients, and nobody waits
// for each time anew.
func TestDedicatedRefused(t *testing.T) {
	_, addr := startRelay(t)
	var c census
	c.refuse.Store(true)
	l := dedicated(t, addr, 3, relay.WithDialer(c.dial))
	for range 10 {
		client, app := dial(t, l), accept(t, l)
		sendAndExpect(t, client, app)
	}
	if n := c.dedicated.Load(); n < 1 || n > 10 {
		t.Errorf("%d connections were tried", n)
	}
	// Nor does it need them of a kind that has no half-close.
	l = dedicated(t, addr, 3, relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		return struct{ net.Conn }{conn}, err
	}))
	for range 3 {
		client, app := dial(t, l), accept(t, l)
		sendAndExpect(t, client, app)
	}
}

// A secret is good for one connection, and for nobody but who was told it.
func TestDedicatedSecret(t *testing.T) {
	srv, addr := startRelay(t)
	said := make(chan []byte, 10)
	l := dedicated(t, addr, 1, relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &overheard{conn.(*net.TCPConn), said}, nil
	}))
	var heard []byte
	for !bytes.HasPrefix(heard, []byte(preface)) {
		heard = within(t, "a preface", said)
	}
	sendAndExpect(t, dial(t, l), accept(t, l)) // it was taken
	for _, head := range [][]byte{heard, wire.AppendPreface(nil, wire.Secret{1, 2, 3})} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		c.Write(head)
		expectReset(t, c)
	}
	if n := srv.Refusals()["secret"]; n != 2 {
		t.Errorf("refused %v", srv.Refusals())
	}
}

type overheard struct {
	*net.TCPConn
	said chan []byte
}

func (o *overheard) Write(b []byte) (int, error) {
	select {
	case o.said <- bytes.Clone(b):
	default:
	}
	return o.TCPConn.Write(b)
}

func (o *overheard) NetConn() net.Conn { return o.TCPConn }

// What a relay that is killed, or an app, has sent of a transfer is no whole one.
func TestDedicatedLost(t *testing.T) {
	for _, lost := range []string{"session", "all", "frozen"} {
		t.Run(lost, func(t *testing.T) {
			inMemory(t, func(t *testing.T, n *memnet.Network) {
				startOn(t, n)
				start := time.Now()
				var mu sync.Mutex
				var sessions, others []*memnet.Conn
				l := dedicated(t, relayAddr, 2, relay.WithName("web"), relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
					c, err := n.DialFrom("10.1.0.1")(ctx, network, addr)
					mu.Lock()
					defer mu.Unlock()
					if err == nil {
						if len(sessions) == 0 {
							sessions = append(sessions, c.(*memnet.Conn))
						} else {
							others = append(others, c.(*memnet.Conn))
						}
					}
					return c, err
				}))
				synctest.Wait()
				c, app := client(t, n, l.Addr()), accept(t, l)
				sendAndExpect(t, c, app)
				synctest.Wait()
				want := time.Duration(0)
				mu.Lock()
				switch lost {
				case "session":
					sessions[0].Cut()
				case "all":
					for _, c := range append(others, sessions...) {
						c.Cut()
					}
				case "frozen":
					for _, c := range append(others, sessions...) {
						c.Freeze()
					}
					want = 30 * time.Second
				}
				mu.Unlock()
				if _, err := app.Read(make([]byte, 1)); err == nil || err == io.EOF || errors.Is(err, net.ErrClosed) {
					t.Errorf("the app reads %v", err)
				}
				expectReset(t, c)
				if took := time.Since(start); took < want || took > want+10*time.Second {
					t.Errorf("noticed after %v", took)
				}
				app.Close()
				// It comes back, with other connections.
				c, app = client(t, n, l.Addr()), accept(t, l)
				sendAndExpect(t, c, app)
				c.Close()
				app.Close()
				l.Close()
				mu.Lock()
				for _, c := range others {
					c.Thaw()
				}
				mu.Unlock()
				within(t, "Done", l.Done())
			})
		})
	}
}

// Clients in a burst do not wait for each other's connections: all are asked for that
// are missing.
func TestDedicatedBurst(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		startOn(t, n)
		l := dedicated(t, relayAddr, 2, relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := n.DialFrom("10.1.0.1")(ctx, network, addr)
			if err == nil {
				c.(*memnet.Conn).SetLatency(50 * time.Millisecond)
			}
			return c, err
		}))
		time.Sleep(500 * time.Millisecond) // the app need not be asked whether it is there
		start := time.Now()
		const clients = 30
		for range clients {
			client(t, n, l.Addr())
		}
		for i := range clients {
			c := accept(t, l)
			defer c.Close()
			if i == 1 && time.Since(start) != 50*time.Millisecond {
				t.Errorf("the two for whom one was ready waited %v", time.Since(start))
			}
		}
		if took := time.Since(start); took > 200*time.Millisecond {
			t.Errorf("the last of %d waited %v", clients, took)
		}
	})
}

// The app's reset reaches a client that takes nothing, though nobody reads what the app
// had sent.
func TestDedicatedResetUnseen(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the system does not tell")
	}
	_, addr := startRelay(t, relay.WithLimits(relay.Limits{StallTime: 10 * time.Hour, LingerTime: 80 * time.Millisecond}))
	l := dedicated(t, addr, 1)
	client, app := dial(t, l), accept(t, l)
	fill(t, app, 64<<20)
	app.SetLinger(0)
	app.Close()
	expectReset(t, client)
}

// An answer that was sent whole, by an app that then closed, arrives whole, however slowly
// the client takes it; also when the app's end of the connection is long gone, and the
// clients are looked after meanwhile. Its tail waits as long as in a stream.
func TestDedicatedSlowClient(t *testing.T) {
	for name, config := range map[string][2]relay.Option{
		"TCP": {relay.WithTLSConfig(nil), relay.WithTLSConfig(nil)},
		"TLS": {relay.WithTLSConfig(relayTLS()), relay.WithTLSConfig(clientTLS())},
	} {
		t.Run(name, func(t *testing.T) {
			_, addr := startRelay(t, config[0], relay.WithLimits(relay.Limits{LingerTime: 3 * time.Second}))
			l := dedicated(t, addr, 1, config[1])
			client := dial(t, l)
			client.SetReadBuffer(16 << 10)
			app := accept(t, l)
			const sent = 2 << 20 // fits what the way holds
			go func() {
				app.Write(make([]byte, sent))
				app.Close()
			}()
			// It takes a little before each look at it.
			var got int64
			for range 25 {
				n, err := io.CopyN(io.Discard, client, 32<<10)
				if got += n; err != nil {
					t.Fatalf("after %d bytes of %d: %v", got, sent, err)
				}
				time.Sleep(100 * time.Millisecond) // its pace, slower than the relay looks after it
			}
			client.SetReadBuffer(4 << 20) // enough of it
			n, err := io.Copy(io.Discard, client)
			if got += n; err != nil || got != sent {
				t.Errorf("got %d bytes of %d, %v", got, sent, err)
			}
		})
	}
}

// An app whose connections break as soon as they are given a client costs that client a
// few tries, and not its stream.
func TestDedicatedBroken(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		startOn(t, n)
		var dials atomic.Int64
		l := dedicated(t, relayAddr, 3, relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := n.DialFrom("10.1.0.1")(ctx, network, addr)
			if err == nil && dials.Add(1) > 1 {
				c.(*memnet.Conn).CutAfter(int64(len(preface) + 16)) // with the preface
			}
			return c, err
		}))
		for range 5 {
			c, app := client(t, n, l.Addr()), accept(t, l)
			sendAndExpect(t, c, app)
			c.Close()
			app.Close()
		}
		if n := dials.Load(); n > 100 {
			t.Errorf("%d connections for 5 clients", n)
		}
	})
}

// Those that could not be opened for a while are there some time later, without a client
// that asks for them.
func TestDedicatedAgain(t *testing.T) {
	inMemory(t, func(t *testing.T, n *memnet.Network) {
		startOn(t, n)
		var dials, away atomic.Int64
		away.Store(1)
		l := dedicated(t, relayAddr, 4, relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
			if dials.Add(1) > 1 && away.Load() > 0 {
				return nil, errAway
			}
			return n.DialFrom("10.1.0.1")(ctx, network, addr)
		}))
		time.Sleep(time.Second)
		away.Store(0)
		before := dials.Load()
		time.Sleep(10 * time.Second)
		if n := dials.Load() - before; n != 4 {
			t.Errorf("%d of 4 were opened", n)
		}
		l.Close()
	})
}
