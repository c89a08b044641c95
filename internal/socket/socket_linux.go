package socket

import (
	"net"
	"syscall"
	"unsafe"
)

// Watched reports whether Unacked will tell of c.
func Watched(c net.Conn) bool {
	switch Unwrap(c).(type) {
	case *net.TCPConn, *net.UnixConn:
		return true // need not be asked
	}
	_, ok := Unacked(c)
	return ok
}

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

// Unread returns how many bytes have arrived and were not read, 0 if c is no socket.
func Unread(c net.Conn) int {
	var queued int32
	control(c, func(fd uintptr) {
		// tcp(7): SIOCINQ, which has the number of TIOCINQ.
		syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCINQ, uintptr(unsafe.Pointer(&queued)))
	})
	return int(queued)
}

// Spent reports that c, a socket that nobody reads from, has something to be read, has
// come to its end or was reset.
func Spent(c net.Conn) (spent bool) {
	control(c, func(fd uintptr) {
		var b [1]byte
		_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		spent = err != syscall.EAGAIN
	})
	return spent
}

// AwaitReset waits until c, whose read saw the end, takes nothing more because its peer
// reset it, or until its read deadline or Close. It reports whether it was reset, or
// came to its end in order in both directions; false at once if c is no socket.
func AwaitReset(c net.Conn) bool {
	c = Unwrap(c)
	if r, ok := c.(resetter); ok {
		return r.AwaitReset()
	}
	sc, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	return err == nil && raw.Read(isClosed) == nil
}

// Dead reports that nothing more can be sent or received on c: it was reset, or both
// directions have ended. Nobody need be reading for it to be seen.
func Dead(c net.Conn) (dead bool) {
	c = Unwrap(c)
	if r, ok := c.(resetter); ok {
		return r.WasReset()
	}
	control(c, func(fd uintptr) { dead = isClosed(fd) })
	return dead
}

// isClosed reports that nothing more can be sent or received.
func isClosed(fd uintptr) bool {
	// The first byte of tcp(7)'s TCP_INFO is the state.
	info, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO)
	return err == nil && info&0xff == tcpClose
}

// tcpClose is TCP_CLOSE of the kernel's tcp_states.h.
const tcpClose = 7

// WasReset tells, of a connection whose read saw the end and whose own sending side is
// open, that the peer reset it: what was read may not be all. The system reports a
// reset once, be it to a write, and reads see the end from then on, as after a FIN.
// If the peer sent a FIN before the reset what was read is whole, but that is only
// known until a write has failed for it; then a reset is reported too.
func WasReset(c net.Conn) bool {
	c = Unwrap(c)
	if r, ok := c.(resetter); ok {
		return r.WasReset()
	}
	reset := false
	control(c, func(fd uintptr) {
		if !isClosed(fd) {
			return
		}
		pending, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR)
		reset = err == nil && syscall.Errno(pending) != syscall.EPIPE // which is what a reset behind a FIN leaves
	})
	return reset
}

func control(c net.Conn, f func(fd uintptr)) {
	sc, ok := Unwrap(c).(syscall.Conn)
	if !ok {
		return
	}
	if raw, err := sc.SyscallConn(); err == nil {
		raw.Control(f)
	}
}
