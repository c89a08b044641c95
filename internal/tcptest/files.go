//go:build unix

package tcptest

import (
	"os"
	"testing"
)

// OpenFiles returns how many files this process has open.
func OpenFiles(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/dev/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}
