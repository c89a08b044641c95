package socket

import (
	"cmp"
	"context"
	"net"
	"net/netip"
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
			raw.Control(unpace)
		}
	}
}

// LocalDial is Unpaced for a connection that is about to be made: the Control of a
// net.Dialer.
//
// It also connects. Within the machine a connection is there when connect(2) returns, which
// then says that it is in progress all the same, and package net, which calls it again, is
// told so. Otherwise it would wait for what has happened. The dialer must not have a local
// address, which it would bind to too late.
func LocalDial(network, address string, raw syscall.RawConn) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil || !to.Addr().Unmap().IsLoopback() {
		return nil
	}
	var sa syscall.Sockaddr = &syscall.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	if network == "tcp4" {
		sa = &syscall.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().Unmap().As4()}
	}
	raw.Control(func(fd uintptr) {
		unpace(fd)
		syscall.Connect(int(fd), sa) // its error comes again
	})
	return nil
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

// unpace chooses one that only reacts to loss. It is no harm if the system has it not.
func unpace(fd uintptr) {
	syscall.SetsockoptString(int(fd), syscall.IPPROTO_TCP, syscall.TCP_CONGESTION, "cubic")
}
