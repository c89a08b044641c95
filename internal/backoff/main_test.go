package backoff

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// patience bounds the wait for goroutines to end. Nothing is asserted about how long
// things take.
const patience = 15 * time.Second

// TestMain fails the run if a goroutine outlives all tests.
func TestMain(m *testing.M) {
	code := m.Run()
	if left := awaitNoGoroutines(); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "%d goroutines outlived the tests:\n\n%s\n", len(left), strings.Join(left, "\n\n"))
		code = max(code, 1)
	}
	os.Exit(code)
}

// awaitNoGoroutines returns the stacks of the goroutines that run code of this
// package and do not end in a while. The one that calls it does not count.
func awaitNoGoroutines() (left []string) {
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		left = left[:0]
		for i, stack := range stacks() {
			if i > 0 && strings.Contains(stack, "relay/internal/backoff") {
				left = append(left, stack)
			}
		}
		if len(left) == 0 || time.Now().After(end) {
			return left
		}
	}
}

// stacks returns the stack of every goroutine, the caller's first.
func stacks() []string {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			return strings.Split(string(bytes.TrimSpace(buf[:n])), "\n\n")
		}
		buf = make([]byte, 2*len(buf))
	}
}
