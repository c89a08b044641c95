package ports

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
)

const local = "127.0.0.1"

func port(ln net.Listener) int { return ln.Addr().(*net.TCPAddr).Port }

// get listens on one of all the ports of a pool.
func get(t *testing.T, p *Pool, want int) (net.Listener, error) {
	t.Helper()
	return p.Listen(t.Context(), local, want, 0, 0)
}

// freeRange returns two neighbouring ports that nobody listens on.
func freeRange(t *testing.T) (first int) {
	t.Helper()
	for range 100 {
		a, err := net.Listen("tcp", local+":0")
		if err != nil {
			t.Fatal(err)
		}
		b, err := net.Listen("tcp", net.JoinHostPort(local, strconv.Itoa(port(a)+1)))
		a.Close()
		if err == nil {
			b.Close()
			return port(a)
		}
	}
	t.Fatal("no two free ports side by side")
	return 0
}

func TestRange(t *testing.T) {
	first := freeRange(t)
	p := &Pool{First: first, Last: first + 1}
	a, err := get(t, p, 0)
	if err != nil || port(a) != first {
		t.Fatalf("first: %v, %v", a, err)
	}
	b, err := get(t, p, 0)
	if err != nil || port(b) != first+1 {
		t.Fatalf("second: %v, %v", b, err)
	}
	if _, err := get(t, p, 0); !errors.Is(err, ErrFull) {
		t.Errorf("third: %v", err)
	}
	if _, err := get(t, p, first); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("one in use: %v", err)
	}
	for _, bad := range []int{first - 1, first + 2, -1, 65536} {
		if _, err := get(t, p, bad); !errors.Is(err, ErrRange) {
			t.Errorf("port %d: %v", bad, err)
		}
	}
	// In turn: after the second, the first again.
	a.Close()
	b.Close()
	c, err := get(t, p, 0)
	if err != nil || port(c) != first {
		t.Fatalf("after both were given back: %v, %v", c, err)
	}
	c.Close()
	d, err := get(t, p, 0)
	if err != nil || port(d) != first+1 {
		t.Fatalf("given back a moment ago: %v, %v", d, err)
	}
	d.Close()
}

func TestAnyPort(t *testing.T) {
	var p Pool
	ln, err := get(t, &p, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if _, err := get(t, &p, 65536); !errors.Is(err, ErrRange) {
		t.Errorf("port 65536: %v", err)
	}
	if _, err := get(t, &p, port(ln)); !errors.Is(err, ErrInUse) || !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("one in use: %v", err)
	}
	if _, err := p.Listen(t.Context(), "203.0.113.7", 0, 0, 0); err == nil || errors.Is(err, ErrInUse) { // for documentation
		t.Errorf("a host that is not here: %v", err)
	}
}

// A net in which ports are taken without sockets.
type fakeNet struct {
	mu    sync.Mutex
	held  map[int]bool
	bad   map[int]error // ports that cannot be had
	asked []int
}

// A fakeListener is at an address of no type that the net package has.
type fakeListener struct {
	net.Listener
	addr
	n *fakeNet
}

type addr int

func (addr) Network() string  { return "fake" }
func (a addr) String() string { return fmt.Sprint("port ", int(a)) }

func (l fakeListener) Addr() net.Addr { return l.addr }

func (l fakeListener) Close() error {
	l.n.mu.Lock()
	defer l.n.mu.Unlock()
	delete(l.n.held, int(l.addr))
	return nil
}

func (n *fakeNet) listen(_ context.Context, network, address string) (net.Listener, error) {
	host, p, err := net.SplitHostPort(address)
	if err != nil || host != "fake.example" || network != "tcp" {
		return nil, fmt.Errorf("listen on %s %s: %w", network, address, syscall.EINVAL)
	}
	port, err := strconv.Atoi(p)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, port)
	if err := n.bad[port]; err != nil {
		return nil, err
	}
	if n.held[port] {
		return nil, fmt.Errorf("somebody has port %d: %w", port, syscall.EADDRINUSE)
	}
	if n.held == nil {
		n.held = make(map[int]bool)
	}
	n.held[port] = true
	return fakeListener{addr: addr(port), n: n}, nil
}

