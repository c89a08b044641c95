package throttle

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay/internal/join"
	"github.com/tcprelay/relay/internal/tcptest"
)

// A pipe is one end of an in-memory connection.
type pipe struct {
	net.Conn

	mu          sync.Mutex
	most        int // bytes of the largest Read or Write asked for
	closedWrite bool
	linger      int
}

func (p *pipe) asked(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.most = max(p.most, n)
}

func (p *pipe) Read(b []byte) (int, error) {
	p.asked(len(b))
	return p.Conn.Read(b)
}

func (p *pipe) Write(b []byte) (int, error) {
	p.asked(len(b))
	return p.Conn.Write(b)
}

func (p *pipe) CloseWrite() error {
	p.closedWrite = true
	return nil
}

func (p *pipe) SetLinger(sec int) error {
	p.linger = sec
	return nil
}

// newPipe returns an end of a pipe, and the far one.
func newPipe(t *testing.T) (*pipe, net.Conn) {
	near, far := net.Pipe()
	t.Cleanup(func() { near.Close(); far.Close() })
	return &pipe{Conn: near}, far
}

// newReader returns a conn that can be read at the given rate, and at whose far end data
// is written, and then the end.
func newReader(t *testing.T, b *Bucket, data []byte) (join.Conn, *pipe) {
	near, far := newPipe(t)
	go func() {
		far.Write(data)
		far.Close()
	}()
	return Conn(near, []*Bucket{b}, nil), near
}

// newWriter returns a conn that can be written at the given rate, and what is read at
// the far end, for after the conn is closed.
func newWriter(t *testing.T, buckets ...*Bucket) (c join.Conn, near *pipe, got func() []byte) {
	near, far := newPipe(t)
	var all []byte
	var wg sync.WaitGroup
	wg.Go(func() { all, _ = io.ReadAll(far) })
	return Conn(near, nil, buckets), near, func() []byte {
		wg.Wait()
		return all
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// took checks how long something took, but for the rounding of a wait for each piece.
func took(t *testing.T, since time.Time, want time.Duration) {
	t.Helper()
	if d := time.Since(since); d < want || d > want+time.Millisecond {
		t.Errorf("took %v, want %v", d, want)
	}
}

const rate = 64 << 10 // a burst is 16 KiB, a piece 2 KiB

func TestNoBuckets(t *testing.T) {
	near, _ := newPipe(t)
	for _, none := range [][]*Bucket{nil, {}, {nil}, {nil, New(0)}} {
		if c := Conn(near, none, none); c != join.Conn(near) {
			t.Error("no bucket, and yet another conn")
		}
	}
}

func TestWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, near, got := newWriter(t, nil, New(rate), nil, New(10*rate))
		data := random(1 << 20)
		start := time.Now()
		if n, err := c.Write(data); n != len(data) || err != nil {
			t.Errorf("wrote %d, %v", n, err)
		}
		took(t, start, 16*second-second/4)
		c.Close()
		if !bytes.Equal(got(), data) {
			t.Error("other bytes arrived")
		}
		if near.most != 2<<10 {
			t.Errorf("%d bytes were written at once", near.most)
		}
	})
}

func TestRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		data := random(1 << 20)
		c, near := newReader(t, New(rate), data)
		start := time.Now()
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data) {
			t.Errorf("read %d bytes, %v", len(got), err)
		}
		took(t, start, 16*second-second/4)
		if near.most > 2<<10 {
			t.Errorf("%d bytes were read at once", near.most)
		}
	})
}

// The side that has no bucket is not limited, and neither waits for the other.
func TestOneSide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := newPipe(t)
		c := Conn(near, []*Bucket{New(1)}, nil)
		go far.Write(random(1 << 20))
		if _, err := io.ReadFull(c, make([]byte, 4<<10)); err != nil {
			t.Fatal(err)
		}
		waiting := make(chan error)
		go func() {
			_, err := c.Read(make([]byte, 1))
			waiting <- err
		}()
		synctest.Wait()
		near.most = 0
		start := time.Now()
		go io.Copy(io.Discard, far)
		if n, err := c.Write(random(1 << 20)); n != 1<<20 || err != nil {
			t.Errorf("wrote %d, %v", n, err)
		}
		took(t, start, 0)
		if near.most != 1<<20 {
			t.Error("written in pieces")
		}
		if err := <-waiting; err != nil {
			t.Error(err)
		}
		took(t, start, second)
	})
}

