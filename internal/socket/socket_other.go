//go:build !linux

package socket

import "net"

// Unacked returns how many bytes of those written to c its peer's system has not
// acknowledged. It reports false if that is not known, as here.
func Unacked(c net.Conn) (n int, ok bool) { return 0, false }

// WasReset tells, of a connection whose read saw the end and whose own sending side is
// open, that the peer reset it, where that can be known.
func WasReset(c net.Conn) bool {
	r, ok := unwrap(c).(resetter)
	return ok && r.WasReset()
}
