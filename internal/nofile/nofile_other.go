//go:build !unix

package nofile

// Limit returns how many files this process may have open, 0 if there is no limit.
func Limit() int { return 0 }
