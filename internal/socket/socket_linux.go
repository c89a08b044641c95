package socket

import (
	"net"
	"syscall"
	"unsafe"
)

// Unacked returns how many bytes of those written to c its peer's system has not
// acknowledged: whether a slow peer takes any, which a write that waits does not tell.
// It reports false if c is no socket.
func Unacked(c net.Conn) (n int, ok bool) {
	var queued int32
	control(c, func(fd uintptr) {
		// tcp(7): SIOCOUTQ, which has the number of TIOCOUTQ.
		_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCOUTQ, uintptr(unsafe.Pointer(&queued)))
		ok = errno == 0
	})
	return int(queued), ok
}

// tcpClose is TCP_CLOSE of the kernel's tcp_states.h.
const tcpClose = 7

// WasReset tells, of a connection whose read saw the end and whose own sending side is
// open, that the peer reset it: what was read may not be all. The system reports a
// reset once, be it to a write, and reads see the end from then on, as after a FIN.
// If the peer sent a FIN before the reset what was read is whole, but that is only
// known until a write has failed for it; then a reset is reported too.
func WasReset(c net.Conn) bool {
	c = unwrap(c)
	if r, ok := c.(resetter); ok {
		return r.WasReset()
	}
	reset := false
	control(c, func(fd uintptr) {
		// The first byte of tcp(7)'s TCP_INFO is the state.
		info, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO)
		if err != nil || info&0xff != tcpClose {
			return
		}
		pending, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR)
		reset = err == nil && syscall.Errno(pending) != syscall.EPIPE // which is what a reset behind a FIN leaves
	})
	return reset
}

func control(c net.Conn, f func(fd uintptr)) {
	sc, ok := unwrap(c).(syscall.Conn)
	if !ok {
		return
	}
	if raw, err := sc.SyscallConn(); err == nil {
		raw.Control(f)
	}
}
