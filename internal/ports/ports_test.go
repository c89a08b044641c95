package ports

import (
	"errors"
	"net"
	"syscall"
	"testing"
)

func port(ln net.Listener) int { return ln.Addr().(*net.TCPAddr).Port }

// freeRange returns two neighbouring ports that nobody listens on.
func freeRange(t *testing.T) (first int) {
	t.Helper()
	for range 100 {
		a, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		b, err := listen("127.0.0.1", port(a)+1)
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
	a, err := p.Listen("127.0.0.1", 0)
	if err != nil || port(a) != first {
		t.Fatalf("first: %v, %v", a, err)
	}
	b, err := p.Listen("127.0.0.1", 0)
	if err != nil || port(b) != first+1 {
		t.Fatalf("second: %v, %v", b, err)
	}
	if _, err := p.Listen("127.0.0.1", 0); !errors.Is(err, ErrFull) {
		t.Errorf("third: %v", err)
	}
	if _, err := p.Listen("127.0.0.1", first); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("one in use: %v", err)
	}
	for _, bad := range []int{first - 1, first + 2, -1, 65536} {
		if _, err := p.Listen("127.0.0.1", bad); !errors.Is(err, ErrRange) {
			t.Errorf("port %d: %v", bad, err)
		}
	}
	// In turn: after the second, the first again.
	a.Close()
	b.Close()
	c, err := p.Listen("127.0.0.1", 0)
	if err != nil || port(c) != first {
		t.Fatalf("after both were given back: %v, %v", c, err)
	}
	c.Close()
	d, err := p.Listen("127.0.0.1", 0)
	if err != nil || port(d) != first+1 {
		t.Fatalf("given back a moment ago: %v, %v", d, err)
	}
	d.Close()
}

func TestAnyPort(t *testing.T) {
	var p Pool
	ln, err := p.Listen("127.0.0.1", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if _, err := p.Listen("127.0.0.1", 65536); !errors.Is(err, ErrRange) {
		t.Errorf("port 65536: %v", err)
	}
	if _, err := p.Listen("127.0.0.1", port(ln)); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("one in use: %v", err)
	}
}

// A port that cannot be listened on for another reason than that it is in use is passed
// over too. Of the ports there are only one past the last is sure to be such.
func TestPassedOver(t *testing.T) {
	const none = 65536
	first := freeRange(t)
	p := &Pool{First: first, Last: none, next: none - first}
	ln, err := p.Listen("127.0.0.1", 0)
	if err != nil || port(ln) != first {
		t.Fatalf("behind one that cannot be had: %v, %v", ln, err)
	}
	ln.Close()
	// It is the reason why none was had, and not that the range is full.
	p = &Pool{First: none, Last: none + 1}
	if _, err := p.Listen("127.0.0.1", 0); err == nil || errors.Is(err, ErrFull) || errors.Is(err, ErrInUse) {
		t.Errorf("none that can be had: %v", err)
	}
}

func TestInUse(t *testing.T) {
	var p Pool
	ln, err := p.Listen("127.0.0.1", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if _, err := p.Listen("127.0.0.1", port(ln)); !errors.Is(err, ErrInUse) || !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("one in use: %v", err)
	}
	if _, err := p.Listen("203.0.113.7", 0); err == nil || errors.Is(err, ErrInUse) { // for documentation
		t.Errorf("a host that is not here: %v", err)
	}
}
