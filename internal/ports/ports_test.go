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
