//go:build unix && (!linux || race)

package nonblock

import "syscall"

// The race detector takes what one end writes and another reads for an order of things,
// which package syscall tells it.

func read(fd uintptr, p []byte) (int, error)  { return syscall.Read(int(fd), p) }
func write(fd uintptr, p []byte) (int, error) { return syscall.Write(int(fd), p) }
