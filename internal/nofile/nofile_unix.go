//go:build unix

package nofile

import "syscall"

// Limit returns how many files this process may have open, 0 if there is no limit.
func Limit() int {
	var r syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r) != nil || uint64(r.Cur) > 1<<30 {
		return 0
	}
	return int(r.Cur)
}
