package socket

import (
	"context"
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
				return UnpacedDial(network, address, raw)
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
			if err := UnpacedDial("tcp", "192.0.2.1:80", nil); err != nil { // it touches nothing
				t.Error(err)
			}
		})
	}
}
