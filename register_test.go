package relay_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/tcprelay/relay"
)

// code returns the code of a RegisterError, and "" of any other.
func code(err error) relay.Code {
	var re *relay.RegisterError
	if errors.As(err, &re) {
		return re.Code
	}
	return ""
}

func port(l net.Listener) int {
	_, p, _ := net.SplitHostPort(l.Addr().String())
	n, _ := strconv.Atoi(p)
	return n
}

// freePorts returns the first of n neighbouring ports that nobody listens on. They
// are below those that systems give out by themselves, so that they stay free.
func freePorts(t testing.TB, n int) (first int) {
	t.Helper()
	for range 1000 {
		first := 10_000 + rand.IntN(20_000)
		free := 0
		for i := range n {
			ln, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(first+i)))
			if err != nil {
				break
			}
			ln.Close()
			free++
		}
		if free == n {
			return first
		}
	}
	t.Fatal("no free ports")
	return 0
}

func TestRegisterDefaults(t *testing.T) {
	srv, addr := startRelay(t)
	l := register(t, addr)
	a, ok := l.Addr().(*net.TCPAddr)
	if !ok || !a.IP.IsLoopback() || a.Port == 0 {
		t.Fatalf("public address %v", l.Addr())
	}
	// A service without a name goes by its address.
	if got := serviceNames(srv); !slices.Equal(got, []string{a.String()}) {
		t.Errorf("services %q", got)
	}
	go serveEcho(l)
	echoes(t, dial(t, l))
}

func TestRegisterPorts(t *testing.T) {
	first := freePorts(t, 3)
	srv, addr := startRelay(t, relay.WithPorts(first, first+2))
	a := register(t, addr)
	b := register(t, addr, relay.WithPort(first+2))
	if port(a) != first || port(b) != first+2 {
		t.Fatalf("ports %d and %d of %d to %d", port(a), port(b), first, first+2)
	}
	for _, out := range []int{first - 1, first + 3, 1, 65535} {
		if _, err := signUp(t.Context(), addr, relay.WithPort(out)); code(err) != relay.CodePortUnavailable {
			t.Errorf("port %d, out of range: %v", out, err)
		}
	}
	for _, used := range []int{first, first + 2} {
		if _, err := signUp(t.Context(), addr, relay.WithPort(used)); code(err) != relay.CodePortUnavailable {
			t.Errorf("port %d, in use: %v", used, err)
		}
	}
	c := register(t, addr)
	if port(c) != first+1 {
		t.Errorf("next free port is %d, want %d", port(c), first+1)
	}
	if _, err := signUp(t.Context(), addr); code(err) != relay.CodeServerFull {
		t.Errorf("one more than there are ports: %v", err)
	}
	if n := len(srv.Services()); n != 3 {
		t.Errorf("%d services", n)
	}
	// A port comes back.
	c.Close()
	eventually(t, "a free port again", func() bool { return len(srv.Services()) == 2 })
	if d := register(t, addr); port(d) != first+1 {
		t.Errorf("the port that came back is %d, want %d", port(d), first+1)
	}
}

// A port that another program listens on is passed over, and is no answer to one
// who wants it.
func TestRegisterPortOfOthers(t *testing.T) {
	first := freePorts(t, 2)
	other, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(first)))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	_, addr := startRelay(t, relay.WithPorts(first, first+1))
	if _, err := signUp(t.Context(), addr, relay.WithPort(first)); code(err) != relay.CodePortUnavailable {
		t.Errorf("a port in use: %v", err)
	}
	if l := register(t, addr); port(l) != first+1 {
		t.Errorf("port %d, want %d", port(l), first+1)
	}

	// Without a range any port may be asked for, on the same terms.
	_, addr = startRelay(t)
	if _, err := signUp(t.Context(), addr, relay.WithPort(first)); code(err) != relay.CodePortUnavailable {
		t.Errorf("a port in use, no range: %v", err)
	}
	want := freePorts(t, 1)
	if l := register(t, addr, relay.WithPort(want)); port(l) != want {
		t.Errorf("port %d, want %d", port(l), want)
	}
}

