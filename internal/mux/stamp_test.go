package mux

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

// TestLastHeardAndSent moves the times with the bytes of the transport: when some
// come, be it a part of a frame, and when it has taken some, not when they were given
// to it.
func TestLastHeardAndSent(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		heard, sent := time.Now(), time.Now()
		s, p := stuckSession(t, r, Config{})
		check := func(what string) {
			t.Helper()
			synctest.Wait()
			if got := s.LastHeard(); !got.Equal(heard) || time.Since(got) != time.Since(heard) {
				t.Errorf("%s: heard %v ago, want %v", what, time.Since(got), time.Since(heard))
			}
			if got := s.LastSent(); !got.Equal(sent) || time.Since(got) != time.Since(sent) {
				t.Errorf("%s: sent %v ago, want %v", what, time.Since(got), time.Since(sent))
			}
			time.Sleep(time.Hour)
		}
		check("start")
		check("idle")
		st := openStream(t, s)
		check("Open into a stuck transport")
		st.Write(make([]byte, 100_000))
		check("Write into a stuck transport")
		f := synFrame(r.theirs(1), "hello")
		p.send(f[:3])
		heard = time.Now()
		check("a part of a header")
		p.send(f[3:])
		heard = time.Now()
		check("a frame")
		p.listen()
		sent = time.Now()
		check("the transport is free")
		st.CloseWrite()
		sent = time.Now()
		check("CloseWrite")
		accept(t, s).Close()
		sent = time.Now()
		check("Close")
		s.Close()
		sent = time.Now() // a GOAWAY
		check("end")
	})
}

// TestLastSentOfSlowWrite has the transport take its time for a write, which counts
// when it is done.
func TestLastSentOfSlowWrite(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		c1, c2 := newLine(lineConfig{rate: 1000, room: 1000})
		s, p := r.start(c1, Config{}), newRawPeer(t, c2)
		defer s.Close()
		defer c2.Close()
		start := time.Now()
		p.listen()
		st := openStream(t, s)
		st.Write(make([]byte, 10_000))
		time.Sleep(5 * time.Second)
		if got := s.LastSent(); !got.Equal(start) {
			t.Errorf("sent %v behind the start, in the midst of the write", got.Sub(start))
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if took := s.LastSent().Sub(start); took < 5*time.Second || took > 20*time.Second {
			t.Errorf("sent %v behind the start", took)
		}
	})
}

// TestLastSentOfFailedWrite has a write of the transport fail, with or without having
// taken something.
func TestLastSentOfFailedWrite(t *testing.T) {
	for _, takes := range []int{0, 1, 7} {
		t.Run(fmt.Sprint(takes), func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) {
				c1, c2 := net.Pipe()
				defer c2.Close()
				want := time.Now()
				s := r.start(&takingConn{c1, takes}, Config{})
				time.Sleep(time.Hour)
				if takes > 0 {
					want = time.Now()
				}
				openStream(t, s)
				s.Close()
				if got := s.LastSent(); !got.Equal(want) {
					t.Errorf("sent at %v, want %v", got, want)
				}
			})
		})
	}
}

// takingConn takes some bytes of a write and then fails.
type takingConn struct {
	net.Conn
	takes int
}

func (c *takingConn) Write(p []byte) (int, error) { return c.takes, io.ErrClosedPipe }

// TestLastSentOfSocket is about the writes that go to a socket right away, and those
// that it does not take.
func TestLastSentOfSocket(t *testing.T) {
	for _, r := range roles {
		t.Run(r.name, func(t *testing.T) {
			c1, c2 := tcpPair(t)
			s := r.start(c1, Config{})
			defer s.Close()
			defer c2.Close()
			start := s.LastSent()
			giveUp := time.Now().Add(patience)
			for !s.LastSent().After(start) {
				openStream(t, s).Close()
				runtime.Gosched()
				if time.Now().After(giveUp) {
					t.Fatal("nothing counts as sent")
				}
			}
			stuck, other := openStream(t, s), openStream(t, s)
			if _, err := c2.Write(wndIncFrame(stuck.ID(), maxID-Window)); err != nil {
				t.Fatal(err)
			}
			written := make(chan struct{})
			go func() {
				stuck.ReadFrom(zeros{})
				close(written)
			}()
			awaitStuck(t, s)
			last := s.LastSent()
			if n, err := other.Write(bytes.Repeat([]byte("x"), 1000)); n != 1000 || err != nil {
				t.Errorf("Write: %d, %v", n, err)
			}
			if got := s.LastSent(); !got.Equal(last) {
				t.Errorf("a stuck socket sent, %v later", got.Sub(last))
			}
			c2.Close()
			await(t, written, "end of ReadFrom")
		})
	}
}
