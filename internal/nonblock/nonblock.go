//go:build unix

// Package nonblock makes system calls that never wait, on descriptors of sockets and pipes
// that do not block. No signal interrupts them; EAGAIN is returned as it is.
//
// On Linux they are raw ones, of which Go's scheduler knows nothing. A call that it knows
// of costs little, but one that moves much takes longer than the 20 µs after which the
// runtime takes the processor away from a thread that may be waiting: threads are woken
// to go on elsewhere, and this one has to find a processor when it is done. As these calls
// do nothing but work, that only makes them slower.
package nonblock

import "syscall"

// Read is read(2).
func Read(fd uintptr, p []byte) (int, error) {
	return retry(func() (int, error) { return read(fd, p) })
}

// Write is write(2).
func Write(fd uintptr, p []byte) (int, error) {
	return retry(func() (int, error) { return write(fd, p) })
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
