package memnet

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

const latency = 50 * time.Millisecond

// bubble runs f with a connection, on the fake clock.
func bubble(t *testing.T, f func(t *testing.T, a, b *Conn)) {
	synctest.Test(t, func(t *testing.T) {
		a, b := memPair(t)
		f(t, a, b)
	})
}

// took checks how long ago start was.
func took(t *testing.T, start time.Time, want time.Duration) {
	t.Helper()
	if got := time.Since(start); got != want {
		t.Errorf("it took %v; want %v", got, want)
	}
}

func TestLatency(t *testing.T) {
	bubble(t, func(t *testing.T, a, b *Conn) {
		a.SetLatency(latency)
		start := time.Now()
		write(t, a, "one")
		time.Sleep(latency / 2)
		write(t, a, "two")
		a.CloseWrite()
		took(t, start, latency/2)
		expect(t, b, "one")
		took(t, start, latency)
		expect(t, b, "two")
		took(t, start, latency*3/2)
		_, err := b.Read(make([]byte, 1))
		wantErr(t, err, "read", io.EOF)
		took(t, start, latency*3/2)

		// The other way, and a reset.
		start = time.Now()
		write(t, b, "three")
		b.SetLinger(0)
		b.Close()
		expect(t, a, "three")
		took(t, start, latency)
		_, err = a.Read(make([]byte, 1))
		wantErr(t, err, "read", syscall.ECONNRESET)
		took(t, start, latency)
	})
}

func TestLatencyChanges(t *testing.T) {
	bubble(t, func(t *testing.T, a, b *Conn) {
		start := time.Now()
		a.SetLatency(latency)
		write(t, a, "slow")
		a.SetLatency(0)
		write(t, a, "fast")
		write(t, b, "back")
		expect(t, a, "back")
		took(t, start, 0)
		expect(t, b, "slowfast") // in order
		took(t, start, latency)
		write(t, a, "now")
		expect(t, b, "now")
		took(t, start, latency)
		b.SetLatency(-1)
		write(t, a, "now")
		expect(t, b, "now")
		took(t, start, latency)
	})
}

// A peer that closed resets what arrives later, a latency later.
func TestLatencyOfAnswer(t *testing.T) {
	bubble(t, func(t *testing.T, a, b *Conn) {
		b.SetLatency(latency)
		start := time.Now()
		b.Close()
		write(t, a, "crosses the FIN")
		_, err := a.Read(make([]byte, 1))
		wantErr(t, err, "read", io.EOF)
		took(t, start, latency)
		write(t, a, "the reset is on its way")
		time.Sleep(latency)
		synctest.Wait()
		_, err = a.Write([]byte("x"))
		wantErr(t, err, "write", syscall.EPIPE)
	})
}

func TestBufferBoundsThroughput(t *testing.T) {
	bubble(t, func(t *testing.T, a, b *Conn) {
		const size = 1000
		a.SetBuffer(size)
		b.SetLatency(latency)
		start := time.Now()
		go func() {
			a.Write(make([]byte, 10*size))
			a.CloseWrite()
		}()
		if n, err := io.Copy(io.Discard, b); n != 10*size || err != nil {
			t.Errorf("read %d, %v", n, err)
		}
		took(t, start, 10*latency)
	})
}

func TestBuffer(t *testing.T) {
	bubble(t, func(t *testing.T, a, b *Conn) {
		w := goWrite(a, 200_000)
		written := func(want int) {
			t.Helper()
			synctest.Wait()
			if got := b.in.arrived; got != want {
				t.Errorf("%d bytes are written; want %d", got, want)
			}
		}
		written(defaultBuffer)
		b.SetBuffer(100_000)
		written(100_000)
		a.SetBuffer(120_000)
		written(120_000)
		b.SetBuffer(10)
		a.SetBuffer(0)
		written(120_000)
		io.ReadFull(b, make([]byte, 120_000-defaultBuffer))
		written(defaultBuffer)
		b.Read(make([]byte, 1))
		written(defaultBuffer)
		if len(w) > 0 {
			t.Error("Write returned early")
		}
		io.ReadFull(b, make([]byte, 80_000))
		if got := await(t, w, "end of Write"); got.n != 200_000 || got.err != nil {
			t.Errorf("Write: %v", got)
		}
		// The other direction has a buffer of its own.
		write(t, b, string(make([]byte, defaultBuffer)))
	})
}

