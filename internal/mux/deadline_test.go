package mux

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inconshreveable/muxado/frame"
)

// waiter is a call of a stream that waits, and what it takes to let it go on.
type waiter struct {
	name   string
	set    func(*Stream, time.Time) error
	call   func(*Stream) error
	before func(*Stream)               // spoils the chance that call need not wait
	supply func(p *rawPeer, id uint32) // lets one call go on
}

var waiters = []waiter{
	{
		name:   "Read",
		set:    (*Stream).SetReadDeadline,
		call:   func(st *Stream) error { _, err := st.Read(make([]byte, 1)); return err },
		before: func(*Stream) {},
		supply: func(p *rawPeer, id uint32) { p.send(dataFrame(id, []byte("x"), 0)) },
	},
	{
		name:   "WriteTo",
		set:    (*Stream).SetReadDeadline,
		call:   func(st *Stream) error { _, err := st.WriteTo(errWriter{}); return err },
		before: func(*Stream) {},
		supply: func(p *rawPeer, id uint32) { p.send(dataFrame(id, []byte("x"), 0)) },
	},
	{
		name:   "Write",
		set:    (*Stream).SetWriteDeadline,
		call:   func(st *Stream) error { _, err := st.Write([]byte("x")); return err },
		before: func(st *Stream) { st.Write(make([]byte, Window)) },
		supply: func(p *rawPeer, id uint32) { p.send(wndIncFrame(id, 1)) },
	},
	{
		name:   "ReadFrom",
		set:    (*Stream).SetWriteDeadline,
		call:   func(st *Stream) error { _, err := st.ReadFrom(dataErrReader{[]byte("x"), errEnough}); return err },
		before: func(st *Stream) { st.Write(make([]byte, Window)) },
		supply: func(p *rawPeer, id uint32) { p.send(wndIncFrame(id, 1)) },
	},
	{
		name:   "SetDeadline and Read",
		set:    (*Stream).SetDeadline,
		call:   func(st *Stream) error { _, err := st.Read(make([]byte, 1)); return err },
		before: func(*Stream) {},
		supply: func(p *rawPeer, id uint32) { p.send(dataFrame(id, []byte("x"), 0)) },
	},
	{
		name:   "SetDeadline and Write",
		set:    (*Stream).SetDeadline,
		call:   func(st *Stream) error { _, err := st.Write([]byte("x")); return err },
		before: func(st *Stream) { st.Write(make([]byte, Window)) },
		supply: func(p *rawPeer, id uint32) { p.send(wndIncFrame(id, 1)) },
	},
}

// errEnough ends a WriteTo or ReadFrom that got something to do.
var errEnough = errors.New("enough")

type errWriter struct{}

func (errWriter) Write(p []byte) (int, error) { return len(p), errEnough }

func (w waiter) supplied(err error) bool { return err == nil || err == errEnough }

// forEachWaiter runs f for each call that waits, on a stream where it does.
func forEachWaiter(t *testing.T, f func(*testing.T, waiter, *Stream, *rawPeer)) {
	for _, w := range waiters {
		t.Run(w.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) {
				s, p := rawSession(t, r, Config{})
				st := openStream(t, s)
				w.before(st)
				f(t, w, st, p)
			})
		})
	}
}

// goCall makes the call and sends its error, and how long it took.
func (w waiter) goCall(st *Stream) chan timedError {
	ch := make(chan timedError, 1)
	start := time.Now()
	go func() {
		err := w.call(st)
		ch <- timedError{err, time.Since(start)}
	}()
	synctest.Wait()
	return ch
}

type timedError struct {
	err  error
	took time.Duration
}

func (e timedError) check(t *testing.T, took time.Duration) {
	t.Helper()
	ne, ok := e.err.(net.Error)
	if !ok || !ne.Timeout() || !errors.Is(e.err, os.ErrDeadlineExceeded) {
		t.Errorf("the call ended with %v, want a timeout", e.err)
	}
	if e.took != took {
		t.Errorf("the call took %v, want %v", e.took, took)
	}
}

// TestDeadlineBefore sets the deadline before the call, which ends exactly then.
func TestDeadlineBefore(t *testing.T) {
	forEachWaiter(t, func(t *testing.T, w waiter, st *Stream, p *rawPeer) {
		w.set(st, time.Now().Add(time.Second))
		(<-w.goCall(st)).check(t, time.Second)
		(<-w.goCall(st)).check(t, 0) // it has passed
		time.Sleep(time.Minute)
		(<-w.goCall(st)).check(t, 0)
	})
}

// TestDeadlineWhileWaiting sets the deadline of calls that wait already, several at
// once.
func TestDeadlineWhileWaiting(t *testing.T) {
	forEachWaiter(t, func(t *testing.T, w waiter, st *Stream, p *rawPeer) {
		calls := []chan timedError{w.goCall(st), w.goCall(st), w.goCall(st)}
		time.Sleep(time.Hour)
		w.set(st, time.Now().Add(time.Second))
		for _, call := range calls {
			(<-call).check(t, time.Hour+time.Second)
		}
	})
}

