//go:build !linux

package socket

import (
	"context"
	"net"
)

// Watched reports whether Unacked will tell of c.
func Watched(net.Conn) bool { return false }

// Unacked returns how many bytes of those written to c its peer's system has not
// acknowledged. It reports false if that is not known, as here.
func Unacked(c net.Conn) (n int, ok bool) { return 0, false }

// WasReset tells, of a connection whose read saw the end and whose own sending side is
// open, that the peer reset it, where that can be known.
func WasReset(c net.Conn) bool {
	r, ok := Unwrap(c).(resetter)
	return ok && r.WasReset()
}

// Unread returns how many bytes have arrived and were not read, where that is known.
func Unread(net.Conn) int { return 0 }

// Spent reports that c, a socket that nobody reads from, has something to be read, has
// come to its end or was reset, where that is known.
func Spent(net.Conn) bool { return false }

// Dead reports that nothing more can be sent or received on c, where that can be seen.
func Dead(c net.Conn) bool {
	r, ok := Unwrap(c).(resetter)
	return ok && r.WasReset()
}

// AwaitReset waits until a connection whose read saw the end was reset, where that can
// be waited for.
func AwaitReset(c net.Conn) bool {
	r, ok := Unwrap(c).(resetter)
	return ok && r.AwaitReset()
}

// Unpaced is for systems that pace what they send between local programs.
func Unpaced(net.Listener) {}

// LimitUnread does nothing: only of Linux is it known that the room is made for what is
// under way, and in the way here.
func LimitUnread(net.Conn, int) {}

// Listen is that of a net.ListenConfig.
func Listen(ctx context.Context, network, address string) (net.Listener, error) {
	return new(net.ListenConfig).Listen(ctx, network, address)
}