// A Write that waits for its turn gets it when the one before it returns.
func TestTurnIsPassedOn(t *testing.T) {
	for range 50 {
		bubble(t, func(t *testing.T, a, b *Conn) {
			a.SetBuffer(100)
			writes := []<-chan result{goWrite(a, 101)}
			synctest.Wait()
			for range 9 {
				writes = append(writes, goWrite(a, 11))
			}
			synctest.Wait()
			b.Read(make([]byte, 100))
			for _, w := range writes {
				if got := await(t, w, "end of Write"); got.err != nil {
					t.Error(got.err)
				}
			}
		})
	}
}

// A writer learns only from the reset that its peer was closed.
func TestCloseMakesNoRoom(t *testing.T) {
	bubble(t, func(t *testing.T, a, b *Conn) {
		a.SetLatency(latency)
		w := goWrite(a, tooMuch)
		time.Sleep(2 * latency)
		start := time.Now()
		b.Close()
		got := await(t, w, "end of Write")
		wantErr(t, got.err, "write", syscall.ECONNRESET)
		if got.n != defaultBuffer {
			t.Errorf("%d bytes were written", got.n)
		}
		took(t, start, latency)
	})
}

func TestDeadlinesAreExact(t *testing.T) {
	bubble(t, func(t *testing.T, a, b *Conn) {
		start := time.Now()
		a.SetReadDeadline(start.Add(time.Second))
		a.SetWriteDeadline(start.Add(2 * time.Second))
		w := goWrite(a, tooMuch)
		_, err := a.Read(make([]byte, 1))
		wantErr(t, err, "read", os.ErrDeadlineExceeded)
		took(t, start, time.Second)
		wantErr(t, await(t, w, "end of Write").err, "write", os.ErrDeadlineExceeded)
		took(t, start, 2*time.Second)

		// On the deadline itself it is too late, even for bytes that are there.
		write(t, b, "x")
		a.SetReadDeadline(time.Now())
		_, err = a.Read(make([]byte, 1))
		wantErr(t, err, "read", os.ErrDeadlineExceeded)

		// Moved to later while Read waits.
		a.SetReadDeadline(time.Time{})
		expect(t, a, "x")
		start = time.Now()
		a.SetReadDeadline(start.Add(time.Second))
		r := goRead(a, 1)
		synctest.Wait()
		a.SetReadDeadline(start.Add(3 * time.Second))
		wantErr(t, await(t, r, "end of Read").err, "read", os.ErrDeadlineExceeded)
		took(t, start, 3*time.Second)
	})
}

func TestFreeze(t *testing.T) {
	bubble(t, func(t *testing.T, a, b *Conn) {
		write(t, a, "before")
		a.Freeze()
		expect(t, b, "before") // had arrived
		start := time.Now()
		for _, c := range []*Conn{a, b} {
			c.SetDeadline(start.Add(time.Hour))
			r := goRead(c, 1)
			n, err := c.Write(make([]byte, tooMuch))
			wantErr(t, err, "write", os.ErrDeadlineExceeded)
			if n != defaultBuffer {
				t.Errorf("%d bytes were written", n)
			}
			wantErr(t, await(t, r, "end of Read").err, "read", os.ErrDeadlineExceeded)
			c.SetDeadline(time.Time{})
			start = time.Now()
		}
		w := goWrite(a, 1)
		synctest.Wait()
		b.Thaw()
		for _, c := range []*Conn{a, b} {
			if _, err := io.ReadFull(c, make([]byte, defaultBuffer)); err != nil {
				t.Error(err)
			}
		}
		if got := await(t, w, "end of Write"); got.err != nil {
			t.Error(got.err)
		}
		if _, err := b.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
	})
}

