package pump

import (
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/tcptest"
)

func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// Bulk takes a pipe, an idle pump has none, and the last one leaves none behind.
func TestPipes(t *testing.T) {
	const conns = 2 * sparePipes
	type line struct {
		client, server *net.TCPConn
		done           <-chan outcome
	}
	var lines []line
	var idle int
	for range conns {
		client, src := tcptest.Pair(t)
		dst, server := tcptest.Pair(t)
		lines = append(lines, line{client, server, nil})
		lines[len(lines)-1].done = start(dst, src, new(Meter), nil)
	}
	idle = openFiles(t)
	for _, l := range lines {
		go l.client.Write(make([]byte, 4<<20))
	}
	spliced := false
	for _, l := range lines {
		if _, err := io.CopyN(io.Discard, l.server, 4<<20); err != nil {
			t.Fatal(err)
		}
		spliced = spliced || openFiles(t) > idle
	}
	if !spliced {
		t.Error("nobody took a pipe: is anything spliced?")
	}
	for end := time.Now().Add(time.Minute); openFiles(t) > idle+2*sparePipes; {
		if time.Now().After(end) {
			t.Fatalf("%d files, and %d when all were idle", openFiles(t), idle)
		}
		time.Sleep(time.Millisecond)
	}
	for _, l := range lines {
		l.client.CloseWrite()
		if o := <-l.done; o.rerr != nil || o.werr != nil || o.n != 4<<20 {
			t.Error(o)
		}
	}
	if n := openFiles(t); n > idle {
		t.Errorf("%d files after the last pump, %d before any bulk", n, idle)
	}
}

// What moves bytes allocates nothing.
func TestAllocs(t *testing.T) {
	client, src := tcptest.Pair(t)
	dst, server := tcptest.Pair(t)
	start(dst, src, new(Meter), nil)
	for _, size := range []int{64, 1 << 20} {
		b, got := make([]byte, size), make([]byte, size)
		if n := testing.AllocsPerRun(200, func() {
			go client.Write(b)
			io.ReadFull(server, got)
		}); n >= 3 { // of go
			t.Errorf("%d bytes: %v allocations", size, n)
		}
	}
}

// Destinations that take nothing hold so many pipes, and what has none is copied.
func TestMaxPipes(t *testing.T) {
	defer func(most func() int) { maxPipes = most }(maxPipes)
	maxPipes = func() int { return 2 }
	type line struct {
		server *net.TCPConn
		done   <-chan outcome
	}
	var lines []line
	before := openFiles(t)
	for range 6 {
		client, src := tcptest.Pair(t)
		dst, server := tcptest.Pair(t)
		l := line{server, start(dst, src, new(Meter), nil)}
		go func() {
			client.Write(make([]byte, 32<<20)) // more than the way holds
			client.CloseWrite()
		}()
		lines = append(lines, l)
	}
	sockets := 6 * 4
	for _, l := range lines {
		if _, err := io.CopyN(io.Discard, l.server, 24<<20); err != nil {
			t.Fatal(err)
		}
		if n := openFiles(t) - before - sockets; n > 2*2 {
			t.Errorf("%d files for pipes", n)
		}
	}
	for _, l := range lines {
		if _, err := io.CopyN(io.Discard, l.server, 8<<20); err != nil {
			t.Fatal(err)
		}
		if o := <-l.done; o.rerr != nil || o.werr != nil || o.n != 32<<20 {
			t.Error(o)
		}
	}
	pipes.mu.Lock()
	defer pipes.mu.Unlock()
	if pipes.pipes != 0 || pipes.pumps != 0 || pipes.empty != nil {
		t.Errorf("left are %d pipes of %d pumps", pipes.pipes, pipes.pumps)
	}
}
