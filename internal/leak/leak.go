// Package leak has the tests of a package fail if goroutines outlive them.
package leak

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

// Main is for a TestMain: it runs the tests and exits, with a failure if a goroutine of
// this module's outlives them.
func Main(m *testing.M) {
	code := m.Run()
	if left := await(); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "%d goroutines outlived the tests:\n\n%s\n", len(left), strings.Join(left, "\n\n"))
		code = max(code, 1)
	}
	os.Exit(code)
}

// await returns the stacks of the goroutines that do not end in a while.
func await() (left []string) {
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		left = left[:0]
		for i, stack := range Stacks() {
			if i > 0 && strings.Contains(stack, "tcprelay/relay") {
				left = append(left, stack)
			}
		}
		if len(left) == 0 || time.Now().After(end) {
			return left
		}
	}
}

// Stacks returns the stack of every goroutine, the caller's first.
func Stacks() []string {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			return strings.Split(string(bytes.TrimSpace(buf[:n])), "\n\n")
		}
		buf = make([]byte, 2*len(buf))
	}
}