// An end of a frozen connection that is closed is not missed before Thaw.
func TestFreezeHidesClose(t *testing.T) {
	for name, tt := range map[string]struct {
		linger int
		data   string
		err    error
	}{
		"FIN":   {-1, "data", io.EOF},
		"reset": {0, "", syscall.ECONNRESET}, // the sender had the data still
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, a, b *Conn) {
				b.Freeze()
				write(t, a, "data")
				a.SetLinger(tt.linger)
				a.Close()
				b.SetReadDeadline(time.Now().Add(time.Hour))
				_, err := b.Read(make([]byte, 1))
				wantErr(t, err, "read", os.ErrDeadlineExceeded)
				b.SetReadDeadline(time.Time{})
				write(t, b, "unnoticed")
				r := goRead(b, 10)
				synctest.Wait()
				b.Thaw()
				if tt.data != "" {
					if got := await(t, r, "end of Read"); got.n != len(tt.data) || got.err != nil {
						t.Errorf("Read: %v", got)
					}
					r = goRead(b, 1)
				}
				wantErr(t, await(t, r, "end of Read").err, "read", tt.err)
				_, err = b.Write([]byte("x"))
				wantErr(t, err, "write", syscall.EPIPE)
			})
		})
	}
}

// What is under way when the freeze begins arrives after it, no earlier than it would
// have.
func TestFreezeAndLatency(t *testing.T) {
	bubble(t, func(t *testing.T, a, b *Conn) {
		start := time.Now()
		a.SetLatency(latency)
		write(t, a, "1")
		a.Freeze()
		time.Sleep(2*latency - 1)
		write(t, a, "2")
		r := goRead(b, 1)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if len(r) > 0 {
			t.Error("read from a frozen connection")
		}
		a.Thaw()
		await(t, r, "end of Read")
		took(t, start, 2*latency)
		expect(t, b, "2")
		took(t, start, 3*latency-1)

		// Thawed in time, nothing changes.
		start = time.Now()
		write(t, a, "3")
		a.Freeze()
		time.Sleep(latency / 2)
		a.Thaw()
		expect(t, b, "3")
		took(t, start, latency)
	})
}

func TestCut(t *testing.T) {
	for name, tt := range map[string]struct {
		prepare func(c *Conn)
		read    string
	}{
		"plain":  {func(*Conn) {}, "arrived, too"},
		"frozen": {(*Conn).Freeze, "arrived"},
		"slow":   {func(c *Conn) { c.SetLatency(latency) }, "arrived"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, a, b *Conn) {
				write(t, a, "arrived")
				tt.prepare(a)
				write(t, a, ", too")
				r, w := goRead(a, 1), goWrite(a, tooMuch)
				synctest.Wait()
				start := time.Now()
				for range 2 {
					b.Cut()
				}
				rerr, werr := await(t, r, "end of Read").err, await(t, w, "end of Write").err
				wantReset(t, rerr, "read")
				wantReset(t, werr, "write")
				got, err := io.ReadAll(io.LimitReader(b, int64(len(tt.read))))
				if string(got) != tt.read || err != nil {
					t.Errorf("read %q, %v", got, err)
				}
				_, err = io.Copy(io.Discard, b)
				wantErr(t, err, "read", syscall.ECONNRESET)
				took(t, start, 0)

				// What was lost does not come back.
				b.Thaw()
				time.Sleep(2 * latency)
				if n, err := io.Copy(io.Discard, b); n > 0 || err != nil {
					t.Errorf("read %d bytes more, %v", n, err)
				}
			})
		})
	}
}

// A cut of what is over is no fault.
func TestCutTooLate(t *testing.T) {
	for name, cut := range map[string]func(*Conn){
		"Cut":      (*Conn).Cut,
		"CutAfter": func(c *Conn) { c.CutAfter(0) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, a, b *Conn) {
				write(t, a, "all")
				a.CloseWrite()
				b.CloseWrite()
				cut(a)
				if got, err := io.ReadAll(b); string(got) != "all" || err != nil {
					t.Errorf("read %q, %v", got, err)
				}
				if got, err := io.ReadAll(a); len(got) > 0 || err != nil {
					t.Errorf("read %q, %v", got, err)
				}
			})
		})
	}
}

