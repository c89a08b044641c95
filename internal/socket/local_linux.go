package socket

import (
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

// UnpacedDial is Unpaced for a connection that is about to be made: the Control of a
// net.Dialer.
func UnpacedDial(_, address string, raw syscall.RawConn) error {
	to, err := netip.ParseAddrPort(address)
	if err == nil && to.Addr().Unmap().IsLoopback() {
		raw.Control(unpace)
	}
	return nil
}

// unpace chooses one that only reacts to loss. It is no harm if the system has it not.
func unpace(fd uintptr) {
	syscall.SetsockoptString(int(fd), syscall.IPPROTO_TCP, syscall.TCP_CONGESTION, "cubic")
}