func TestSubRange(t *testing.T) {
	for _, test := range []struct {
		poolFirst, poolLast int
		want, first, last   int
		asked               []int // the port, or what is tried; nil: out of range
	}{
		{0, 0, 0, 0, 0, []int{0}},
		{0, 0, 7, 0, 0, []int{7}},
		{0, 0, 0, 10, 12, []int{10, 11, 12}},
		{0, 0, 11, 10, 12, []int{11}},
		{0, 0, 13, 10, 12, nil},
		{0, 0, 0, 65535, 70000, []int{65535}},
		{0, 0, 0, -5, 2, []int{1, 2}},
		{0, 0, 0, 0, 2, []int{1, 2}},
		{0, 0, 0, 12, 10, nil},
		{0, 0, 11, 12, 10, nil},
		{0, 0, 0, 12, 0, nil},
		{20, 23, 0, 0, 0, []int{20, 21, 22, 23}},
		{20, 23, 0, 21, 22, []int{21, 22}},
		{20, 23, 0, 10, 21, []int{20, 21}},
		{20, 23, 0, 23, 90, []int{23}},
		{20, 23, 0, 1, 65535, []int{20, 21, 22, 23}},
		{20, 23, 0, 24, 30, nil},
		{20, 23, 22, 21, 22, []int{22}},
		{20, 23, 23, 21, 22, nil},
		{20, 23, 24, 10, 30, nil},
	} {
		var n fakeNet
		p := &Pool{First: test.poolFirst, Last: test.poolLast, ListenFunc: n.listen}
		var got []int
		var err error
		for range max(1, len(test.asked)) {
			var ln net.Listener
			if ln, err = p.Listen(t.Context(), "fake.example", test.want, test.first, test.last); err != nil {
				break
			}
			got = append(got, int(ln.Addr().(addr)))
		}
		if !slices.Equal(got, test.asked) || errors.Is(err, ErrRange) != (test.asked == nil) {
			t.Errorf("%+v: got %v, %v", test, got, err)
			continue
		}
		if test.asked == nil {
			if len(n.asked) > 0 {
				t.Errorf("%+v: asked for %v", test, n.asked)
			}
			continue
		}
		_, err = p.Listen(t.Context(), "fake.example", test.want, test.first, test.last)
		switch searched := test.want == 0 && test.asked[0] != 0; {
		case searched && (!errors.Is(err, ErrFull) || errors.Is(err, ErrInUse)):
			t.Errorf("%+v: all taken: %v", test, err)
		case !searched && (!errors.Is(err, ErrInUse) || !errors.Is(err, syscall.EADDRINUSE)):
			t.Errorf("%+v: taken: %v", test, err)
		}
	}
}

// A port that cannot be listened on for another reason than that it is in use is passed
// over too, and is the reason why none was had.
func TestPassedOver(t *testing.T) {
	odd := errors.New("an odd port")
	n := fakeNet{bad: map[int]error{1: odd, 3: odd}}
	p := &Pool{First: 1, Last: 3, ListenFunc: n.listen}
	ln, err := p.Listen(t.Context(), "fake.example", 0, 0, 0)
	if err != nil || ln.Addr() != addr(2) {
		t.Fatalf("behind one that cannot be had: %v, %v", ln, err)
	}
	if _, err := p.Listen(t.Context(), "fake.example", 0, 0, 0); !errors.Is(err, odd) || errors.Is(err, ErrFull) || errors.Is(err, ErrInUse) {
		t.Errorf("none that can be had: %v", err)
	}
	ln.Close()
	if ln, err := p.Listen(t.Context(), "fake.example", 0, 0, 0); err != nil || ln.Addr() != addr(2) {
		t.Errorf("given back: %v, %v", ln, err)
	}
}

func TestContext(t *testing.T) {
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	asked := 0
	p := &Pool{First: 1, Last: 65535, ListenFunc: func(ctx context.Context, _, _ string) (net.Listener, error) {
		if asked++; asked == 3 {
			cancel(cause)
			return nil, ctx.Err()
		}
		return nil, syscall.EADDRINUSE
	}}
	if _, err := p.Listen(ctx, local, 0, 0, 0); err != cause || asked != 3 {
		t.Errorf("ended in a search: %v, after %d ports", err, asked)
	}
	for _, want := range []int{0, 9} {
		if _, err := p.Listen(ctx, local, want, 0, 0); err != cause || asked != 3 {
			t.Errorf("ended before: %v, after %d ports", err, asked)
		}
		if _, err := new(Pool).Listen(ctx, local, want, 0, 0); err != cause {
			t.Errorf("ended before, without a hook: %v", err)
		}
	}
}

// A hook that takes its time holds up nobody else, and those that search at the same
// time do not begin with the same port.
func TestSlowHook(t *testing.T) {
	var n fakeNet
	slow, held := make(chan struct{}), make(chan struct{})
	var once sync.Once
	p := &Pool{First: 1, Last: 2, ListenFunc: func(ctx context.Context, network, address string) (net.Listener, error) {
		first := false
		once.Do(func() { first = true })
		if first {
			close(held)
			<-slow
		}
		return n.listen(ctx, network, address)
	}}
	type result struct {
		ln  net.Listener
		err error
	}
	done := make(chan result, 1)
	go func() {
		ln, err := p.Listen(t.Context(), "fake.example", 0, 0, 0)
		done <- result{ln, err}
	}()
	<-held // on port 1
	ln, err := p.Listen(t.Context(), "fake.example", 0, 0, 0)
	if err != nil || ln.Addr() != addr(2) {
		t.Errorf("meanwhile: %v, %v", ln, err)
	}
	// It goes on to the port that the slow one is about to listen on, and has it first.
	ln, err = p.Listen(t.Context(), "fake.example", 0, 0, 0)
	if err != nil || ln.Addr() != addr(1) {
		t.Errorf("meanwhile, again: %v, %v", ln, err)
	}
	n.mu.Lock()
	delete(n.held, 2) // somebody gave it back: the slow one goes on to it
	n.mu.Unlock()
	close(slow)
	if r := <-done; r.err != nil || r.ln.Addr() != addr(2) {
		t.Errorf("the slow one: %v, %v", r.ln, r.err)
	}
}

// Many at once get all the ports there are, each a different one.
func TestRace(t *testing.T) {
	var n fakeNet
	p := &Pool{First: 1, Last: 50, ListenFunc: n.listen}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if _, err := p.Listen(t.Context(), "fake.example", 0, 0, 0); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(n.held) != 50 {
		t.Errorf("%d ports of 50 were given out", len(n.held))
	}
}