// Nothing is waited for but bytes.
func TestNoBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New(rate)
		b.Take(100 * rate)
		start := time.Now()
		c, _ := newReader(t, b, nil)
		if n, err := c.Read(nil); n != 0 || err != nil {
			t.Errorf("read %d, %v", n, err)
		}
		if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("read %d, %v", n, err)
		}
		w, _, _ := newWriter(t, b)
		if n, err := w.Write(nil); n != 0 || err != nil {
			t.Errorf("wrote %d, %v", n, err)
		}
		took(t, start, 0)
		w.Close()
	})
}

// Those who share a bucket get the same, and together what it gives.
func TestShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New(rate)
		var counts [6]int
		var mu sync.Mutex
		var wg sync.WaitGroup
		for i := range counts {
			// Half of them write and half read, as much at a time as they like.
			near, far := newPipe(t)
			var move func([]byte) (int, error)
			if i%2 == 0 {
				c := Conn(near, nil, []*Bucket{b})
				move = c.Write
				go io.Copy(io.Discard, far)
				c.SetDeadline(time.Now().Add(60 * second))
			} else {
				c := Conn(near, []*Bucket{b}, nil)
				move = c.Read
				go io.Copy(far, rand.NewChaCha8([32]byte{}))
				c.SetDeadline(time.Now().Add(60 * second))
			}
			size := 4096 << i
			wg.Go(func() {
				for buf := make([]byte, size); ; {
					n, err := move(buf)
					mu.Lock()
					counts[i] += n
					mu.Unlock()
					if err != nil {
						if !errors.Is(err, os.ErrDeadlineExceeded) {
							t.Error(err)
						}
						return
					}
				}
			})
		}
		wg.Wait()
		sum := 0
		for _, n := range counts {
			sum += n
			if fair := 60 * rate / 6; n < fair-6*2048 || n > fair+6*2048+16384 {
				t.Errorf("unfair: %v, where %d is fair", counts, fair)
				break
			}
		}
		if want := 60*rate + 16384; sum > want+6*2048 || sum < want-6*2048 {
			t.Errorf("%d bytes in a minute, want %d", sum, want)
		}
	})
}

// Conns that carry little each are limited together too, whether they write or read.
func TestManyShort(t *testing.T) {
	for name, writes := range map[string]bool{"write": true, "read": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := New(rate)
				start := time.Now()
				var wg sync.WaitGroup
				for range 1024 + 16 {
					wg.Go(func() {
						var n int
						if writes {
							c, _, _ := newWriter(t, b)
							n, _ = c.Write(make([]byte, 1024))
							c.Close()
						} else {
							c, _ := newReader(t, b, make([]byte, 1024))
							n, _ = io.ReadFull(c, make([]byte, 1024))
						}
						if n != 1024 {
							t.Errorf("%d bytes", n)
						}
					})
				}
				wg.Wait()
				took(t, start, 16*second)
			})
		})
	}
}

// Whoever leaves while it waits to write does not make the others wait for it.
func TestGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New(rate)
		b.Take(16 << 10)
		var wg sync.WaitGroup
		for i := range 100 {
			c, _, got := newWriter(t, b)
			wg.Go(func() {
				if n, err := c.Write(make([]byte, 1024)); n != 0 || err == nil {
					t.Errorf("wrote %d, %v", n, err)
				}
				c.Close()
				if n := len(got()); n != 0 {
					t.Errorf("%d bytes arrived", n)
				}
			})
			synctest.Wait()
			if i%2 == 0 {
				c.Close()
			} else {
				c.SetWriteDeadline(time.Unix(1, 0))
			}
		}
		wg.Wait()
		if wait := b.Take(1); wait > second/rate+1 {
			t.Errorf("the next one waits %v", wait)
		}
	})
}