func TestCutAfter(t *testing.T) {
	bubble(t, func(t *testing.T, a, b *Conn) {
		write(t, a, "not counted")
		a.CutAfter(1)
		b.CutAfter(-1)
		write(t, b, "nor this")
		expect(t, a, "nor this")
		b.CutAfter(10)
		write(t, a, "1234")
		write(t, b, "56")
		// In the middle of a Write.
		n, err := a.Write([]byte("789abc"))
		if n != 4 {
			t.Errorf("%d bytes were written", n)
		}
		wantErr(t, err, "write", syscall.ECONNRESET)
		got, err := io.ReadAll(b)
		if string(got) != "not counted1234789a" {
			t.Errorf("read %q", got)
		}
		wantErr(t, err, "read", syscall.ECONNRESET)
		if got, err := io.ReadAll(a); string(got) != "56" || err != nil {
			t.Errorf("read %q, %v", got, err)
		}
	})
	bubble(t, func(t *testing.T, a, b *Conn) {
		// Between two Writes.
		a.CutAfter(3)
		write(t, a, "123")
		for _, c := range []*Conn{a, b} {
			got, err := io.ReadAll(c)
			if want := map[*Conn]string{b: "123"}[c]; string(got) != want {
				t.Errorf("read %q; want %q", got, want)
			}
			wantErr(t, err, "read", syscall.ECONNRESET)
		}
	})
	bubble(t, func(t *testing.T, a, b *Conn) {
		// At once.
		a.CutAfter(0)
		for _, c := range []*Conn{a, b} {
			_, err := c.Read(make([]byte, 1))
			wantErr(t, err, "read", syscall.ECONNRESET)
		}
	})
	bubble(t, func(t *testing.T, a, b *Conn) {
		// With latency, and no earlier than Thaw.
		a.SetLatency(latency)
		a.CutAfter(3)
		write(t, b, "1")
		write(t, a, "23456")
		b.Freeze()
		write(t, b, "789")
		b.Close()
		time.Sleep(time.Hour)
		start := time.Now()
		b.Thaw()
		expect(t, a, "1")
		_, err := a.Read(make([]byte, 1))
		wantErr(t, err, "read", syscall.ECONNRESET)
		took(t, start, 0)
	})
}

// The reset of a cut that was on its way is lost with the bytes before it, but not
// replaced by nothing.
func TestFreezeCutAfterAndReset(t *testing.T) {
	bubble(t, func(t *testing.T, a, b *Conn) {
		a.Freeze()
		a.CutAfter(1)
		write(t, a, "123")
		a.SetLinger(0)
		a.Close()
		r := goRead(b, 1)
		synctest.Wait()
		if len(r) > 0 {
			t.Error("read from a frozen connection")
		}
		a.Thaw()
		wantErr(t, await(t, r, "end of Read").err, "read", syscall.ECONNRESET)
	})
}

func TestSlice(t *testing.T) {
	bubble(t, func(t *testing.T, a, b *Conn) {
		b.SetSlice(3)
		w := goWrite(a, 8)
		for _, want := range []int{3, 3, 2} {
			synctest.Wait()
			if n, err := b.Read(make([]byte, 100)); n != want || err != nil {
				t.Errorf("Read: %d, %v; want %d", n, err, want)
			}
		}
		if got := await(t, w, "end of Write"); got.n != 8 || got.err != nil {
			t.Errorf("Write: %v", got)
		}
		b.Freeze()
		write(t, a, "12345678")
		if pieces := len(b.in.way); pieces != 3 {
			t.Errorf("8 bytes are under way in %d pieces", pieces)
		}
		b.Thaw()
		expect(t, b, "12345678")
		b.SetSlice(0)
		write(t, a, "12345678")
		if n, err := b.Read(make([]byte, 100)); n != 8 || err != nil {
			t.Errorf("Read: %d, %v", n, err)
		}
	})
}

// plague turns faults of a connection on and off until stop is closed, in fake time.
func plague(rnd *rand.Rand, c *Conn, stop <-chan struct{}) {
	for {
		switch rnd.IntN(6) {
		case 0:
			c.Freeze()
		case 1, 2:
			c.Thaw()
		case 3:
			c.SetLatency(time.Duration(rnd.IntN(20)) * time.Millisecond)
		case 4:
			c.SetSlice(rnd.IntN(2) * rnd.IntN(3000))
		case 5:
			c.SetBuffer(rnd.IntN(2) * (1 + rnd.IntN(10_000)))
		}
		select {
		case <-stop:
			c.Thaw()
			return
		case <-time.After(time.Duration(rnd.IntN(10)) * time.Millisecond):
		}
	}
}