// TestDeadlineMoved moves the deadline of a call that waits: closer, further away,
// into the past, and away altogether.
func TestDeadlineMoved(t *testing.T) {
	forEachWaiter(t, func(t *testing.T, w waiter, st *Stream, p *rawPeer) {
		start := time.Now()
		in := func(d time.Duration) { w.set(st, start.Add(d)) }

		in(10 * time.Second)
		call := w.goCall(st)
		in(2 * time.Second)
		(<-call).check(t, 2*time.Second)

		start = time.Now()
		in(2 * time.Second)
		call = w.goCall(st)
		time.Sleep(time.Second)
		in(10 * time.Second)
		time.Sleep(5 * time.Second)
		in(7 * time.Second)
		(<-call).check(t, 7*time.Second)

		start = time.Now()
		in(time.Hour)
		call = w.goCall(st)
		time.Sleep(time.Second)
		in(-time.Hour)
		(<-call).check(t, time.Second)

		start = time.Now()
		in(time.Second)
		call = w.goCall(st)
		w.set(st, time.Time{})
		time.Sleep(time.Hour)
		select {
		case e := <-call:
			t.Fatalf("the call ended with %v, without a deadline", e.err)
		default:
		}
		w.supply(p, st.ID())
		if e := <-call; !w.supplied(e.err) || e.took != time.Hour {
			t.Errorf("the call ended with %v after %v", e.err, e.took)
		}
	})
}

// TestDeadlineExactly makes calls at the very moment of the deadline, which have
// missed it even if they need not wait, and a moment before, which have not.
func TestDeadlineExactly(t *testing.T) {
	forEachWaiter(t, func(t *testing.T, w waiter, st *Stream, p *rawPeer) {
		w.supply(p, st.ID())
		w.supply(p, st.ID())
		synctest.Wait()
		w.set(st, time.Now())
		(<-w.goCall(st)).check(t, 0)
		w.set(st, time.Now().Add(1))
		if e := <-w.goCall(st); !w.supplied(e.err) || e.took != 0 {
			t.Errorf("a call in time ended with %v after %v", e.err, e.took)
		}
		time.Sleep(time.Nanosecond)
		(<-w.goCall(st)).check(t, 0)

		// Nothing was lost, and it counts no longer when it is moved.
		for _, next := range []time.Time{time.Now().Add(time.Minute), {}} {
			w.set(st, next)
			w.supply(p, st.ID())
			if e := <-w.goCall(st); !w.supplied(e.err) || e.took != 0 {
				t.Errorf("a call after the deadline was moved to %v: %v", next, e.err)
			}
		}
	})
}

// TestDeadlineWallClock has no monotonic reading, as a time that was decoded.
func TestDeadlineWallClock(t *testing.T) {
	forEachWaiter(t, func(t *testing.T, w waiter, st *Stream, p *rawPeer) {
		w.set(st, time.Now().Add(time.Second).Round(0))
		(<-w.goCall(st)).check(t, time.Second)
	})
}

// TestDeadlineSupplied lets a call that has a deadline go on in time.
func TestDeadlineSupplied(t *testing.T) {
	forEachWaiter(t, func(t *testing.T, w waiter, st *Stream, p *rawPeer) {
		w.set(st, time.Now().Add(time.Second))
		call := w.goCall(st)
		time.Sleep(time.Second - 1)
		w.supply(p, st.ID())
		if e := <-call; !w.supplied(e.err) || e.took != time.Second-1 {
			t.Errorf("the call ended with %v after %v", e.err, e.took)
		}
	})
}

// TestDeadlineOneWay keeps a deadline to the calls that it is for.
func TestDeadlineOneWay(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		st := openStream(t, s)
		st.SetReadDeadline(time.Now())
		if _, err := st.Write(make([]byte, Window)); err != nil {
			t.Errorf("Write with a read deadline: %v", err)
		}
		st.SetReadDeadline(time.Time{})
		st.SetWriteDeadline(time.Now())
		read, write := waiters[0].goCall(st), waiters[2].goCall(st)
		(<-write).check(t, 0)
		time.Sleep(time.Hour)
		p.send(dataFrame(st.ID(), []byte("x"), 0))
		if e := <-read; e.err != nil {
			t.Errorf("Read with a write deadline: %v", e.err)
		}
		// What ends a stream's sending side has no deadline.
		if err := st.CloseWrite(); err != nil {
			t.Errorf("CloseWrite with a write deadline: %v", err)
		}
		p.send(finFrame(st.ID()))
		if _, err := st.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("Read: %v", err)
		}
	})
}

// TestDeadlineOfTurn times out a Write that waits for another Write of the stream to
// be done.
func TestDeadlineOfTurn(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		st := openStream(t, s)
		first := goWrite(st, make([]byte, Window+2))
		synctest.Wait()
		second := waiters[2].goCall(st)
		p.send(wndIncFrame(st.ID(), 1)) // for the first
		st.SetWriteDeadline(time.Now().Add(time.Second))
		(<-second).check(t, time.Second)
		if got := <-first; got.n != Window+1 || got.err != os.ErrDeadlineExceeded {
			t.Errorf("the first Write: %d, %v", got.n, got.err)
		}
		st.SetWriteDeadline(time.Time{})
		p.send(wndIncFrame(st.ID(), 1))
		if _, err := st.Write([]byte("x")); err != nil {
			t.Errorf("a third Write: %v", err)
		}
	})
}

