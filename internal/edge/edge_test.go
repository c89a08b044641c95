package edge

import (
	"bytes"
	"errors"
	"net"
	"os"
	"testing"
	"testing/synctest"
)

// A fake is a connection that takes so many bytes, and whose Close waits for a word.
type fake struct {
	net.Conn
	room   int
	writes []int
	linger []int
	halves int
	free   chan struct{}
}

func (f *fake) Write(p []byte) (int, error) {
	f.writes = append(f.writes, len(p))
	n := min(len(p), f.room)
	f.room -= n
	if n < len(p) {
		return n, os.ErrDeadlineExceeded
	}
	return n, nil
}

func (f *fake) Close() error {
	<-f.free
	return nil
}

// A wholeFake has what a *net.TCPConn has.
type wholeFake struct{ *fake }

func (f wholeFake) CloseWrite() error       { f.halves++; return nil }
func (f wholeFake) SetLinger(sec int) error { f.linger = append(f.linger, sec); return nil }

func TestWhole(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	tcp, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	if c, gone := Whole(tcp); c != tcp || gone != nil {
		t.Error("a TCP connection is not what it was")
	}

	f := &fake{room: 100, free: make(chan struct{})}
	c, _ := Whole(wholeFake{f})
	if err := errors.Join(c.CloseWrite(), c.SetLinger(0)); err != nil || f.halves != 1 || len(f.linger) != 1 || f.linger[0] != 0 {
		t.Errorf("%v; %d half-closes, linger %v", err, f.halves, f.linger)
	}
	plain, _ := Whole(f) // which has neither, and is none the worse for it
	if err := errors.Join(plain.CloseWrite(), plain.SetLinger(0)); err != nil {
		t.Error(err)
	}
	if n := c.(interface{ NetConn() net.Conn }).NetConn(); n != net.Conn(wholeFake{f}) {
		t.Errorf("below it is %v", n)
	}
}

// Close waits for nothing, and tells when the connection's own has returned.
func TestWholeClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{room: 100, free: make(chan struct{})}
		c, gone := Whole(f)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		for name, err := range map[string]error{"Close": c.Close(), "CloseWrite": c.CloseWrite()} {
			if err != net.ErrClosed {
				t.Errorf("%s once it is closed: %v", name, err)
			}
		}
		if n, err := c.Write([]byte("x")); n != 0 || err != net.ErrClosed || len(f.writes) > 0 {
			t.Errorf("Write once it is closed: %d, %v, %v", n, err, f.writes)
		}
		synctest.Wait()
		select {
		case <-gone:
			t.Error("it is gone before its Close has returned")
		default:
		}
		close(f.free)
		<-gone
	})
}

func TestGauge(t *testing.T) {
	for _, tt := range []struct {
		watched bool
		writes  []int
	}{
		{true, []int{10_000}},
		{false, []int{4096, 4096, 10_000 - 2*4096}},
	} {
		f := &fake{room: 15_000}
		c, _ := Whole(f)
		g := NewGauge(c, tt.watched)
		p := bytes.Repeat([]byte("x"), 10_000)
		if n, err := g.Write(p); n != len(p) || err != nil || g.Took() != 10_000 {
			t.Errorf("%d, %v; took %d", n, err, g.Took())
		}
		if len(f.writes) != len(tt.writes) || f.writes[0] != tt.writes[0] || f.writes[len(f.writes)-1] != tt.writes[len(tt.writes)-1] {
			t.Errorf("written in %v, want %v", f.writes, tt.writes)
		}
		// What was taken of a write that failed counts.
		if n, err := g.Write(p); n != 5000 || !errors.Is(err, os.ErrDeadlineExceeded) || g.Took() != 15_000 {
			t.Errorf("%d, %v; took %d", n, err, g.Took())
		}
	}
}
