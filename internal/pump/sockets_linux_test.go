package pump

import (
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/tcprelay/relay/internal/tcptest"
)

// Bulk takes a pipe, an idle pump has none, and the last one leaves none behind.
func TestPipes(t *testing.T) {
	const conns = 32
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
	idle = tcptest.OpenFiles(t)
	for _, l := range lines {
		go l.client.Write(make([]byte, 4<<20))
	}
	spliced := false
	for _, l := range lines {
		if _, err := io.CopyN(io.Discard, l.server, 4<<20); err != nil {
			t.Fatal(err)
		}
		spliced = spliced || tcptest.OpenFiles(t) > idle
	}
	if !spliced {
		t.Error("nobody took a pipe: is anything spliced?")
	}
	for end := time.Now().Add(time.Minute); tcptest.OpenFiles(t) > idle+conns; {
		if time.Now().After(end) {
			t.Fatalf("%d files, and %d when all were idle", tcptest.OpenFiles(t), idle)
		}
		time.Sleep(time.Millisecond)
	}
	for _, l := range lines {
		l.client.CloseWrite()
		if o := <-l.done; o.rerr != nil || o.werr != nil || o.n != 4<<20 {
			t.Error(o)
		}
	}
	if n := tcptest.OpenFiles(t); n > idle {
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

// Without files for pipes all is copied.
func TestOutOfPipes(t *testing.T) {
	type line struct {
		client, server *net.TCPConn
		done           <-chan outcome
	}
	var lines []line
	for range 6 {
		client, src := tcptest.Pair(t)
		dst, server := tcptest.Pair(t)
		lines = append(lines, line{client, server, start(dst, src, new(Meter), nil)})
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	before := limit.Cur
	limit.Cur = 3 // no file can be opened any more
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	defer func() {
		limit.Cur = before
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			t.Error(err)
		}
	}()
	for _, l := range lines {
		go func() {
			l.client.Write(make([]byte, 32<<20)) // more than the way holds
			l.client.CloseWrite()
		}()
	}
	for _, l := range lines {
		if _, err := io.CopyN(io.Discard, l.server, 32<<20); err != nil {
			t.Fatal(err)
		}
		if o := <-l.done; o.rerr != nil || o.werr != nil || o.n != 32<<20 {
			t.Error(o)
		}
	}
}
