package mux

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/inconshreveable/muxado/frame"
)

// inBubble runs f, for each role, in a bubble of its own. What f leaves behind fails
// it, and so does what f waits for in vain.
func inBubble(t *testing.T, f func(*testing.T, role)) {
	t.Helper()
	for _, r := range roles {
		t.Run(r.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { f(t, r) })
		})
	}
}

// readNow reads what a stream has received, without waiting for more.
func readNow(t testing.TB, st *Stream) string {
	t.Helper()
	b := make([]byte, st.Unread())
	if _, err := io.ReadFull(st, b); err != nil {
		t.Fatalf("Read: %v", err)
	}
	return string(b)
}

// TestOpenSendsSyn sees a stream's first frame leave at Open, with what opens the
// stream, and never with a FIN.
func TestOpenSendsSyn(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		for n, opening := range []string{"", "x", string(make([]byte, maxPayload))} {
			st, err := s.Open([]byte(opening))
			if err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if f := p.takeOne(); !f.is(synFrame(r.ours(n+1), opening)) {
				t.Fatalf("Open sent %v", f)
			}
			if err := st.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if f := p.takeOne(); !f.is(finFrame(r.ours(n + 1))) {
				t.Fatalf("CloseWrite sent %v", f)
			}
		}
	})
}

// TestOpenTakesWindow counts what opens a stream as its first bytes, on both ends.
func TestOpenTakesWindow(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		st, err := s.Open([]byte("opening"))
		if err != nil {
			t.Fatal(err)
		}
		written := goWrite(st, make([]byte, Window))
		synctest.Wait()
		if n := len(payload(p.took(), r.ours(1))); n != Window {
			t.Errorf("sent %d bytes in all, want the window of %d", n, Window)
		}
		if sent, _ := st.Counts(); sent != Window {
			t.Errorf("Counts says %d bytes were sent", sent)
		}
		p.send(wndIncFrame(r.ours(1), 100))
		if got := <-written; got.n != Window || got.err != nil {
			t.Errorf("Write: %d, %v", got.n, got.err)
		}
		p.send(synFrame(r.theirs(1), "abc"), header(Window-2, frame.TypeData, 0, r.theirs(1)))
		<-s.Done()
		if code := sessionError(t, s).Code; code != FlowControlError {
			t.Errorf("a window exceeded by what opened the stream: %v", code)
		}
	})
}

// TestAcceptedIsThere reads what opened a stream without waiting.
func TestAcceptedIsThere(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		opening := string(bytes.Repeat([]byte("opening "), 1000))
		// In two writes, so that Accept would be early if it did not wait for the end.
		f := synFrame(r.theirs(1), opening)
		go func() {
			p.send(f[:100])
			synctest.Wait()
			p.send(f[100:])
		}()
		st := <-s.Accepting()
		if n := st.Unread(); n != len(opening) {
			t.Errorf("%d bytes were there, want %d", n, len(opening))
		}
		b := make([]byte, len(opening))
		if n := st.Peek(b); string(b[:n]) != opening {
			t.Error("Peek shows other bytes")
		}
		if readNow(t, st) != opening {
			t.Error("Read gives other bytes")
		}
		if st.ID() != r.theirs(1) {
			t.Errorf("ID %d, want %d", st.ID(), r.theirs(1))
		}
	})
}

// TestUnknownFrames skips frames of types that the protocol may get one day, with
// any flags, id and length, and whatever their bodies look like.
func TestUnknownFrames(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		p.send(synFrame(r.theirs(1), ""))
		st := accept(t, s)
		smuggled := dataFrame(r.theirs(1), []byte("smuggled"), fin)
		var want strings.Builder
		for typ := frame.TypeGoAway + 1; typ < 16; typ++ {
			for _, id := range []uint32{0, 1, r.theirs(1), r.theirs(9), maxID} {
				for _, n := range []int{0, 1, 4, 8, len(smuggled), 1000, 100_000} {
					body := bytes.Repeat(smuggled, n/len(smuggled)+1)[:n]
					p.send(rawFrame(typ, frame.Flags(n)&0xf, id, body), dataFrame(r.theirs(1), []byte("."), 0))
					want.WriteString(".")
				}
			}
		}
		p.send(rawFrame(15, 0, 0, make([]byte, maxLength)), dataFrame(r.theirs(1), []byte("!"), fin))
		want.WriteString("!")
		if b, err := io.ReadAll(st); string(b) != want.String() || err != nil {
			t.Errorf("read %q, %v", b, err)
		}
		p.takeNone()
	})
}

