//go:build unix && (!linux || race || 386 || s390x)

package nonblock

import "syscall"

// The race detector takes what one end writes and another reads for an order of things,
// which package syscall tells it. Two architectures have these calls within another one.

func recv(fd uintptr, p []byte) (int, error) { return syscall.Read(int(fd), p) }

func send(fd uintptr, p []byte, flags int) (int, error) {
	if flags == 0 {
		return syscall.Write(int(fd), p)
	}
	return syscall.SendmsgN(int(fd), p, nil, nil, flags)
}