// TestDeadlineOnStuckTransport times out a Write that no byte is taken of.
func TestDeadlineOnStuckTransport(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, _ := stuckSession(t, r, Config{})
		st := openStream(t, s)
		start := time.Now()
		st.SetDeadline(start.Add(time.Second))
		n, err := st.Write(make([]byte, Window))
		timedError{err, time.Since(start)}.check(t, time.Second)
		if n == 0 || n%maxPayload != 0 {
			t.Errorf("%d bytes were written, want whole frames", n)
		}
		_, err = st.Read(make([]byte, 1))
		timedError{err, time.Since(start)}.check(t, time.Second)
	})
}

// TestDeadlineAfterEnd sets deadlines of streams that are over in each way.
func TestDeadlineAfterEnd(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		closed, reset, lost := openStream(t, s), openStream(t, s), openStream(t, s)
		closed.SetDeadline(time.Now().Add(time.Second))
		closed.Close()
		for name, set := range map[string]func(time.Time) error{
			"SetDeadline":      closed.SetDeadline,
			"SetReadDeadline":  closed.SetReadDeadline,
			"SetWriteDeadline": closed.SetWriteDeadline,
		} {
			if err := set(time.Now()); err != net.ErrClosed {
				t.Errorf("%s after Close: %v", name, err)
			}
		}
		if err := closed.SetLinger(0); err != net.ErrClosed {
			t.Errorf("SetLinger after Close: %v", err)
		}
		p.send(rstFrame(reset.ID(), StreamReset))
		synctest.Wait()
		for _, st := range []*Stream{reset, lost} {
			if err := st.SetDeadline(time.Now().Add(time.Second)); err != nil {
				t.Errorf("SetDeadline: %v", err)
			}
			if st == lost {
				s.Close()
			}
			_, err := st.Read(make([]byte, 1))
			if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("Read before the deadline of a stream that is over: %v", err)
			}
			time.Sleep(time.Second)
			if _, err := st.Read(make([]byte, 1)); err != os.ErrDeadlineExceeded {
				t.Errorf("Read at the deadline of a stream that is over: %v", err)
			}
			st.Close()
		}
	})
}

// TestEmptyCalls read and write nothing, which needs no waiting, and report what
// other calls would.
func TestEmptyCalls(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		st := openStream(t, s)
		st.Write(make([]byte, Window))
		check := func(want error) {
			t.Helper()
			if n, err := st.Read(nil); n != 0 || err != want {
				t.Errorf("Read(nil): %d, %v, want %v", n, err, want)
			}
			if n, err := st.Write(nil); n != 0 || err != want {
				t.Errorf("Write(nil): %d, %v, want %v", n, err, want)
			}
		}
		check(nil)
		st.SetDeadline(time.Now())
		check(os.ErrDeadlineExceeded)
		st.SetDeadline(time.Time{})
		check(nil)
		st.Close()
		check(net.ErrClosed)
		synctest.Wait()
		for _, f := range p.took() {
			if f.typ == frame.TypeData && len(f.body) == 0 && f.flags == 0 {
				t.Error("an empty Write sent an empty frame")
			}
		}
	})
}

// TestDeadlineChurn sets deadlines over and over while calls run, in real time.
func TestDeadlineChurn(t *testing.T) {
	c1, c2 := tcpPair(t)
	client, server := sessionPair(t, c1, c2, Config{})
	a, b := streamPair(t, client, server)
	churned := make(chan struct{})
	go func() {
		defer close(churned)
		for i := range 3000 {
			a.SetWriteDeadline(time.Now().Add(time.Duration(i%7-1) * 10 * time.Microsecond))
			b.SetReadDeadline(time.Now().Add(time.Duration(i%5-1) * 10 * time.Microsecond))
		}
		a.SetWriteDeadline(time.Time{})
		b.SetReadDeadline(time.Time{})
	}()
	data := pattern(8, 1<<20)
	written := make(chan error, 1)
	go func() {
		for rest := data; len(rest) > 0; {
			n, err := a.Write(rest)
			if rest = rest[n:]; err != nil && err != os.ErrDeadlineExceeded {
				written <- err
				return
			}
		}
		written <- a.CloseWrite()
	}()
	var got []byte
	buf := make([]byte, 10_000)
	for {
		n, err := b.Read(buf)
		got = append(got, buf[:n]...)
		if err == io.EOF {
			break
		}
		if err != nil && err != os.ErrDeadlineExceeded {
			t.Fatalf("Read: %v", err)
		}
	}
	await(t, churned, "end of the deadlines")
	if err := await(t, written, "end of the Writes"); err != nil {
		t.Errorf("Write: %v", err)
	}
	if !bytes.Equal(got, data) {
		t.Errorf("read %d bytes, or other ones; %d were written", len(got), len(data))
	}
}
