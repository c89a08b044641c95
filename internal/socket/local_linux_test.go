package socket

import (
	"net"
	"syscall"
	"testing"
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

// Connections that are accepted within the machine are not paced, whatever its default is.
// Others are left alone.
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
			_, port, _ := net.SplitHostPort(ln.Addr().String())
			dialled, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", port))
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
		})
	}
}

// The system holds little that was not read of a peer on this machine, and of others what
// it would.
func TestLimitUnread(t *testing.T) {
	const limit = 50_000
	hosts := []string{"127.0.0.1", "[::1]"}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs { // through loopback too, but for all that can be told another's
		if ip := a.(*net.IPNet).IP.To4(); ip != nil && !ip.IsLoopback() {
			hosts = append(hosts, ip.String())
			break
		}
	}
	for _, host := range hosts {
		ln, err := net.Listen("tcp", host+":0")
		if err != nil {
			t.Logf("not tried: %v", err)
			continue
		}
		defer ln.Close()
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		room := func() (n int) {
			control(c, func(fd uintptr) {
				if n, err = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF); err != nil {
					t.Fatal(err)
				}
			})
			return n
		}
		want := room()
		if ln.Addr().(*net.TCPAddr).IP.IsLoopback() {
			want = 2 * limit // socket(7)
		}
		LimitUnread(layer{c}, limit)
		if got := room(); got != want {
			t.Errorf("%s: room for %d, want %d", host, got, want)
		}
	}
	p, q := net.Pipe()
	defer p.Close()
	defer q.Close()
	LimitUnread(p, 1)                // does nothing
	LimitUnread(new(net.TCPConn), 1) // whose peer is not known
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
