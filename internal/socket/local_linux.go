package socket

import (
	"cmp"
	"context"
	"net"
	"syscall"
)

// Unpaced has the system send at once on the connections that ln accepts, if they can only
// come from this machine.
//
// Congestion control that measures a path and sends at the rate that it found, as BBR
// does, sets a timer for nearly every packet. Between two programs on one machine that
// takes more time than carrying the bytes, and there is nothing that could be congested. A
// connection that was made with such a timer keeps it, so this has to be done before.
func Unpaced(ln net.Listener) {
	if tcp, ok := ln.(*net.TCPListener); ok && tcp.Addr().(*net.TCPAddr).IP.IsLoopback() {
		if raw, err := tcp.SyscallConn(); err == nil {
			raw.Control(Unpace)
		}
	}
}

// LimitUnread has the system take no more than n bytes or so that c has not read, if its
// peer is on this machine. Those of other machines may be long under way, and there has to
// be room for all that are. Here the room is only where bytes wait, and make those behind
// them wait.
func LimitUnread(c net.Conn, n int) {
	tcp, ok := Unwrap(c).(*net.TCPConn)
	if !ok {
		return
	}
	if peer, ok := tcp.RemoteAddr().(*net.TCPAddr); ok && peer.IP.IsLoopback() {
		tcp.SetReadBuffer(n)
	}
}

// Listen is that of a net.ListenConfig. Its connections have the keep-alive that package
// net gives them from the listening socket, where that can be, and not by four system calls
// for each.
func Listen(ctx context.Context, network, address string) (net.Listener, error) {
	var cannot error // as with Multipath TCP before Linux 6.10
	inherited := net.ListenConfig{KeepAlive: -1, Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) {
			for _, o := range [...]struct{ level, name, value int }{
				{syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1},
				{syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, 15}, // seconds
				{syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL, 15},
				{syscall.IPPROTO_TCP, syscall.TCP_KEEPCNT, 9},
			} {
				cannot = cmp.Or(cannot, syscall.SetsockoptInt(int(fd), o.level, o.name, o.value))
			}
		})
	}}
	ln, err := inherited.Listen(ctx, network, address)
	if cannot != nil {
		if err == nil {
			ln.Close()
		}
		return new(net.ListenConfig).Listen(ctx, network, address)
	}
	return ln, err
}

// Unpace is Unpaced for a socket that is about to be connected. It is no harm if the system
// has no congestion control that only reacts to loss.
func Unpace(fd uintptr) {
	syscall.SetsockoptString(int(fd), syscall.IPPROTO_TCP, syscall.TCP_CONGESTION, "cubic")
}