// TestGoAway stays in step behind a GOAWAY with text, leaves alone the streams that
// the peer knows and ends those that it says it does not, opens no more, and goes
// on to take the peer's.
func TestGoAway(t *testing.T) {
	for _, n := range []int{0, 1, 7, 8, 9, 15, 16, 17, 1000, 4096, 100_000, 1 << 20} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) { testGoAway(t, r, n) })
		})
	}
}

func testGoAway(t *testing.T, r role, n int) {
	s, p := rawSession(t, r, Config{})
	p.send(synFrame(r.theirs(1), ""))
	theirs, known, unknown := accept(t, s), openStream(t, s), openStream(t, s)
	synctest.Wait()
	p.took()

	text := bytes.Repeat(dataFrame(r.theirs(1), []byte("smuggled"), 0), n/16+1)[:n]
	p.send(goAwayFrame(r.ours(1), InternalError, string(text)),
		dataFrame(r.theirs(1), []byte("theirs"), 0),
		dataFrame(r.ours(1), []byte("known"), fin),
		synFrame(r.theirs(2), "new"))
	synctest.Wait()

	if got := readNow(t, theirs); got != "theirs" {
		t.Errorf("a stream of the peer's got %q", got)
	}
	if b, err := io.ReadAll(known); string(b) != "known" || err != nil {
		t.Errorf("a stream that the peer knows got %q, %v", b, err)
	}
	wantErr := StreamError{Code: StreamRefused, Remote: true}
	_, err := unknown.Read(make([]byte, 1))
	if se, ok := errors.AsType[*StreamError](err); !ok || *se != wantErr {
		t.Errorf("a stream that the peer does not know: %v", err)
	}
	if _, err := s.Open(nil); err != ErrGoneAway {
		t.Errorf("Open: %v, want ErrGoneAway", err)
	}
	if got := readNow(t, accept(t, s)); got != "new" {
		t.Errorf("a new stream of the peer's got %q", got)
	}
	for _, st := range []*Stream{theirs, known} {
		if _, err := st.Write([]byte("x")); err != nil {
			t.Errorf("Write: %v", err)
		}
		synctest.Wait()
		if f := p.takeOne(); !f.is(dataFrame(st.ID(), []byte("x"), 0)) {
			t.Errorf("Write sent %v", f)
		}
	}
	select {
	case <-s.Done():
		t.Errorf("the session ended: %v", s.Err())
	default:
	}

	// The end of the transport is what the GOAWAY announced.
	p.conn.Close()
	<-s.Done()
	if err := sessionError(t, s); err.Code != InternalError || !err.Remote {
		t.Errorf("the session ended with %+v, want the GOAWAY's code, by the peer", err)
	}
	if _, err := theirs.Read(make([]byte, 1)); err != s.Err() {
		t.Errorf("Read: %v, want %v", err, s.Err())
	}
}

// TestRefusedStreams resets the streams that a session does not take, with the
// reason, and passes over the bytes that came with them, which stay out of any
// other stream however much they look like a frame of its.
func TestRefusedStreams(t *testing.T) {
	for _, test := range []struct {
		name string
		cfg  Config
		prep func(*Session)
		want Code
	}{
		{"RefuseStreams", Config{}, (*Session).RefuseStreams, StreamRefused},
		{"MaxStreams", Config{MaxStreams: 2}, func(s *Session) { s.Open(nil) }, StreamRefused},
		{"Backlog", Config{Backlog: 1}, nil, AcceptQueueFull},
		{"Accept", Config{}, nil, AcceptQueueFull},
	} {
		for _, n := range []int{0, 1, 17, 1000, Window, Window + 1, 1 << 20} {
			t.Run(fmt.Sprintf("%s/%d", test.name, n), func(t *testing.T) {
				inBubble(t, func(t *testing.T, r role) {
					cfg := test.cfg
					if test.name == "Accept" {
						cfg.Accept = make(chan *Stream, 1) // of this bubble
					}
					s, p := rawSession(t, r, cfg)
					p.send(synFrame(r.theirs(1), "first"))
					first := accept(t, s)
					if test.prep != nil {
						test.prep(s)
					} else { // fill the backlog
						p.send(synFrame(r.theirs(2), ""))
					}
					synctest.Wait()
					p.took()

					smuggled := bytes.Repeat(dataFrame(r.theirs(1), []byte("smuggled"), 0), n/16+1)[:n]
					refused := r.theirs(3)
					p.send(dataFrame(refused, smuggled, syn|frame.Flags(n&1))) // some with FIN
					synctest.Wait()
					if f := p.takeOne(); !f.is(rstFrame(refused, test.want)) {
						t.Errorf("the session sent %v, want an RST with %v", f, test.want)
					}
					if got := s.Refused(); got != 1 {
						t.Errorf("Refused() is %d", got)
					}
					// What the peer sent before it knew.
					p.send(dataFrame(refused, smuggled, 0), wndIncFrame(refused, 1), finFrame(refused),
						rstFrame(refused, StreamCancelled), dataFrame(r.theirs(1), []byte(" and more"), fin))
					if b, err := io.ReadAll(first); string(b) != "first and more" || err != nil {
						t.Errorf("an open stream got %q, %v", b, err)
					}
					synctest.Wait()
					p.takeNone() // one RST is enough
				})
			})
		}
	}
}

