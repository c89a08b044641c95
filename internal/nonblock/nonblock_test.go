//go:build unix

package nonblock

import (
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/tcprelay/relay/internal/tcptest"
)

func fdOf(t *testing.T, c *net.TCPConn) (fd uintptr) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(f uintptr) { fd = f })
	return fd
}

// Calls move what there is, and do not wait for more.
func TestRecvSend(t *testing.T) {
	a, b := tcptest.Pair(t)
	r, w := fdOf(t, a), fdOf(t, b)
	p := make([]byte, 10)
	if n, err := Recv(r, p); n != 0 || err != syscall.EAGAIN {
		t.Errorf("Recv of nothing: %d, %v", n, err)
	}
	if n, err := Send(w, []byte("relay")); n != 5 || err != nil {
		t.Errorf("Send: %d, %v", n, err)
	}
	if n, err := Recv(r, p); string(p[:n]) != "relay" || err != nil {
		t.Errorf("Recv: %q, %v", p[:n], err)
	}
	if n, err := SendBoth(w, []byte("re"), []byte("lay")); n != 5 || err != nil {
		t.Errorf("SendBoth: %d, %v", n, err)
	}
	if n, err := Recv(r, p); string(p[:n]) != "relay" || err != nil {
		t.Errorf("Recv: %q, %v", p[:n], err)
	}
	whole := 0
	for {
		n, err := SendBoth(w, make([]byte, 10), make([]byte, 100_000))
		whole += n
		if err == syscall.EAGAIN {
			break
		}
		if err != nil || n == 0 {
			t.Fatalf("Send: %d, %v", n, err)
		}
	}
	b.CloseWrite()
	if got, err := io.ReadAll(a); len(got) != whole || err != nil {
		t.Errorf("%d of %d bytes, %v", len(got), whole, err)
	}
	if n, err := Recv(r, p); n != 0 || err != nil {
		t.Errorf("Recv at the end: %d, %v", n, err)
	}
	if n, err := Send(1<<20, p); n != 0 || err != syscall.EBADF {
		t.Errorf("Send to no file: %d, %v", n, err)
	}
}
