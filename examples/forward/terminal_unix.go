//go:build linux || darwin || freebsd

package main

import (
	"os"
	"syscall"
	"unsafe"
)

// terminalSize returns the size of a terminal in characters, 0 by 0 if it does not know,
// and whether the file is a terminal at all.
func terminalSize(f *os.File) (width, height int, ok bool) {
	var size struct{ rows, columns, x, y uint16 }
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, 0, false
	}
	errno := syscall.EBADF
	raw.Control(func(fd uintptr) {
		_, _, errno = syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&size)))
	})
	return int(size.columns), int(size.rows), errno == 0
}

// foreground reports whether the program may write to a terminal: it may not while that
// is another job's. To one that has no jobs for this program it may.
func foreground(f *os.File) bool {
	raw, err := f.SyscallConn()
	if err != nil {
		return false
	}
	var group int32
	errno := syscall.EBADF
	raw.Control(func(fd uintptr) {
		_, _, errno = syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCGPGRP, uintptr(unsafe.Pointer(&group)))
	})
	return errno != 0 || int(group) == syscall.Getpgrp()
}
