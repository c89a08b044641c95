//go:build linux || darwin

package socket

import (
	"net"
	"runtime"
	"syscall"
)

// LimitUnsent has the system take no more of what is written to c than n bytes beyond
// what it can send, where it can do that: what is written next should not wait behind
// megabytes. 0 is what the system does by itself. It does nothing to a connection that is no
// socket.
func LimitUnsent(c net.Conn, n int) {
	sc, ok := Unwrap(c).(*net.TCPConn)
	if !ok {
		return
	}
	option := 25 // TCP_NOTSENT_LOWAT of Linux, tcp(7)
	if runtime.GOOS == "darwin" {
		option = 0x201 // of netinet/tcp.h
	}
	if raw, err := sc.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, option, n) })
	}
}
