//go:build unix

// Package nonblock makes system calls on sockets that never wait. No signal interrupts
// them; EAGAIN is returned as it is.
//
// On Linux they are raw ones, of which Go's scheduler knows nothing. A call that it knows
// of costs little, but one that moves much takes longer than the 20 µs after which the
// runtime takes the processor away from a thread that may be waiting: threads are woken
// to go on elsewhere, and this one has to find a processor when it is done. As these calls
// do nothing but work, that only makes them slower.
package nonblock

import "syscall"

// Recv reads from a socket.
func Recv(socket uintptr, p []byte) (int, error) {
	return retry(func() (int, error) { return recv(socket, p) })
}

// Send writes to a socket.
func Send(socket uintptr, p []byte) (int, error) {
	return retry(func() (int, error) { return send(socket, p, 0) })
}

// SendBoth is Send of a and then b, of which neither is empty.
func SendBoth(socket uintptr, a, b []byte) (int, error) {
	return retry(func() (int, error) { return sendBoth(socket, a, b) })
}

// retry calls f until no signal interrupts it.
func retry(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err != syscall.EINTR {
			return max(n, 0), err
		}
	}
}
