package link

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay/internal/memnet"
)

// pair returns the ends of a conn through l. In the bubble all that takes time is l.
func pair(t *testing.T, l *Link, wg *sync.WaitGroup) (near, far *memnet.Conn) {
	t.Helper()
	n := memnet.New()
	one := func() (a, b *memnet.Conn) {
		ln, err := n.Listen(t.Context(), "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		c, err := n.Dial(t.Context(), "tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		accepted, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return c.(*memnet.Conn), accepted.(*memnet.Conn)
	}
	near, a := one()
	b, far := one()
	wg.Go(func() { l.Carry(a, b) })
	return near, far
}

// bubble runs a test with conns through a link, in fake time.
func bubble(t *testing.T, rtt time.Duration, bitsPerSecond int, test func(t *testing.T, pair func() (near, far *memnet.Conn))) {
	synctest.Test(t, func(t *testing.T) {
		var wg sync.WaitGroup
		l := New(rtt, bitsPerSecond)
		test(t, func() (near, far *memnet.Conn) { return pair(t, l, &wg) })
		wg.Wait()
	})
}

func noise(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// within says whether a time is at most 2 ms off, and what a link catches up on.
func within(got, want time.Duration) bool {
	return got >= want-behind-2*time.Millisecond && got <= want+2*time.Millisecond
}

func TestRateAndDelay(t *testing.T) {
	for _, l := range []struct {
		rtt  time.Duration
		bits int
	}{{20 * time.Millisecond, 100e6}, {100 * time.Millisecond, 100e6}, {300 * time.Millisecond, 1e9}} {
		bubble(t, l.rtt, l.bits, func(t *testing.T, pair func() (near, far *memnet.Conn)) {
			near, far := pair()
			sent := noise(l.bits / 8 / 4)                                     // a quarter of a second of it
			for _, way := range [][2]*memnet.Conn{{near, far}, {far, near}} { // each ends the other's
				start := time.Now()
				go func() {
					way[0].Write(sent)
					way[0].CloseWrite()
				}()
				var first [1]byte
				if _, err := io.ReadFull(way[1], first[:]); err != nil {
					t.Fatal(err)
				}
				if d := time.Since(start); !within(d, l.rtt/2) || d < l.rtt/2 {
					t.Errorf("%v, %d bit/s: the first byte came after %v", l.rtt, l.bits, d)
				}
				rest, err := io.ReadAll(way[1])
				if err != nil || !bytes.Equal(append(first[:], rest...), sent) {
					t.Errorf("%v, %d bit/s: %d bytes of %d came, or others: %v", l.rtt, l.bits, 1+len(rest), len(sent), err)
				}
				if d := time.Since(start); !within(d, time.Second/4+l.rtt/2) {
					t.Errorf("%v, %d bit/s: a quarter of a second's bytes came after %v", l.rtt, l.bits, d)
				}
			}
			near.Close()
			far.Close()
		})
	}
}

// Conns share the line fairly, and a small message does not wait for long.
func TestShared(t *testing.T) {
	bubble(t, 100*time.Millisecond, 100e6, func(t *testing.T, pair func() (near, far *memnet.Conn)) {
		start := time.Now()
		var bulk sync.WaitGroup
		for range 8 {
			near, far := pair()
			bulk.Go(func() {
				far.Write(make([]byte, 12.5e6/8))
				far.Close()
			})
			bulk.Go(func() {
				defer near.Close()
				if n, err := io.Copy(io.Discard, near); n != 12.5e6/8 || err != nil {
					t.Errorf("%d bytes, %v", n, err)
				}
				if d := time.Since(start); d < 1000*time.Millisecond {
					t.Errorf("one conn of eight had its eighth of a second's bytes after %v", d)
				}
			})
		}
		near, far := pair()
		go io.Copy(far, far)
		for range 5 {
			before := time.Now()
			var b [64]byte
			near.Write(b[:])
			if _, err := io.ReadFull(near, b[:]); err != nil {
				t.Fatal(err)
			}
			if d := time.Since(before); d < 100*time.Millisecond || d > 105*time.Millisecond {
				t.Errorf("a round trip took %v", d)
			}
		}
		bulk.Wait()
		if d := time.Since(start); !within(d, 1050*time.Millisecond) {
			t.Errorf("a second's bytes came after %v", d)
		}
		near.Close()
		far.Close()
	})
}

// A receiver that takes nothing holds its sender up, and nobody else.
func TestStalled(t *testing.T) {
	bubble(t, 100*time.Millisecond, 100e6, func(t *testing.T, pair func() (near, far *memnet.Conn)) {
		stalled, sender := pair()
		wrote := make(chan int)
		go func() {
			n, _ := sender.Write(make([]byte, 20e6))
			wrote <- n
		}()
		time.Sleep(time.Second)
		near, far := pair()
		start := time.Now()
		go func() {
			far.Write(make([]byte, 12.5e6))
			far.Close()
		}()
		if n, err := io.Copy(io.Discard, near); n != 12.5e6 || err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
		if d := time.Since(start); !within(d, 1050*time.Millisecond) {
			t.Errorf("a second's bytes came after %v", d)
		}
		sender.SetWriteDeadline(time.Now())
		const full = 1.25e6 + beyond // and a chunk; and two sockets' buffers
		if n := <-wrote; n < full || n > full+2*64<<10+2*3125 {
			t.Errorf("the line took %d bytes for one who takes none", n)
		}
		for _, c := range []*memnet.Conn{near, stalled, sender} {
			c.Close()
		}
	})
}

// A reset is passed on as one, from either end, and takes its time. It comes through to
// one who does not read, too.
func TestReset(t *testing.T) {
	for _, fromNear := range []bool{true, false} {
		bubble(t, 100*time.Millisecond, 100e6, func(t *testing.T, pair func() (near, far *memnet.Conn)) {
			from, to := pair()
			if !fromNear {
				from, to = to, from
			}
			if fromNear {
				from.Write(make([]byte, 1e6)) // the line has room for it, the receiver not
				time.Sleep(time.Second)
			}
			start := time.Now()
			from.SetLinger(0)
			from.Close()
			for !to.WasReset() && time.Since(start) < time.Second {
				time.Sleep(time.Millisecond)
			}
			if d := time.Since(start); !within(d, 50*time.Millisecond) {
				t.Errorf("it came after %v", d)
			}
			to.Close()
		})
	}
}

// One who goes on writing to a conn whose peer has closed it hears of that a round trip
// later.
func TestClosedByReader(t *testing.T) {
	bubble(t, 100*time.Millisecond, 100e6, func(t *testing.T, pair func() (near, far *memnet.Conn)) {
		near, far := pair()
		near.Close()
		for {
			if _, err := far.Write(make([]byte, 1000)); err != nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
		far.Close()
	})
}

// Over TCP's own sockets: contents, order, and an answer after the end of the question.
func TestSockets(t *testing.T) {
	app, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := app.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { // answers when it has heard all
				defer c.Close()
				b, _ := io.ReadAll(c)
				c.Write(b)
			})
		}
	})
	l := New(4*time.Millisecond, 1e9)
	ln, err := l.Listen()
	if err != nil {
		t.Fatal(err)
	}
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { l.CarryTo(c.(*net.TCPConn), app.Addr().String()) })
		}
	})
	sent := noise(4 << 20)
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			c, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.Write(sent)
			c.(*net.TCPConn).CloseWrite()
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
				t.Errorf("%d bytes of %d came back, or others: %v", len(got), len(sent), err)
			}
		})
	}
	clients.Wait()
	ln.Close()
	app.Close()
	wg.Wait()
}
