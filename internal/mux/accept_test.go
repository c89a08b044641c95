package mux

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/inconshreveable/muxado/frame"
)

// TestSharedAccept has two sessions put their streams in one queue. It takes as many
// as it has room for, whoever they are of, and what it holds of a session that has
// ended reads as ended.
func TestSharedAccept(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		queue := make(chan *Stream, 3)
		cfg := Config{Accept: queue, Backlog: 1}
		s1, p1 := rawSession(t, r, cfg)
		s2, p2 := rawSession(t, r, cfg)
		p1.send(synFrame(r.theirs(1), "one"), dataFrame(r.theirs(1), []byte(" and more"), 0))
		synctest.Wait()
		p2.send(synFrame(r.theirs(1), "two"))
		synctest.Wait()
		p1.send(dataFrame(r.theirs(2), []byte("three"), syn|fin))
		synctest.Wait()
		for i, p := range []*rawPeer{p1, p2} { // no more room
			id := r.theirs(3 + i)
			p.send(synFrame(id, "refused"), dataFrame(id, []byte("late"), 0))
			synctest.Wait()
			if f := p.takeOne(); !f.is(rstFrame(id, AcceptQueueFull)) {
				t.Errorf("session %d sent %v", i+1, f)
			}
		}
		if n1, n2 := s1.Refused(), s2.Refused(); n1 != 1 || n2 != 1 {
			t.Errorf("Refused() is %d and %d", n1, n2)
		}
		s1.Close()
		if _, err := s1.Accept(); err != s1.Err() {
			t.Errorf("Accept of a session that ended: %v", err)
		}
		for _, want := range []struct {
			s    *Session
			read string
			err  error
		}{{s1, "one and more", s1.Err()}, {s2, "two", nil}, {s1, "three", io.EOF}} {
			var st *Stream
			select {
			case st = <-queue:
			default:
				t.Fatal("a stream is gone")
			}
			if st.Session() != want.s {
				t.Error("a stream of the other session")
			}
			if got := readNow(t, st); got != want.read {
				t.Errorf("read %q, want %q", got, want.read)
			}
			if want.err == nil {
				continue
			}
			if _, err := st.Read(make([]byte, 1)); err != want.err {
				t.Errorf("Read behind %q: %v, want %v", want.read, err, want.err)
			}
			if _, err := st.Write([]byte("x")); err != s1.Err() {
				t.Errorf("Write: %v, want %v", err, s1.Err())
			}
		}
		// A third one takes over.
		s3, p3 := rawSession(t, r, cfg)
		p3.send(synFrame(r.theirs(1), "four"))
		if st := accept(t, s2); st.Session() != s3 || readNow(t, st) != "four" {
			t.Error("not the stream of the third session")
		}
	})
}

// TestSharedAcceptLate fills the queue while a session receives what opens a stream,
// for which there was room when it came. It is refused as any other, and what came
// with it is nobody's.
func TestSharedAcceptLate(t *testing.T) {
	for _, flags := range []frame.Flags{syn, syn | fin} {
		t.Run(fmt.Sprint(flags), func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) {
				queue := make(chan *Stream, 1)
				s1, p1 := rawSession(t, r, Config{Accept: queue})
				_, p2 := rawSession(t, r, Config{Accept: queue})
				late := dataFrame(r.theirs(1), pattern(1, 100_000), flags)
				p1.send(late[:50_000])
				synctest.Wait()
				if n := openStreams(s1); n != 1 {
					t.Fatalf("%d streams are open", n)
				}
				p2.send(synFrame(r.theirs(1), "faster"))
				synctest.Wait()
				p1.send(late[50_000:])
				synctest.Wait()
				if f := p1.takeOne(); !f.is(rstFrame(r.theirs(1), AcceptQueueFull)) {
					t.Errorf("the session sent %v", f)
				}
				if n := s1.Refused(); n != 1 {
					t.Errorf("Refused() is %d", n)
				}
				if n, unread := openStreams(s1), s1.unread.Load(); n != 0 || unread != 0 {
					t.Errorf("%d streams are open, %d bytes are unread", n, unread)
				}
				if got := readNow(t, <-queue); got != "faster" {
					t.Errorf("read %q", got)
				}
				p1.send(dataFrame(r.theirs(1), []byte("late"), 0), wndIncFrame(r.theirs(1), 1), synFrame(r.theirs(2), "next"))
				if st := <-queue; st.Session() != s1 || readNow(t, st) != "next" {
					t.Error("not the next stream")
				}
				synctest.Wait()
				p1.takeNone()
			})
		})
	}
}

// TestSharedAcceptCrowd has many sessions open streams at once for a queue that is too
// small for them. Each stream is either served or refused, and no session waits for
// the queue.
func TestSharedAcceptCrowd(t *testing.T) {
	const sessions, opens = 4, 300
	queue := make(chan *Stream, 2)
	var served, refused atomic.Int64
	var servers []*Session
	var peers, openers sync.WaitGroup
	done := make(chan struct{})
	peers.Go(func() {
		for {
			select {
			case st := <-queue:
				if _, err := io.Copy(st, st); err != nil {
					t.Errorf("serving: %v", err)
				}
				st.Close()
				served.Add(1)
			case <-done:
				return
			}
		}
	})
	for range sessions {
		c1, c2 := net.Pipe()
		client, server := Client(c1, Config{}), Server(c2, Config{Accept: queue})
		defer client.Close()
		defer server.Close()
		servers = append(servers, server)
		for range 2 {
			openers.Go(func() {
				for i := range opens {
					want := fmt.Sprint("stream ", i)
					st, err := client.Open([]byte(want))
					if err != nil {
						t.Errorf("Open: %v", err)
						return
					}
					st.CloseWrite()
					got, err := io.ReadAll(st)
					if se, ok := errors.AsType[*StreamError](err); ok && *se == (StreamError{AcceptQueueFull, true}) && len(got) == 0 {
						refused.Add(1)
					} else if err != nil || string(got) != want {
						t.Errorf("read %q, %v, want %q", got, err, want)
					}
					st.Close()
				}
			})
		}
	}
	openers.Wait()
	close(done)
	peers.Wait()
	var counted int64
	for _, s := range servers {
		counted += s.Refused()
	}
	if refused.Load() != counted || served.Load()+counted != 2*sessions*opens {
		t.Errorf("%d streams were served, %d refused and %d counted as refused, of %d",
			served.Load(), refused.Load(), counted, 2*sessions*opens)
	}
}

// TestMaxOpens opens as many streams as the limit lets it in a session's life.
func TestMaxOpens(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{MaxOpens: 3, MaxStreams: 1})
		left := func(want int) {
			t.Helper()
			if got := s.OpensLeft(); got != want {
				t.Errorf("%d are left, want %d", got, want)
			}
		}
		for n := 3; n > 0; n-- {
			left(n)
			st := openStream(t, s)
			left(n - 1)
			if n > 1 {
				if _, err := s.Open(nil); err != ErrTooManyStreams { // which does not count
					t.Errorf("Open: %v, want ErrTooManyStreams", err)
				}
			}
			p.send(finFrame(st.ID()))
			synctest.Wait()
			st.Close()
		}
		for range 2 {
			if _, err := s.Open(nil); err != ErrStreamsExhausted {
				t.Errorf("Open: %v, want ErrStreamsExhausted", err)
			}
		}
		left(0)
		p.send(synFrame(r.theirs(1), "the peer's")) // whose opens do not count
		if got := readNow(t, accept(t, s)); got != "the peer's" {
			t.Errorf("read %q", got)
		}
	})
}
