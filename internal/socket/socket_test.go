//go:build linux

package socket

import (
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/tcptest"
)

func TestUnacked(t *testing.T) {
	a, b := tcptest.Pair(t)

	if n, ok := Unacked(a); n != 0 || !ok {
		t.Errorf("a new connection: %d, %v", n, ok)
	}
	// More than both sockets hold, to a reader that does not read.
	go a.Write(make([]byte, 64<<20))
	waitFor(t, a, func(n int) bool { return n > 64<<10 })
	if _, err := io.CopyN(io.Discard, b, 64<<20); err != nil {
		t.Fatal(err)
	}
	waitFor(t, a, func(n int) bool { return n == 0 })
	a.Close()
	if _, ok := Unacked(a); ok {
		t.Error("a closed socket has a queue")
	}
	p, q := net.Pipe()
	defer p.Close()
	defer q.Close()
	if _, ok := Unacked(p); ok {
		t.Error("a pipe has a queue")
	}
}

func waitFor(t *testing.T, c net.Conn, is func(int) bool) int {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		if n, ok := Unacked(c); ok && is(n) {
			return n
		}
	}
	t.Fatal("the queue never was as awaited")
	return 0
}

func TestWasReset(t *testing.T) {
	a, b := tcptest.Pair(t)
	if WasReset(a) {
		t.Error("a new connection was reset")
	}
	b.CloseWrite()
	if n, err := a.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatal(n, err)
	}
	if WasReset(a) {
		t.Error("a half-closed connection was reset")
	}
	b.Close()

	// The reset goes to the write, and the read sees an end.
	a, b = tcptest.Pair(t)
	b.SetLinger(0)
	b.Close()
	for end := time.Now().Add(time.Minute); ; {
		if _, err := a.Write([]byte("x")); err != nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the reset does not arrive")
		}
	}
	if n, err := a.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("read %d, %v: if that is the reset, the precaution is needed no more", n, err)
	}
	if !WasReset(a) {
		t.Error("a connection that was reset was not")
	}
	if !WasReset(layer{a}) {
		t.Error("nor is it through a layer")
	}

	// Behind a FIN a reset takes nothing away.
	a, b = tcptest.Pair(t)
	b.CloseWrite()
	if n, err := a.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatal(n, err)
	}
	b.SetLinger(0)
	b.Close()
	waitClosed(t, a)
	if n, err := a.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatal(n, err)
	}
	if WasReset(a) {
		t.Error("a FIN and then a reset count as a reset alone")
	}

	p, q := net.Pipe()
	defer p.Close()
	defer q.Close()
	if WasReset(p) || !WasReset(known{p}) {
		t.Error("a connection that is no socket is not asked")
	}
}

// waitClosed waits until the kernel has seen c's reset.
func waitClosed(t *testing.T, c net.Conn) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		state := 0
		control(c, func(fd uintptr) {
			state, _ = syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO)
		})
		if state&0xff == tcpClose {
			return
		}
	}
	t.Fatal("never closed")
}

type layer struct{ net.Conn }

func (l layer) NetConn() net.Conn { return l.Conn }

// A connection is found below its layers, and one that says that it lies on itself is the
// last.
func TestUnwrap(t *testing.T) {
	p, q := net.Pipe()
	defer p.Close()
	defer q.Close()
	if got := Unwrap(layer{layer{p}}); got != p {
		t.Errorf("below two layers lies %T", got)
	}
	if c := (self{p}); Unwrap(c) != c {
		t.Errorf("below itself lies %T", Unwrap(c))
	}
	if CutShort(self{p}) {
		t.Error("what lies on itself was cut short")
	}
}

type self struct{ net.Conn }

func (s self) NetConn() net.Conn { return s }

type known struct{ net.Conn }

func (known) WasReset() bool   { return true }
func (known) AwaitReset() bool { return true }

func TestLimitUnsent(t *testing.T) {
	a, _ := tcptest.Pair(t)
	LimitUnsent(layer{a}, 100_000)
	control(a, func(fd uintptr) {
		const notSentLowat = 25 // TCP_NOTSENT_LOWAT, tcp(7)
		if n, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, notSentLowat); n != 100_000 || err != nil {
			t.Errorf("the system holds %d, %v", n, err)
		}
	})
	p, q := net.Pipe()
	defer p.Close()
	defer q.Close()
	LimitUnsent(p, 1) // does nothing
}
