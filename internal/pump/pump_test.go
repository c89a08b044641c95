package pump

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/tcprelay/relay/internal/tcptest"
)

// layered hides that a connection is a socket.
type layered struct{ net.Conn }

// A kind is a way for the two connections of a pump to be.
var kinds = []struct {
	name string
	wrap func(net.Conn) net.Conn
}{
	{"sockets", func(c net.Conn) net.Conn { return c }},
	{"others", func(c net.Conn) net.Conn { return layered{c} }},
}

func each(t *testing.T, f func(t *testing.T, client *net.TCPConn, src, dst net.Conn, server *net.TCPConn)) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			client, src := tcptest.Pair(t)
			dst, server := tcptest.Pair(t)
			f(t, client, k.wrap(src), k.wrap(dst), server)
		})
	}
}

type outcome struct {
	n          int64
	rerr, werr error
}

func start(dst io.Writer, src io.Reader, m *Meter, tap func([]byte) bool) <-chan outcome {
	c := make(chan outcome, 1)
	go func() {
		n, rerr, werr := Copy(dst, src, m, tap)
		c <- outcome{n, rerr, werr}
	}()
	return c
}

// Messages, bulk and messages again: each way of moving bytes, and the changes between.
func TestCopy(t *testing.T) {
	each(t, func(t *testing.T, client *net.TCPConn, src, dst net.Conn, server *net.TCPConn) {
		var m Meter
		done := start(dst, src, &m, nil)
		var want int64
		for _, size := range []int{1, 64, waitSize, bulkSize, bulkSize + 1, 5 << 20, 1, 300 << 10, 1} {
			b := make([]byte, size)
			rand.Read(b)
			go client.Write(b)
			got := make([]byte, size)
			if _, err := io.ReadFull(server, got); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, b) {
				t.Fatalf("%d bytes came out as others", size)
			}
			want += int64(size)
		}
		client.CloseWrite()
		if o := <-done; o.n != want || o.rerr != nil || o.werr != nil || m.Moved.Load() != want || m.InHand.Load() != 0 {
			t.Errorf("copied %d of %d, %v, %v; meter: %d moved, %d in hand", o.n, want, o.rerr, o.werr, m.Moved.Load(), m.InHand.Load())
		}
	})
}

func TestTap(t *testing.T) {
	each(t, func(t *testing.T, client *net.TCPConn, src, dst net.Conn, server *net.TCPConn) {
		var seen []byte
		var m Meter
		done := start(dst, src, &m, func(p []byte) bool {
			seen = append(seen, p...)
			return len(seen) < 1<<20
		})
		b := make([]byte, 3<<20)
		rand.Read(b)
		go func() {
			client.Write(b)
			client.CloseWrite()
		}()
		got := make([]byte, len(b))
		if _, err := io.ReadFull(server, got); err != nil || !bytes.Equal(got, b) {
			t.Fatalf("%v, or other bytes", err)
		}
		if o := <-done; o.rerr != nil || o.werr != nil {
			t.Fatal(o)
		}
		if len(seen) < 1<<20 || len(seen) > 1<<20+bulkSize || !bytes.Equal(seen, b[:len(seen)]) {
			t.Errorf("the tap saw %d bytes", len(seen))
		}
	})
}

// A destination that takes nothing: it shows in the meter, and a deadline ends it.
func TestStuck(t *testing.T) {
	each(t, func(t *testing.T, client *net.TCPConn, src, dst net.Conn, server *net.TCPConn) {
		var m Meter
		done := start(dst, src, &m, nil)
		go func() {
			b := make([]byte, 1<<20)
			for {
				if _, err := client.Write(b); err != nil {
					return
				}
			}
		}()
		for end := time.Now().Add(time.Minute); m.Moved.Load() == 0 || m.InHand.Load() == 0; runtime.Gosched() {
			if time.Now().After(end) {
				t.Fatal("nothing in hand")
			}
		}
		dst.SetWriteDeadline(time.Unix(1, 0))
		if o := <-done; !errors.Is(o.werr, os.ErrDeadlineExceeded) || o.rerr != nil || o.n != m.Moved.Load() || m.InHand.Load() != 0 {
			t.Error(o)
		}
	})
}

func TestErrors(t *testing.T) {
	each(t, func(t *testing.T, client *net.TCPConn, src, dst net.Conn, server *net.TCPConn) {
		done := start(dst, src, new(Meter), nil)
		client.SetLinger(0)
		client.Close()
		if o := <-done; !errors.Is(o.rerr, syscall.ECONNRESET) {
			t.Errorf("of a reset source: %v", o.rerr)
		}
	})
	each(t, func(t *testing.T, client *net.TCPConn, src, dst net.Conn, server *net.TCPConn) {
		done := start(dst, src, new(Meter), nil)
		src.SetReadDeadline(time.Unix(1, 0))
		if o := <-done; !errors.Is(o.rerr, os.ErrDeadlineExceeded) {
			t.Errorf("of a read deadline: %v", o.rerr)
		}
	})
	each(t, func(t *testing.T, client *net.TCPConn, src, dst net.Conn, server *net.TCPConn) {
		done := start(dst, src, new(Meter), nil)
		src.Close()
		if o := <-done; !errors.Is(o.rerr, net.ErrClosed) {
			t.Errorf("of a closed source: %v", o.rerr)
		}
	})
	each(t, func(t *testing.T, client *net.TCPConn, src, dst net.Conn, server *net.TCPConn) {
		done := start(dst, src, new(Meter), nil)
		server.SetLinger(0)
		server.Close()
		go func() {
			b := make([]byte, 64<<10)
			for {
				if _, err := client.Write(b); err != nil {
					return
				}
			}
		}()
		if o := <-done; !errors.Is(o.werr, syscall.ECONNRESET) && !errors.Is(o.werr, syscall.EPIPE) {
			t.Errorf("of a reset destination: %v", o.werr)
		}
		client.Close()
	})
	if _, rerr, werr := Copy(io.Discard, iotest.ErrReader(io.ErrUnexpectedEOF), new(Meter), nil); rerr != io.ErrUnexpectedEOF || werr != nil {
		t.Error(rerr, werr)
	}
}