// TestRoomAgain takes streams again once others are over or accepted.
func TestRoomAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{MaxStreams: 2, Backlog: 1})
		p.send(synFrame(r.theirs(1), ""), synFrame(r.theirs(2), "")) // no room in the backlog
		synctest.Wait()
		one, ours := accept(t, s), openStream(t, s)
		if _, err := s.Open(nil); err != ErrTooManyStreams {
			t.Errorf("Open: %v, want ErrTooManyStreams", err)
		}
		p.send(synFrame(r.theirs(3), "")) // too many
		synctest.Wait()
		want := [][]byte{rstFrame(r.theirs(2), AcceptQueueFull), synFrame(ours.ID(), ""), rstFrame(r.theirs(3), StreamRefused)}
		if got := p.took(); !slices.EqualFunc(got, want, wireFrame.is) {
			t.Errorf("the session sent %v", got)
		}

		// A stream counts until it is over both ways and read.
		p.send(dataFrame(one.ID(), []byte("unread"), fin), finFrame(ours.ID()))
		one.CloseWrite()
		synctest.Wait()
		if _, err := s.Open(nil); err != ErrTooManyStreams {
			t.Errorf("Open: %v, want ErrTooManyStreams", err)
		}
		readNow(t, one)
		again := openStream(t, s)
		ours.CloseWrite()
		openStream(t, s)
		again.Close()
		p.send(synFrame(r.theirs(4), "four"))
		if got := readNow(t, accept(t, s)); got != "four" {
			t.Errorf("read %q", got)
		}
		if got := s.Refused(); got != 2 {
			t.Errorf("Refused() is %d, want 2", got)
		}
	})
}

// TestIDsExhausted opens streams up to the last id and not beyond.
func TestIDsExhausted(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		last := uint32(maxID - 1 + r.odd) // the highest of our parity without the top bit
		s.mu.Lock()
		s.lastLocal = last - 4
		s.mu.Unlock()
		for _, want := range []uint32{last - 2, last} {
			st, err := s.Open(nil)
			if err != nil || st.ID() != want {
				t.Fatalf("Open: stream %v, %v, want %d", st, err, want)
			}
		}
		for range 3 {
			if _, err := s.Open(nil); err != ErrStreamsExhausted {
				t.Errorf("Open: %v, want ErrStreamsExhausted", err)
			}
		}
		synctest.Wait()
		if got := p.took(); len(got) != 2 || got[1].id != last {
			t.Errorf("the session sent %v", got)
		}
		p.send(dataFrame(last, []byte("x"), 0), synFrame(maxID-r.odd, "the peer's last")) // both still work
		if got := readNow(t, accept(t, s)); got != "the peer's last" {
			t.Errorf("read %q", got)
		}
	})
}

