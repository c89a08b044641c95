package splice

import (
	"bytes"
	"io"
	"syscall"
	"testing"

	"github.com/tcprelay/relay/internal/tcptest"
)

// withRaw calls f with the descriptor of a socket.
func withRaw(t *testing.T, c syscall.Conn, f func(fd uintptr)) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(f); err != nil {
		t.Fatal(err)
	}
}

// Bytes go through a pipe in order, by a socket at either end or by a read, and it knows
// how many it holds.
func TestPipe(t *testing.T) {
	Enter()
	defer Leave()
	client, src := tcptest.Pair(t)
	dst, server := tcptest.Pair(t)
	p := Get()
	withRaw(t, src, func(fd uintptr) {
		if n, err := p.Fill(fd, 100); n != 0 || err != syscall.EAGAIN {
			t.Errorf("of an idle socket: %d, %v", n, err)
		}
	})
	client.Write([]byte("0123456789"))
	withRaw(t, src, func(fd uintptr) {
		if n, err := p.Fill(fd, 8); n != 8 || err != nil || p.Held() != 8 {
			t.Errorf("%d, %v, and it holds %d", n, err, p.Held())
		}
	})
	b := make([]byte, 3)
	if n, err := p.Read(b); n != 3 || err != nil || string(b) != "012" || p.Held() != 5 {
		t.Errorf("%q, %v, and it holds %d", b[:n], err, p.Held())
	}
	withRaw(t, dst, func(fd uintptr) {
		if n, err := p.Drain(fd); n != 5 || err != nil || p.Held() != 0 {
			t.Errorf("%d, %v, and it holds %d", n, err, p.Held())
		}
	})
	client.CloseWrite()
	withRaw(t, src, func(fd uintptr) {
		if n, err := p.Fill(fd, 8); n != 2 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		if n, err := p.Fill(fd, 8); n != 0 || err != nil {
			t.Errorf("at the end: %d, %v", n, err)
		}
	})
	withRaw(t, dst, func(fd uintptr) { p.Drain(fd) })
	if p.resize(1 << 31) { // of which no pipe is
		t.Error("a pipe that holds 2 GiB")
	}
	p.Put()
	dst.CloseWrite()
	if got, err := io.ReadAll(server); string(got) != "3456789" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// A socket that is full takes what it has room for, and what it does not take stays.
func TestDrainFull(t *testing.T) {
	Enter()
	defer Leave()
	client, src := tcptest.Pair(t)
	dst, server := tcptest.Pair(t)
	dst.SetWriteBuffer(4 << 10)
	sent := bytes.Repeat([]byte("relay"), 4<<20/5)
	go func() {
		client.Write(sent)
		client.CloseWrite()
	}()
	var got bytes.Buffer
	buf := make([]byte, 64<<10)
	full := false
	for end := false; !end; {
		p := Get()
		raw, err := src.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Read(func(fd uintptr) bool {
			n, err := p.Fill(fd, Size)
			if err != nil && err != syscall.EAGAIN {
				t.Error(err)
			}
			end = n == 0 && err == nil
			return err != syscall.EAGAIN
		})
		for p.Held() > 0 {
			before, n := p.Held(), 0
			withRaw(t, dst, func(fd uintptr) { n, err = p.Drain(fd) })
			if err != nil || p.Held() != before-n {
				t.Fatalf("%d of %d bytes, %v, and it holds %d", n, before, err, p.Held())
			}
			full = full || n < before
			for n > 0 {
				m, err := server.Read(buf[:min(n, len(buf))])
				if err != nil {
					t.Fatal(err)
				}
				got.Write(buf[:m])
				n -= m
			}
		}
		p.Put()
	}
	if !full {
		t.Error("the socket was never full")
	}
	if !bytes.Equal(got.Bytes(), sent) {
		t.Errorf("%d bytes came that are not the %d sent", got.Len(), len(sent))
	}
}

// There are no more pipes than there may be; those that are put back are used again,
// unless they hold something, and the last who leaves leaves none behind.
func TestStore(t *testing.T) {
	defer func(f func() int) { most = f }(most)
	most = func() int { return spares + 2 }
	before := tcptest.OpenFiles(t)
	Enter()
	Enter()
	var pipes []*Pipe
	for range spares + 2 {
		pipes = append(pipes, Get())
	}
	if Get() != nil {
		t.Error("one more than there may be")
	}
	if n := tcptest.OpenFiles(t) - before; n != 2*(spares+2) {
		t.Errorf("%d files for %d pipes", n, spares+2)
	}
	syscall.Write(int(pipes[0].w), []byte("x"))
	pipes[0].held = 1
	for _, p := range pipes[:spares] {
		p.Put()
	}
	if n := tcptest.OpenFiles(t) - before; n != 2*(spares+1) {
		t.Errorf("%d files after one was put back that holds something", n)
	}
	if p := Get(); p == pipes[0] || p.Held() != 0 {
		t.Errorf("a pipe that holds %d", p.Held())
	} else {
		p.Put()
	}
	Leave()
	if n := tcptest.OpenFiles(t) - before; n != 2*(spares+1) {
		t.Errorf("%d files with one user left", n)
	}
	Leave()
	if n := tcptest.OpenFiles(t) - before; n != 2*2 {
		t.Errorf("%d files when all have left, and two pipes are out", n)
	}
	pipes[spares].Put()
	pipes[spares+1].Put()
	if n := tcptest.OpenFiles(t) - before; n != 0 || store.pipes != 0 {
		t.Errorf("%d files and %d pipes at the end", n, store.pipes)
	}
}
