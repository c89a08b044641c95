//go:build unix && (!linux || race || 386 || s390x)

package nonblock

import "syscall"

// The race detector takes what one end writes and another reads for an order of things,
// which package syscall tells it. Two architectures have these calls within another one.

func recv(fd uintptr, p []byte) (int, error) { return syscall.Read(int(fd), p) }

func sendBoth(fd uintptr, a, b []byte) (int, error) {
	n, err := send(fd, a, 0)
	if n < len(a) || err != nil {
		return n, err
	}
	m, err := send(fd, b, 0)
	if err == syscall.EAGAIN {
		err = nil // some were sent
	}
	return n + max(m, 0), err
}

func send(fd uintptr, p []byte, flags int) (int, error) {
	if flags == 0 {
		return syscall.Write(int(fd), p)
	}
	return syscall.SendmsgN(int(fd), p, nil, nil, flags)
}
