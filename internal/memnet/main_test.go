package memnet

import (
	"strings"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/leak"
)

// patience bounds the waits of tests, so that what never happens fails on a line of
// its own. Nothing is asserted about how long things take in real time.
const patience = time.Minute

func TestMain(m *testing.M) { leak.Main(m) }

// await returns what comes from ch, or fails the test.
func await[T any](t testing.TB, ch <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		t.Fatalf("no %s; goroutines:\n\n%s", what, strings.Join(leak.Stacks(), "\n\n"))
		panic("unreachable")
	}
}