// A conn whose far end takes only a part gets the rest back too.
func TestGivenBackPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := newPipe(t)
		b := New(rate)
		go func() {
			far.Read(make([]byte, 24))
			far.Close()
		}()
		if n, err := Conn(near, nil, []*Bucket{b}).Write(make([]byte, 1024)); n != 24 || err == nil {
			t.Errorf("wrote %d, %v", n, err)
		}
		if wait := b.Take(16<<10 - 24); wait != 0 {
			t.Errorf("what was not written was paid for: %v", wait)
		}
	})
}

// A waiter is a call that waits for a bucket, an hour if it is left alone.
type waiter struct {
	join.Conn
	set  func(time.Time) error
	call func() (int, error)
}

const hour = time.Hour

// waiters are a Write, whose far end takes everything, and a Read behind one that was
// cut short.
var waiters = map[string]func(t *testing.T, set func(c join.Conn, t time.Time) error) waiter{
	"Write": func(t *testing.T, set func(join.Conn, time.Time) error) waiter {
		b := New(rate)
		b.Take(16<<10 + 3600*rate - 1)
		c, _, _ := newWriter(t, b)
		t.Cleanup(func() { c.Close() })
		return waiter{c, nil, func() (int, error) { return c.Write([]byte("x")) }}
	},
	"Read": func(t *testing.T, set func(join.Conn, time.Time) error) waiter {
		b := New(rate)
		b.Take(16<<10 + 3600*rate - 1)
		c, _ := newReader(t, b, []byte("xyz"))
		time.AfterFunc(1, func() { set(c, time.Unix(1, 0)) })
		if n, err := c.Read(make([]byte, 1)); n != 1 || err != nil {
			t.Fatalf("cut short: read %d, %v", n, err)
		}
		set(c, time.Time{})
		return waiter{c, nil, func() (int, error) { return c.Read(make([]byte, 1)) }}
	},
}

// forEachWaiter runs f for each call that waits, with both ways to set its deadline.
func forEachWaiter(t *testing.T, f func(t *testing.T, w waiter)) {
	for name, make := range waiters {
		own := join.Conn.SetReadDeadline
		if name == "Write" {
			own = join.Conn.SetWriteDeadline
		}
		for how, set := range map[string]func(join.Conn, time.Time) error{"own": own, "both": join.Conn.SetDeadline} {
			t.Run(name+"/"+how, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := make(t, set)
					w.set = func(at time.Time) error { return set(w.Conn, at) }
					f(t, w)
				})
			})
		}
	}
}

func (w waiter) expect(t *testing.T, after time.Duration, want error) {
	t.Helper()
	start := time.Now()
	n, err := w.call()
	if !errors.Is(err, want) || (n == 1) != (want == nil) {
		t.Errorf("%d, %v, want %v", n, err, want)
	}
	if d := time.Since(start); d < after-2 || d > after+time.Millisecond {
		t.Errorf("took %v, want %v", d, after)
	}
	if want == os.ErrDeadlineExceeded {
		if ne, ok := err.(net.Error); !ok || !ne.Timeout() {
			t.Errorf("not a timeout: %v", err)
		}
	}
}

func TestWaits(t *testing.T) {
	forEachWaiter(t, func(t *testing.T, w waiter) { w.expect(t, hour, nil) })
}

func TestCloseEndsWait(t *testing.T) {
	forEachWaiter(t, func(t *testing.T, w waiter) {
		time.AfterFunc(second, func() { w.Close() })
		w.expect(t, second, net.ErrClosed)
		w.expect(t, 0, net.ErrClosed)
		if err := w.set(time.Time{}); err == nil {
			t.Error("a deadline was set")
		}
	})
}

func TestDeadlineEndsWait(t *testing.T) {
	forEachWaiter(t, func(t *testing.T, w waiter) {
		w.set(time.Now().Add(second))
		w.expect(t, second, os.ErrDeadlineExceeded)
		w.expect(t, 0, os.ErrDeadlineExceeded)
		w.set(time.Now().Add(second))
		w.expect(t, second, os.ErrDeadlineExceeded)
		w.set(time.Time{})
		w.expect(t, hour-2*second, nil)
	})
}

