package localdial

import (
	"net/netip"
	"syscall"

	"github.com/tcprelay/relay/internal/socket"
)

// Control is that of a net.Dialer: a connection within the machine is not paced; see
// socket.Unpaced.
//
// It also connects. Within the machine a connection is there when connect(2) returns, which
// then says that it is in progress all the same, and package net, which calls it again, is
// told so. Otherwise it would wait for what has happened. The dialer must not have a local
// address, which it would bind to too late.
func Control(network, address string, raw syscall.RawConn) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil || !to.Addr().Unmap().IsLoopback() {
		return nil
	}
	var sa syscall.Sockaddr = &syscall.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	if network == "tcp4" {
		sa = &syscall.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().Unmap().As4()}
	}
	raw.Control(func(fd uintptr) {
		socket.Unpace(fd)
		syscall.Connect(int(fd), sa) // its error comes again
	})
	return nil
}