// exchange has both ends send size bytes each and close the sending side, and returns
// what came of it, end by end.
func exchange(a, b *Conn, size int) (out [2]outcome) {
	var wg sync.WaitGroup
	for i, c := range []*Conn{a, b} {
		wg.Go(func() {
			var n int64
			n, out[i].werr = io.Copy(c, io.LimitReader(rand.NewChaCha8([32]byte{byte(i)}), int64(size)))
			out[i].written = int(n)
			if out[i].werr == nil {
				out[i].werr = c.CloseWrite()
			}
		})
		wg.Go(func() {
			var got []byte
			got, out[i].rerr = io.ReadAll(c)
			want := make([]byte, size)
			rand.NewChaCha8([32]byte{byte(1 - i)}).Read(want)
			out[i].read = len(got)
			out[i].intact = bytes.HasPrefix(want, got)
		})
	}
	wg.Wait()
	return out
}

type outcome struct {
	read, written int
	rerr, werr    error
	intact        bool // what was read is what the peer sent, or its beginning
}

// Faults that do not end a connection lose nothing.
func TestNothingLost(t *testing.T) {
	const size = 300_000
	for seed := range uint64(30) {
		bubble(t, func(t *testing.T, a, b *Conn) {
			stop := make(chan struct{})
			var wg sync.WaitGroup
			wg.Go(func() { plague(rand.New(rand.NewPCG(seed, 1)), a, stop) })
			for i, o := range exchange(a, b, size) {
				if o.read != size || o.written != size || !o.intact || o.rerr != nil || o.werr != nil {
					t.Errorf("seed %d, end %d: %+v", seed, i, o)
				}
			}
			close(stop)
			wg.Wait()
		})
	}
}

// Whatever else is wrong with a connection, it is cut at the very byte.
func TestCutExactly(t *testing.T) {
	const size = 100_000
	for seed := range uint64(60) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		at := rnd.IntN(2 * size)
		bubble(t, func(t *testing.T, a, b *Conn) {
			a.CutAfter(int64(at))
			stop := make(chan struct{})
			var wg sync.WaitGroup
			wg.Go(func() { plague(rnd, b, stop) })
			out := exchange(a, b, size)
			if got := out[0].read + out[1].read; got != at {
				t.Errorf("seed %d: %d bytes were read; want %d: %+v", seed, got, at, out)
			}
			for i, o := range out {
				if err := o.check(out[1-i], size); err != nil {
					t.Errorf("seed %d, end %d: %v", seed, i, err)
				}
			}
			close(stop)
			wg.Wait()
		})
	}
}

// check says what is wrong with the outcome at one end of a connection that was cut.
func (o outcome) check(peer outcome, size int) error {
	told := errors.Is(o.rerr, syscall.ECONNRESET) || errors.Is(o.werr, syscall.ECONNRESET)
	switch {
	case !o.intact:
		return errors.New("other bytes than were sent")
	case o.read > peer.written:
		return fmt.Errorf("%d bytes read of %d", o.read, peer.written)
	case o.read < size && !told:
		return fmt.Errorf("a part looks like the whole: %+v", o)
	}
	return nil
}

// Everything at once, with Close and Cut, from many goroutines: for the race detector,
// and to see that every call returns.
func TestTurmoil(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New()
		n.OnConn(func(c, _ *Conn) { c.SetLatency(time.Millisecond) })
		ln := listen(t, n, "127.0.0.1:0")
		var wg sync.WaitGroup
		for seed := range uint64(20) {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(seed, 3))
				a := dial(t, n, ln.Addr().String())
				b := accept(t, ln)
				stop := make(chan struct{})
				wg.Go(func() { plague(rand.New(rand.NewPCG(seed, 4)), b, stop) })
				done := make(chan struct{})
				wg.Go(func() {
					exchange(a, a.Peer(), 1<<20)
					close(done)
				})
				time.Sleep(time.Duration(rnd.IntN(100)) * time.Millisecond)
				switch rnd.IntN(4) {
				case 0:
					a.Cut()
				case 1:
					a.SetLinger(0)
				case 2:
					a.SetDeadline(time.Now())
				}
				a.Close()
				time.Sleep(time.Duration(rnd.IntN(100)) * time.Millisecond)
				b.Close()
				a.Peer().Close() // b is the end that another goroutine dialed
				<-done
				close(stop)
			})
		}
		wg.Wait()
		ln.Close()
		if left := n.Conns(); len(left) != 0 {
			t.Errorf("%d connections are left", len(left))
		}
	})
}
