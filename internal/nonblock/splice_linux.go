package nonblock

import "syscall"

// Splice is splice(2) between a socket and a pipe, of up to n bytes.
func Splice(from, to uintptr, n int) (int, error) {
	const move, nonblock = 1, 2 // SPLICE_F_MOVE and SPLICE_F_NONBLOCK of fcntl.h
	return retry(func() (int, error) {
		n, _, errno := syscall.RawSyscall6(syscall.SYS_SPLICE, from, 0, to, 0, uintptr(n), move|nonblock)
		return result(n, errno)
	})
}

// SendMore is send(2) of the beginning of something whose rest is about to follow.
func SendMore(socket uintptr, p []byte) (int, error) {
	return retry(func() (int, error) {
		return syscall.SendmsgN(int(socket), p, nil, nil, syscall.MSG_MORE|syscall.MSG_NOSIGNAL)
	})
}

func result(n uintptr, errno syscall.Errno) (int, error) {
	switch errno {
	case 0:
		return int(n), nil
	case syscall.EAGAIN:
		return 0, syscall.EAGAIN // of a constant no error is made each time
	}
	return 0, errno
}