func TestDeadlineMoved(t *testing.T) {
	for name, test := range map[string]struct {
		first, then time.Duration // 0: none
		after       time.Duration
		err         error
	}{
		"set":     {0, 3 * second, 3 * second, os.ErrDeadlineExceeded},
		"past":    {0, -hour, second, os.ErrDeadlineExceeded},
		"earlier": {4 * second, 3 * second, 3 * second, os.ErrDeadlineExceeded},
		"later":   {2 * second, 3 * second, 3 * second, os.ErrDeadlineExceeded},
		"cleared": {2 * second, 0, hour, nil},
		"beyond":  {2 * second, 2 * hour, hour, nil},
	} {
		t.Run(name, func(t *testing.T) {
			forEachWaiter(t, func(t *testing.T, w waiter) {
				now := time.Now()
				at := func(d time.Duration) time.Time {
					if d == 0 {
						return time.Time{}
					}
					return now.Add(d)
				}
				w.set(at(test.first))
				time.AfterFunc(second, func() { w.set(at(test.then)) })
				w.expect(t, test.after, test.err)
			})
		})
	}
}

// A Read that waits with bytes in hand gives them out when it is cut short. None is
// lost, and the rate holds.
func TestReadCutShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		data := random(1 << 20)
		c, _ := newReader(t, New(rate), data)
		start := time.Now()
		go func() {
			for end := start.Add(14 * second); time.Now().Before(end); {
				time.Sleep(3 * time.Millisecond)
				c.SetReadDeadline(time.Unix(1, 0))
				time.Sleep(2 * time.Millisecond)
				c.SetReadDeadline(time.Time{})
			}
		}()
		var got []byte
		cut := 0
		for buf := make([]byte, 5000); ; {
			n, err := c.Read(buf)
			got = append(got, buf[:n]...)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				cut++
				time.Sleep(time.Millisecond)
				continue
			}
			if err != nil {
				if err != io.EOF {
					t.Error(err)
				}
				break
			}
		}
		if !bytes.Equal(got, data) {
			t.Errorf("read %d bytes", len(got))
		}
		if d := time.Since(start); d < 15*second || d > 17*second {
			t.Errorf("took %v", d)
		}
		if cut < 1000 {
			t.Errorf("cut short only %d times", cut)
		}
	})
}

// Concurrent writes do not mix their bytes, and a Close ends them all.
func TestConcurrentWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _, got := newWriter(t, New(rate))
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				if n, err := c.Write(bytes.Repeat([]byte{byte(i)}, rate)); n != rate || err != nil {
					t.Errorf("wrote %d, %v", n, err)
				}
			})
		}
		wg.Wait()
		c.Close()
		all, changes := got(), 0
		for i := 1; i < len(all); i++ {
			if all[i] != all[i-1] {
				changes++
			}
		}
		if len(all) != 4*rate || changes != 3 {
			t.Errorf("%d bytes with %d changes", len(all), changes)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		c, _, _ := newWriter(t, New(1))
		time.AfterFunc(second, func() { c.Close() })
		start := time.Now()
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if _, err := c.Write(make([]byte, 1<<20)); !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.ErrClosedPipe) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		took(t, start, second)
	})
}

func TestPassThrough(t *testing.T) {
	near, _ := newPipe(t)
	c := Conn(near, []*Bucket{New(1)}, nil)
	if c.CloseWrite(); !near.closedWrite {
		t.Error("CloseWrite does not pass through")
	}
	if c.SetLinger(7); near.linger != 7 {
		t.Error("SetLinger does not pass through")
	}
	if c.RemoteAddr() != near.RemoteAddr() || c.LocalAddr() != near.LocalAddr() {
		t.Error("other addresses")
	}
}

// Over TCP: all bytes, and the half-close, both ways.
func TestTCP(t *testing.T) {
	far, near := tcptest.Pair(t)
	b := []*Bucket{New(64 << 20)}
	c := Conn(near, b, b)
	defer c.Close()
	data := random(4 << 20)
	var wg sync.WaitGroup
	for _, end := range []join.Conn{c, far} {
		wg.Go(func() {
			if n, err := end.Write(data); n != len(data) || err != nil {
				t.Errorf("wrote %d, %v", n, err)
			}
			end.CloseWrite()
		})
		wg.Go(func() {
			if got, err := io.ReadAll(end); err != nil || !bytes.Equal(got, data) {
				t.Errorf("read %d bytes, %v", len(got), err)
			}
		})
	}
	wg.Wait()
}
