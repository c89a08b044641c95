// Package splice moves bytes between sockets through pipes, so that they do not pass
// through this process's memory. Where the system cannot, or has no files left for it,
// there are no pipes, and who wants one copies.
package splice

import "syscall"

// Least is how much there has to be for a pipe to be worth its system calls: a read and
// a write are cheaper for less.
const Least = 8 << 10

// retry calls f until no signal interrupts it. EAGAIN stays as it is, for who waits.
func retry(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err != syscall.EINTR {
			return max(n, 0), err
		}
	}
}
