package socket

import (
	"context"
	"errors"
	"net"
	"strconv"
	"syscall"
	"testing"
	"time"
)

func congestionControl(t *testing.T, c net.Conn) (name string) {
	t.Helper()
	control(c, func(fd uintptr) {
		// getsockopt has no way for strings in package syscall; four bytes tell enough.
		n, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_CONGESTION)
		if err != nil {
			t.Fatal(err)
		}
		name = string([]byte{byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24)})
	})
	return name
}

// Connections within the machine are not paced, whatever its default is: those that are
// accepted, and those that are made. Others are left alone.
func TestUnpaced(t *testing.T) {
	for _, test := range []struct {
		name, listen string
		unpaced      bool
	}{
		{"loopback", "127.0.0.1:0", true},
		{"all addresses", "0.0.0.0:0", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			ln, err := net.Listen("tcp4", test.listen)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			raw, err := ln.(*net.TCPListener).SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			raw.Control(func(fd uintptr) { // a default that can be told from cubic
				err = syscall.SetsockoptString(int(fd), syscall.IPPROTO_TCP, syscall.TCP_CONGESTION, "reno")
			})
			if err != nil {
				t.Fatal(err)
			}
			Unpaced(ln)
			d := net.Dialer{Control: func(network, address string, raw syscall.RawConn) error {
				raw.Control(func(fd uintptr) {
					err = syscall.SetsockoptString(int(fd), syscall.IPPROTO_TCP, syscall.TCP_CONGESTION, "reno")
				})
				if err != nil {
					return err
				}
				return LocalDial(network, address, raw)
			}}
			_, port, _ := net.SplitHostPort(ln.Addr().String())
			dialled, err := d.DialContext(context.Background(), "tcp", net.JoinHostPort("127.0.0.1", port))
			if err != nil {
				t.Fatal(err)
			}
			defer dialled.Close()
			accepted, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer accepted.Close()
			want := "reno"
			if test.unpaced {
				want = "cubi"
			}
			if got := congestionControl(t, accepted); got != want {
				t.Errorf("accepted: %q, want %q", got, want)
			}
			if got := congestionControl(t, dialled); got != "cubi" {
				t.Errorf("dialled to loopback: %q", got)
			}
			if err := LocalDial("tcp", "192.0.2.1:80", nil); err != nil { // it touches nothing
				t.Error(err)
			}
		})
	}
}

// What a listener accepts keeps alive as what package net accepts does, by what it inherits.
func TestListen(t *testing.T) {
	ln, err := Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	options := func(ln net.Listener) (all [5]int) {
		d, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		control(c, func(fd uintptr) {
			for i, o := range [...][2]int{
				{syscall.SOL_SOCKET, syscall.SO_KEEPALIVE},
				{syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE},
				{syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL},
				{syscall.IPPROTO_TCP, syscall.TCP_KEEPCNT},
				{syscall.IPPROTO_TCP, syscall.TCP_NODELAY},
			} {
				if all[i], err = syscall.GetsockoptInt(int(fd), o[0], o[1]); err != nil {
					t.Fatal(err)
				}
			}
		})
		return all
	}
	if got, want := options(ln), options(plain); got != want {
		t.Errorf("options %v, those of net.Listen's are %v", got, want)
	}
}

// That a dialer's Control has connected already changes nothing of what the dialer says.
func TestLocalDial(t *testing.T) {
	d := net.Dialer{Control: LocalDial}
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
func TestLocalDialWaits(t *testing.T) {
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
	d := net.Dialer{Control: LocalDial, Timeout: 200 * time.Millisecond}
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