// A name is had by one service at a time. It is free again when the service takes
// no more clients, be it that some are still there.
func TestRegisterName(t *testing.T) {
	srv, addr := startRelay(t)
	l := register(t, addr, relay.WithName("app"))
	if _, err := signUp(t.Context(), addr, relay.WithName("app")); code(err) != relay.CodeNameTaken {
		t.Fatalf("a name that is taken: %v", err)
	}
	if n := len(srv.Services()); n != 1 {
		t.Errorf("%d services", n)
	}
	client := dial(t, l)
	app := accept(t, l)
	sendAndExpect(t, client, app)
	l.Close()
	eventually(t, "the service draining", func() bool { return srv.Services()[0].Draining })
	next := register(t, addr, relay.WithName("app"))
	if got := serviceNames(srv); !slices.Equal(got, []string{"app", "app"}) {
		t.Errorf("services %q", got)
	}
	sendAndExpect(t, client, app)
	app.Close()
	eventually(t, "the first service's end", func() bool { return len(srv.Services()) == 1 })
	// The end of the first has not taken the name from the second.
	if _, err := signUp(t.Context(), addr, relay.WithName("app")); code(err) != relay.CodeNameTaken {
		t.Errorf("a name that is taken by the next: %v", err)
	}
	next.Close()
	eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
	register(t, addr, relay.WithName("app"))

	long := strings.Repeat("n", 255)
	register(t, addr, relay.WithName(long))
	if got := serviceNames(srv); !slices.Contains(got, long) {
		t.Errorf("services %q", got)
	}
}

// A service without a name goes by its address, whoever has that for a name.
func TestRegisterNameLikeAddress(t *testing.T) {
	first := freePorts(t, 2)
	srv, addr := startRelay(t, relay.WithPorts(first, first+1))
	second := net.JoinHostPort("127.0.0.1", strconv.Itoa(first+1))
	a := register(t, addr, relay.WithName(second))
	b := register(t, addr)
	if port(a) != first || b.Addr().String() != second {
		t.Fatalf("at %v and %v", a.Addr(), b.Addr())
	}
	if got := serviceNames(srv); !slices.Equal(got, []string{second, second}) {
		t.Errorf("services %q", got)
	}
}

func TestWithPublicHost(t *testing.T) {
	_, addr := startRelay(t, relay.WithPublicHost("localhost"))
	l := register(t, addr)
	if a, ok := l.Addr().(*net.TCPAddr); !ok || !a.IP.IsLoopback() {
		t.Errorf("public address %v", l.Addr())
	}
	go serveEcho(l)
	echoes(t, dial(t, l))

	// An address that is none of this host's is the relay's fault, but the service
	// gets a clear answer. 203.0.113.0/24 is for documentation.
	_, addr = startRelay(t, relay.WithPublicHost("203.0.113.7"))
	if _, err := signUp(t.Context(), addr); code(err) != relay.CodePortUnavailable {
		t.Errorf("a host that cannot be bound: %v", err)
	}
}

func TestWithAdvertisedHost(t *testing.T) {
	srv, addr := startRelay(t, relay.WithAdvertisedHost("relay.example"))
	l := register(t, addr)
	host, p, err := net.SplitHostPort(l.Addr().String())
	if err != nil || host != "relay.example" || l.Addr().Network() != "tcp" {
		t.Fatalf("public address %v of network %q", l.Addr(), l.Addr().Network())
	}
	if got := srv.Services()[0].Address; got != l.Addr().String() {
		t.Errorf("the relay says %q and the service %q", got, l.Addr())
	}
	// It is a name only: the listener is where it was.
	c, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", p))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if a := accept(t, l); a.LocalAddr().String() != c.RemoteAddr().String() {
		t.Errorf("the app's end is %v, the client's peer %v", a.LocalAddr(), c.RemoteAddr())
	}
	// An IP address is given as one.
	_, addr = startRelay(t, relay.WithAdvertisedHost("203.0.113.7"))
	if a, ok := register(t, addr).Addr().(*net.TCPAddr); !ok || a.IP.String() != "203.0.113.7" {
		t.Errorf("public address %v", a)
	}
}

