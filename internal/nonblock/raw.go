//go:build linux && !race && !386 && !s390x

package nonblock

import (
	"syscall"
	"unsafe"
)

func recv(fd uintptr, p []byte) (int, error) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd,
		uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), syscall.MSG_DONTWAIT, 0, 0)
	return result(n, errno)
}

// sendBoth has the kernel gather a and b, of which neither is empty.
func sendBoth(fd uintptr, a, b []byte) (int, error) {
	parts := [2]syscall.Iovec{{Base: unsafe.SliceData(a)}, {Base: unsafe.SliceData(b)}}
	parts[0].SetLen(len(a))
	parts[1].SetLen(len(b))
	msg := syscall.Msghdr{Iov: &parts[0], Iovlen: 2}
	n, _, errno := syscall.RawSyscall(syscall.SYS_SENDMSG, fd,
		uintptr(unsafe.Pointer(&msg)), syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL)
	return result(n, errno)
}

func send(fd uintptr, p []byte, flags int) (int, error) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_SENDTO, fd,
		uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), uintptr(flags|syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL), 0, 0)
	return result(n, errno)
}