// TestFinAndReset maps what comes for a stream to what its reader and writer get.
// Only a FIN is a clean end, and only StreamClosed behind it leaves it one.
func TestFinAndReset(t *testing.T) {
	reset := func(code Code) error { return &StreamError{Code: code, Remote: true} }
	for _, test := range []struct {
		name            string
		frames          func(id uint32) []byte
		readErr, wrErr  error
		data            string
		recvEnd, sndEnd bool // as Ended says
	}{
		{"FIN", finFrame, io.EOF, nil, "", true, false},
		{"DATA and FIN", func(id uint32) []byte { return dataFrame(id, []byte("data"), fin) }, io.EOF, nil, "data", true, false},
		{"RST", func(id uint32) []byte { return rstFrame(id, StreamReset) }, reset(StreamReset), reset(StreamReset), "", false, true},
		{"RST NoError", func(id uint32) []byte { return rstFrame(id, NoError) }, reset(NoError), reset(NoError), "", false, true},
		{"RST of an unknown code", func(id uint32) []byte { return rstFrame(id, 1<<32-1) }, reset(1<<32 - 1), reset(1<<32 - 1), "", false, true},
		{"DATA, RST", func(id uint32) []byte {
			return append(dataFrame(id, []byte("data"), 0), rstFrame(id, StreamCancelled)...)
		}, reset(StreamCancelled), reset(StreamCancelled), "data", false, true},
		{"RST StreamClosed without FIN", func(id uint32) []byte {
			return append(dataFrame(id, []byte("data"), 0), rstFrame(id, StreamClosed)...)
		}, reset(StreamClosed), reset(StreamClosed), "data", false, true},
		{"FIN, RST StreamClosed", func(id uint32) []byte {
			return append(dataFrame(id, []byte("data"), fin), rstFrame(id, StreamClosed)...)
		}, io.EOF, reset(StreamClosed), "data", true, true},
		{"FIN, RST StreamReset", func(id uint32) []byte {
			return append(dataFrame(id, []byte("data"), fin), rstFrame(id, StreamReset)...)
		}, reset(StreamReset), reset(StreamReset), "data", false, true},
		{"RST, then DATA and FIN", func(id uint32) []byte {
			return slices.Concat(rstFrame(id, StreamReset), dataFrame(id, []byte("late"), fin), rstFrame(id, StreamClosed))
		}, reset(StreamReset), reset(StreamReset), "", false, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) {
				s, p := rawSession(t, r, Config{})
				p.send(synFrame(r.theirs(1), ""))
				for _, st := range []*Stream{accept(t, s), openStream(t, s)} {
					// A reader that waits may take the FIN before the RST has come.
					var waiting chan result
					if !strings.HasPrefix(test.name, "FIN, RST") {
						waiting = goReadAll(st)
					}
					synctest.Wait()
					p.send(test.frames(st.ID()))
					synctest.Wait()
					if waiting == nil {
						waiting = goReadAll(st)
					}
					got := <-waiting
					if got.err == nil {
						got.err = io.EOF
					}
					if string(got.b) != test.data || !sameError(got.err, test.readErr) {
						t.Errorf("read %q, %v, want %q, %v", got.b, got.err, test.data, test.readErr)
					}
					if ended, whole := st.Ended(); ended != test.sndEnd || whole != test.recvEnd {
						t.Errorf("Ended says %v, %v, want %v, %v", ended, whole, test.sndEnd, test.recvEnd)
					}
					if _, err := st.Write([]byte("x")); !sameError(err, test.wrErr) {
						t.Errorf("Write: %v, want %v", err, test.wrErr)
					}
					if _, err := st.ReadFrom(bytes.NewReader([]byte("x"))); !sameError(err, test.wrErr) {
						t.Errorf("ReadFrom: %v, want %v", err, test.wrErr)
					}
					if err := st.CloseWrite(); !sameError(err, test.wrErr) {
						t.Errorf("CloseWrite: %v, want %v", err, test.wrErr)
					}
					st.Close()
				}
			})
		})
	}
}

// sameError compares errors, and StreamErrors by what they say.
func sameError(got, want error) bool {
	g, ok1 := errors.AsType[*StreamError](got)
	w, ok2 := errors.AsType[*StreamError](want)
	if ok1 && ok2 {
		return *g == *w
	}
	return got == want
}

// TestDeadStreams passes over what comes for a stream that is over. A peer that is
// not of ours, and so was not told, is told once that nobody reads.
func TestDeadStreams(t *testing.T) {
	for _, stop := range []bool{false, true} {
		t.Run(fmt.Sprintf("stop=%v", stop), func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) {
				s, p := rawSession(t, r, Config{})
				if stop {
					s.EnableStop()
				}
				p.send(synFrame(r.theirs(1), ""), synFrame(r.theirs(2), ""))
				dead, alive := accept(t, s), accept(t, s)
				dead.Close()
				synctest.Wait()
				want := [][]byte{finFrame(dead.ID())}
				if stop {
					want = append(want, rstFrame(dead.ID(), StreamClosed))
				}
				if got := p.took(); !slices.EqualFunc(got, want, wireFrame.is) {
					t.Errorf("Close sent %v", got)
				}

				p.send(wndIncFrame(dead.ID(), 5), dataFrame(dead.ID(), make([]byte, Window+1), 0),
					dataFrame(dead.ID(), make([]byte, 1<<20), 0), finFrame(dead.ID()),
					dataFrame(dead.ID(), []byte("x"), fin), rstFrame(dead.ID(), StreamReset),
					dataFrame(alive.ID(), []byte("alive"), fin))
				if b, err := io.ReadAll(alive); string(b) != "alive" || err != nil {
					t.Errorf("another stream got %q, %v", b, err)
				}
				synctest.Wait()
				want = [][]byte{rstFrame(dead.ID(), StreamClosed)}
				if stop {
					want = nil
				}
				if got := p.took(); !slices.EqualFunc(got, want, wireFrame.is) {
					t.Errorf("frames for a dead stream were answered by %v, want %v", got, want)
				}
			})
		})
	}
}