// Services that registered at all addresses are told one that clients can use: the
// one they came to.
func TestWildcard(t *testing.T) {
	listen := []string{":0", "0.0.0.0:0"}
	hosts := []string{"127.0.0.1"}
	if haveIPv6() {
		listen = append(listen, "[::]:0")
		hosts = append(hosts, "::1")
	}
	for _, at := range listen {
		srv, err := relay.NewServer()
		if err != nil {
			t.Fatal(err)
		}
		_, p, _ := net.SplitHostPort(serve(t, srv, at))
		for _, host := range hosts {
			if at == "0.0.0.0:0" && host == "::1" {
				continue // may be IPv4 only
			}
			l := register(t, net.JoinHostPort(host, p))
			a, ok := l.Addr().(*net.TCPAddr)
			if !ok || a.IP.String() != host {
				t.Errorf("listening on %s, registered at %s, told %v", at, host, l.Addr())
				continue
			}
			client := dial(t, l)
			expectAddrs(t, client, accept(t, l))
			l.Close()
		}
	}
	// The same when only the public side is on all addresses.
	_, addr := startRelay(t, relay.WithPublicHost(""))
	l := register(t, addr)
	if a, ok := l.Addr().(*net.TCPAddr); !ok || a.IP.String() != "127.0.0.1" {
		t.Errorf("told %v", l.Addr())
	}
	expectAddrs(t, dial(t, l), accept(t, l))
}

// expectAddrs checks that the app's end has the addresses of the client's TCP
// connection.
func expectAddrs(t testing.TB, client *net.TCPConn, app net.Conn) {
	t.Helper()
	ra, ok1 := app.RemoteAddr().(*net.TCPAddr)
	la, ok2 := app.LocalAddr().(*net.TCPAddr)
	if !ok1 || !ok2 || ra.String() != client.LocalAddr().String() || la.String() != client.RemoteAddr().String() {
		t.Errorf("the client is %v at %v, and to the app %v at %v",
			client.LocalAddr(), client.RemoteAddr(), app.RemoteAddr(), app.LocalAddr())
	}
}

func haveIPv6() bool {
	ln, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		return false
	}
	ln.Close()
	return true
}

func TestAddrs(t *testing.T) {
	_, addr := startRelay(t)
	l := register(t, addr)
	c1 := dial(t, l)
	a1 := accept(t, l)
	c2 := dial(t, l)
	a2 := accept(t, l)
	expectAddrs(t, c1, a1)
	expectAddrs(t, c2, a2)
	if a1.RemoteAddr().String() == a2.RemoteAddr().String() {
		t.Errorf("both clients are %v", a1.RemoteAddr())
	}
}

func TestIPv6(t *testing.T) {
	if !haveIPv6() {
		t.Log("this machine has no IPv6 loopback: nothing to see")
		return
	}
	srv, err := relay.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	l := register(t, serve(t, srv, "[::1]:0"))
	if a, ok := l.Addr().(*net.TCPAddr); !ok || a.IP.String() != "::1" {
		t.Fatalf("public address %v", l.Addr())
	}
	client := dial(t, l)
	app := accept(t, l)
	expectAddrs(t, client, app)
	sendAndExpect(t, client, app)
}

func TestUnixSocket(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Log("paths are not what this needs: nothing to see")
		return
	}
	path := filepath.Join(t.TempDir(), "r")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv, err := relay.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, srv, ln)
	var asked [2]string
	l := register(t, "the relay", relay.WithDialer(func(ctx context.Context, network, addr string) (net.Conn, error) {
		asked = [2]string{network, addr}
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}))
	if asked != [2]string{"tcp", "the relay"} {
		t.Errorf("the dialer was given %q", asked)
	}
	if a, ok := l.Addr().(*net.TCPAddr); !ok || a.IP.String() != "127.0.0.1" {
		t.Fatalf("public address %v", l.Addr())
	}
	client := dial(t, l)
	app := accept(t, l)
	expectAddrs(t, client, app)
	sendAndExpect(t, client, app)
}

