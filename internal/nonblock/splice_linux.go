package nonblock

import "syscall"

// Splice is splice(2) between a socket and a pipe that does not block, of up to n bytes. A
// socket may have been set to block by somebody who has its file; then this call may.
func Splice(from, to uintptr, n int) (int, error) {
	return retry(func() (int, error) {
		const move, nonblock = 1, 2 // SPLICE_F_MOVE and SPLICE_F_NONBLOCK of fcntl.h
		if blocks(from) || blocks(to) {
			n, err := syscall.Splice(int(from), nil, int(to), nil, n, move|nonblock)
			return int(n), err
		}
		moved, _, errno := syscall.RawSyscall6(syscall.SYS_SPLICE, from, 0, to, 0, uintptr(n), move|nonblock)
		return result(moved, errno)
	})
}

func blocks(fd uintptr) bool {
	flags, _, errno := syscall.RawSyscall(syscall.SYS_FCNTL, fd, syscall.F_GETFL, 0)
	return errno == 0 && flags&syscall.O_NONBLOCK == 0
}

// SendMore is Send of the beginning of something whose rest is about to follow.
func SendMore(socket uintptr, p []byte) (int, error) {
	return retry(func() (int, error) { return send(socket, p, syscall.MSG_MORE) })
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
