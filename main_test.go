package relay_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/pprof"
	"testing"
	"time"

	"github.com/tcprelay/relay"
)

// patience bounds every wait of these tests, so that what never happens fails on a
// line of its test and not with the whole run. Nothing is asserted about how long
// things take.
const patience = time.Minute

// overDedicated has all apps of these tests take their clients over connections of their
// own. TestOverDedicated runs the suite once more with it.
var overDedicated = os.Getenv("RELAY_TEST_DEDICATED") != ""

// ofSessions skips a test that is about what dedicated connections are without: the
// session's frames, windows and pings, or that an app opens one connection and no other.
func ofSessions(t *testing.T) {
	t.Helper()
	if overDedicated {
		t.Skip("about the session's own connection")
	}
}

// signUp is relay.Register, for clients to be carried as overDedicated says.
func signUp(ctx context.Context, addr string, opts ...relay.RegisterOption) (*relay.Listener, error) {
	if overDedicated {
		opts = append([]relay.RegisterOption{relay.WithDedicated(2)}, opts...)
	}
	return relay.Register(ctx, addr, opts...)
}

// TestMain fails the run if goroutines are left when all tests are over.
func TestMain(m *testing.M) {
	before := runtime.NumGoroutine()
	code := m.Run()
	if !poll(func() bool { return runtime.NumGoroutine() <= before }) {
		fmt.Fprintf(os.Stderr, "%d goroutines left of %d that ran when the tests were over:\n\n",
			runtime.NumGoroutine()-before, runtime.NumGoroutine())
		pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
		code = max(code, 1)
	}
	os.Exit(code)
}

// poll waits for what no event tells, such as the end of a goroutine that nobody
// waits for, and reports whether it came.
func poll(is func() bool) bool {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	giveUp := time.After(patience)
	for !is() {
		select {
		case <-tick.C:
		case <-giveUp:
			return is()
		}
	}
	return true
}

// eventually fails the test if what is awaited never comes.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	if !poll(is) {
		t.Fatalf("never: %s\n\n%s", what, stacks())
	}
}

// within fails the test if nothing comes from c.
func within[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("never: %s\n\n%s", what, stacks())
		panic("not reached")
	}
}

func stacks() []byte {
	var b bytes.Buffer
	pprof.Lookup("goroutine").WriteTo(&b, 1)
	return b.Bytes()
}

// openFiles counts the process's file descriptors, sockets included. It returns 0
// where the system does not say.
func openFiles() int {
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	return len(names)
}

// nothingLeft returns a function that fails the test unless goroutines and open
// files are back to what they were.
func nothingLeft(t testing.TB) (check func()) {
	t.Helper()
	if ln, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		ln.Close() // the first one has the runtime open files of its own, for polling
	}
	goroutines, files := runtime.NumGoroutine(), openFiles()
	if overDedicated {
		goroutines, files = goroutines+4, files+8 // of two apps' spare connections, which come and go
	}
	return func() {
		t.Helper()
		if !poll(func() bool { return runtime.NumGoroutine() <= goroutines && openFiles() <= files }) {
			t.Errorf("%d goroutines and %d files where there were %d and %d\n\n%s",
				runtime.NumGoroutine(), openFiles(), goroutines, files, stacks())
		}
	}
}