// A memoryListener accepts connections within the process.
type memoryListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func listenInMemory() *memoryListener {
	return &memoryListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *memoryListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *memoryListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

type memoryAddr struct{}

func (memoryAddr) Network() string { return "memory" }
func (memoryAddr) String() string  { return "memory" }

func (l *memoryListener) Addr() net.Addr { return memoryAddr{} }

func (l *memoryListener) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case l.conns <- far:
		return near, nil
	case <-l.done:
		return nil, io.ErrClosedPipe
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Over an in-memory transport the app is nowhere to be dialled, and is reached all
// the same: whatever the relay carries, it carries on the connection that the app
// made.
func TestInMemory(t *testing.T) {
	srv, err := relay.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	ln := listenInMemory()
	serveOn(t, srv, ln)
	l := register(t, "nowhere", relay.WithDialer(ln.dial), relay.WithName("in memory"))
	go serveEcho(l)
	for range 3 {
		echoes(t, dial(t, l))
	}
	if got := srv.Services()[0]; got.Name != "in memory" || len(got.Sessions) != 1 || got.Sessions[0].Remote == "" {
		t.Errorf("service %+v", got)
	}
	if err := srv.Disconnect("in memory"); err != nil {
		t.Error(err)
	}
}

// Sessions end in order over any transport.
func TestEndOfSession(t *testing.T) {
	plain, withTLS := listenInMemory(), listenInMemory()
	srv, err := relay.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	secure, err := relay.NewServer(relay.WithTLSConfig(relayTLS()))
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, srv, plain)
	serveOn(t, secure, withTLS)
	addr, secureAddr := serve(t, srv, "127.0.0.1:0"), serve(t, secure, "127.0.0.1:0")
	useTLS := relay.WithTLSConfig(clientTLS())
	for name, opts := range map[string][]relay.RegisterOption{
		"TCP":            {},
		"TLS":            {useTLS},
		"in memory":      {relay.WithDialer(plain.dial)},
		"TLS, in memory": {relay.WithDialer(withTLS.dial), useTLS},
	} {
		t.Run(name, func(t *testing.T) {
			srv, addr := srv, addr
			if len(opts) > 0 && strings.HasPrefix(name, "TLS") {
				srv, addr = secure, secureAddr
			}
			check := nothingLeft(t)
			for range 5 {
				l := register(t, addr, opts...)
				client, app := dial(t, l), accept(t, l)
				go io.Copy(io.Discard, app)
				want := randomBytes(100_000)
				if _, err := app.Write(want); err != nil {
					t.Fatal(err)
				}
				l.Close()
				select {
				case <-l.Done():
					t.Error("the session ended before the last conn")
				default:
				}
				app.Close()
				// The app may be gone now. What it wrote is the client's.
				within(t, "the session's end", l.Done())
				eventually(t, "no service", func() bool { return len(srv.Services()) == 0 })
				if got, err := io.ReadAll(client); err != nil || !bytes.Equal(got, want) {
					t.Errorf("the client reads %d bytes, %v", len(got), err)
				}
				client.Close()
			}
			check()
		})
	}
}

func TestOptions(t *testing.T) {
	for name, o := range map[string]relay.ServerOption{
		"WithPorts from 0":              relay.WithPorts(0, 10),
		"WithPorts from -1":             relay.WithPorts(-1, 10),
		"WithPorts to 65536":            relay.WithPorts(10, 65536),
		"WithPorts backwards":           relay.WithPorts(11, 10),
		"WithTLSConfig, no certificate": relay.WithTLSConfig(clientTLS()),
	} {
		if srv, err := relay.NewServer(o); err == nil || srv != nil {
			t.Errorf("%s: %v, %v", name, srv, err)
		}
	}
	for name, o := range map[string]relay.ServerOption{
		"one port":       relay.WithPorts(65535, 65535),
		"every port":     relay.WithPorts(1, 65535),
		"no TLS":         relay.WithTLSConfig(nil),
		"no logger":      relay.WithLogger(nil),
		"all addresses":  relay.WithPublicHost(""),
		"no told host":   relay.WithAdvertisedHost(""),
		"a certificate":  relay.WithTLSConfig(relayTLS()),
		"any told host":  relay.WithAdvertisedHost("relay.example"),
		"any public one": relay.WithPublicHost("localhost"),
	} {
		if _, err := relay.NewServer(o); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}

	_, addr := startRelay(t)
	for name, o := range map[string]relay.RegisterOption{
		"WithPort(-1)":     relay.WithPort(-1),
		"WithPort(65536)":  relay.WithPort(65536),
		"a name too long":  relay.WithName(strings.Repeat("n", 256)),
		"WithBacklog(-1)":  relay.WithBacklog(-1),
		"the same, later":  relay.WithBacklog(-4096),
		"port far outside": relay.WithPort(1 << 30),
	} {
		dialled := false
		spy := relay.WithDialer(func(context.Context, string, string) (net.Conn, error) {
			dialled = true
			return nil, errors.New("not to be called")
		})
		l, err := signUp(t.Context(), addr, spy, o)
		if err == nil || l != nil || dialled || code(err) != "" {
			t.Errorf("%s: %v, %v; dialled: %t", name, l, err, dialled)
		}
	}
	// What is documented as a default is taken as one.
	register(t, addr, relay.WithPort(0), relay.WithName(""), relay.WithBacklog(0),
		relay.WithDialer(nil), relay.WithLogger(nil), relay.WithTLSConfig(nil))
}
