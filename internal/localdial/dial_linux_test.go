package localdial

import (
	"errors"
	"net"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// That a dialer's Control has connected already changes nothing of what the dialer says.
func TestControl(t *testing.T) {
	d := net.Dialer{Control: Control}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	c, err := d.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	a, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if raw, err := c.(*net.TCPConn).SyscallConn(); err != nil {
		t.Error(err)
	} else {
		raw.Control(func(fd uintptr) {
			// The first four letters, for package syscall has no way for strings.
			name, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_CONGESTION)
			if want := int('c') | 'u'<<8 | 'b'<<16 | 'i'<<24; err != nil || name != want {
				t.Errorf("congestion control %#x, %v", name, err)
			}
		})
	}
	if c.RemoteAddr().String() != addr || c.LocalAddr().String() != a.RemoteAddr().String() {
		t.Errorf("from %v to %v, and %v came", c.LocalAddr(), c.RemoteAddr(), a.RemoteAddr())
	}
	c.Write([]byte("x"))
	if n, err := a.Read(make([]byte, 2)); n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	c.Close()
	a.Close()
	ln.Close()
	if c, err := d.Dial("tcp", addr); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("where nobody listens: %v, %v", c, err)
	}
	if ln, err := net.Listen("tcp6", "[::1]:0"); err == nil { // if there is IPv6
		defer ln.Close()
		c, err := d.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
}

// A listener whose queue is full answers nobody. Dialling it waits, as long as it may.
func TestControlWaits(t *testing.T) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(sa.(*syscall.SockaddrInet4).Port))
	d := net.Dialer{Control: Control, Timeout: 200 * time.Millisecond}
	for range 5 {
		c, err := d.Dial("tcp", addr)
		if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	t.Error("the queue was never full")
}
