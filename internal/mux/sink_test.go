package mux

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tcprelay/relay/internal/splice"
)

// A basin is a sink that has room for some bytes, and waits or takes less when it is
// full.
type basin struct {
	mu      sync.Mutex
	changed sync.Cond
	b       []byte
	room    int
	err     error // of every write, or of the first try
	writes  int   // with a goroutine that could wait
}

func newBasin(room int) *basin {
	s := &basin{room: room}
	s.changed.L = &s.mu
	return s
}

// A basinTry is a basin's way that does not wait.
type basinTry struct{ *basin }

func (s basinTry) write(p []byte) (n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return 0, s.err
	}
	return s.takeLocked(p), nil
}

func (s basinTry) drain(*splice.Pipe) (int, error) { panic("this is no socket") }

func (s *basin) takeLocked(p []byte) int {
	n := min(len(p), s.room)
	s.b = append(s.b, p[:n]...)
	s.room -= n
	return n
}

func (s *basin) Write(p []byte) (n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writes++
	for {
		if s.err != nil {
			return n, s.err
		}
		if n += s.takeLocked(p[n:]); n == len(p) {
			return n, nil
		}
		s.changed.Wait()
	}
}

// add gives it room for n bytes more.
func (s *basin) add(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.room += n
	s.changed.Broadcast()
}

func (s *basin) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
	s.changed.Broadcast()
}

// startSinkOf has all that st receives written to s, and returns what tells the end.
func startSinkOf(st *Stream, s *basin) <-chan result {
	done := make(chan result, 2) // a second one is an error
	st.startSink(&sink{w: s, try: basinTry{s}, done: func(n int64, err error) { done <- result{n: n, err: err} }})
	return done
}

// TestSink gives a sink room in pieces that have nothing to do with the frames that come.
// It has every byte as soon as it can, in order, and so does the account of them.
func TestSink(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		p.send(synFrame(r.theirs(1), "opening "))
		st := accept(t, s)
		data := pattern(5, 20*Window)
		sink := newBasin(3)
		done := startSinkOf(st, sink)
		sent, room := 0, 3
		window := Window - 8
		for sent < len(data) || room < len(data)+8 {
			if rand.IntN(2) == 0 {
				n := min(rand.IntN(maxPayload), len(data)-sent, window)
				p.send(dataFrame(st.ID(), data[sent:sent+n], 0))
				sent += n
				window -= n
			} else {
				n := rand.IntN(2 * maxPayload)
				room += n
				sink.add(n)
			}
			synctest.Wait()
			for _, f := range p.took() {
				window += int(f.number(0))
			}
			has := min(room, 8+sent)
			got := st.Progress()
			if len(sink.b) != has || got.Received+int64(got.Unread) != int64(8+sent) || got.Received > int64(has) {
				t.Fatalf("of %d bytes, with room for %d, the sink has %d, and %+v shows", 8+sent, room, len(sink.b), got)
			}
		}
		if !bytes.Equal(sink.b, append([]byte("opening "), data...)) {
			t.Error("the sink has other bytes than were sent")
		}
		select {
		case got := <-done:
			t.Errorf("done was called: %+v", got)
		default:
		}
		writes := sink.writes
		sink.add(1000)
		for range 10 {
			p.send(dataFrame(st.ID(), []byte("x"), 0))
			synctest.Wait()
		}
		if sink.writes != writes {
			t.Error("a goroutine wrote what there was room for")
		}
		p.send(finFrame(st.ID()))
		if got := <-done; got.err != nil || got.n != int64(8+len(data)+10) {
			t.Errorf("done: %+v", got)
		}
	})
}

// A FIN behind all that a sink has had takes no goroutine to be passed on. One that a sink
// has yet to come to does not hold up the session's reader.
func TestSinkEndsAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		for i, test := range []struct {
			room     int
			byReader bool
		}{{100, true}, {4, false}} {
			s, p := rawSession(t, r, Config{})
			p.send(synFrame(r.theirs(1), "0123456789"))
			st := accept(t, s)
			to := newBasin(test.room)
			by := make(chan string, 2)
			st.startSink(&sink{w: to, try: basinTry{to}, done: func(int64, error) { by <- string(debug.Stack()) }})
			synctest.Wait()
			p.send(finFrame(st.ID()))
			synctest.Wait()
			to.add(100)
			stack := await(t, by, "the end")
			if got := strings.Contains(stack, "(*Session).readFrames"); got != test.byReader || string(to.b) != "0123456789" {
				t.Errorf("%d: %q came; the reader ended it: %v, want %v", i, to.b, got, test.byReader)
			}
		}
	})
}

// TestSinkEnds ends a sink in each way: while nothing waits, and while it takes nothing.
// Done is called once, with what WriteTo would return.
func TestSinkEnds(t *testing.T) {
	lost := errors.New("lost")
	reset := &StreamError{Code: StreamReset, Remote: true}
	ends := []struct {
		name string
		end  func(s *Session, p *rawPeer, st *Stream, sink *basin)
		want error
		full error // while it takes nothing; nil: it waits until it does
	}{
		{"FIN", func(_ *Session, p *rawPeer, st *Stream, _ *basin) { p.send(finFrame(st.ID())) }, nil, nil},
		{"RST", func(_ *Session, p *rawPeer, st *Stream, _ *basin) { p.send(rstFrame(st.ID(), StreamReset)) }, reset, nil},
		{"Close", func(_ *Session, _ *rawPeer, st *Stream, _ *basin) { st.Close() }, net.ErrClosed, nil},
		{"Close with a reset", func(_ *Session, _ *rawPeer, st *Stream, _ *basin) { st.SetLinger(0); st.Close() }, net.ErrClosed, nil},
		{"deadline", func(_ *Session, _ *rawPeer, st *Stream, _ *basin) {
			st.SetReadDeadline(time.Now().Add(time.Hour))
			time.Sleep(2 * time.Hour)
		}, os.ErrDeadlineExceeded, nil},
		{"deadline that has passed", func(_ *Session, _ *rawPeer, st *Stream, _ *basin) {
			st.SetReadDeadline(time.Unix(1, 0))
		}, os.ErrDeadlineExceeded, nil},
		{"session", func(s *Session, _ *rawPeer, _ *Stream, _ *basin) { s.Fail(NoError, lost) }, lost, nil},
		{"sink", func(_ *Session, p *rawPeer, st *Stream, sink *basin) {
			sink.fail(errEnough)
			p.send(dataFrame(st.ID(), []byte("x"), 0))
		}, errEnough, errEnough},
	}
	for _, e := range ends {
		for _, full := range []bool{false, true} {
			name := e.name
			if full {
				name += ", full"
			}
			t.Run(name, func(t *testing.T) {
				inBubble(t, func(t *testing.T, r role) {
					s, p := rawSession(t, r, Config{})
					p.send(synFrame(r.theirs(1), "0123456789"))
					st := accept(t, s)
					sink := newBasin(20)
					if full {
						sink.room = 5
					}
					done := startSinkOf(st, sink)
					synctest.Wait()
					e.end(s, p, st, sink)
					synctest.Wait()
					want := e.want
					if full && e.full == nil {
						select {
						case got := <-done:
							t.Fatalf("done was called before the sink took what it was given: %+v", got)
						default:
						}
						sink.add(10)
						synctest.Wait()
					}
					select {
					case got := <-done:
						if got.n != int64(len(sink.b)) {
							t.Errorf("done with %d bytes, and the sink has %d", got.n, len(sink.b))
						}
						se, _ := errors.AsType[*StreamError](got.err)
						if wantSE, ok := want.(*StreamError); ok && (se == nil || *se != *wantSE) || !ok && !errors.Is(got.err, want) {
							t.Errorf("done with %v, want %v", got.err, want)
						}
						if got.err == nil && got.n != 10 {
							t.Errorf("%d bytes before a FIN", got.n)
						}
					default:
						t.Fatal("done was not called")
					}
					st.Close()
					s.Close()
					synctest.Wait()
					if len(done) > 0 {
						t.Error("done was called twice")
					}
				})
			})
		}
	}
}

// partly takes some of the first that it is to write, while something else goes on.
type partly struct {
	basinTry
	n         int
	meanwhile func()
}

func (w *partly) write(p []byte) (int, error) {
	if w.meanwhile == nil {
		return w.basinTry.write(p)
	}
	w.meanwhile()
	w.meanwhile = nil
	return w.basinTry.write(p[:w.n])
}

// TestSinkBegins has everything happen to a stream while a new sink takes some of what
// waited: all that came gets there, in order, and then what ended it.
func TestSinkBegins(t *testing.T) {
	for _, test := range []struct {
		name      string
		meanwhile func(s *Session, p *rawPeer, st *Stream)
		got       string
		want      error
	}{
		{"FIN", func(_ *Session, p *rawPeer, st *Stream) { p.send(finFrame(st.ID())) }, "0123456789", nil},
		{"FIN and RST", func(_ *Session, p *rawPeer, st *Stream) {
			p.send(dataFrame(st.ID(), []byte("abc"), 0), finFrame(st.ID()), rstFrame(st.ID(), StreamClosed))
		}, "0123456789abc", nil},
		{"FIN and a lost session", func(s *Session, p *rawPeer, st *Stream) {
			p.send(finFrame(st.ID()))
			synctest.Wait()
			s.Fail(NoError, errEnough)
		}, "0123456789", nil},
		{"RST", func(_ *Session, p *rawPeer, st *Stream) {
			p.send(dataFrame(st.ID(), []byte("abc"), 0), rstFrame(st.ID(), StreamReset))
		}, "0123456789abc", &StreamError{Code: StreamReset, Remote: true}},
		{"Close", func(_ *Session, _ *rawPeer, st *Stream) { st.Close() }, "0123", net.ErrClosed},
		{"more", func(_ *Session, p *rawPeer, st *Stream) {
			p.send(dataFrame(st.ID(), []byte("abc"), 0))
			synctest.Wait()
			p.send(finFrame(st.ID()))
		}, "0123456789abc", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) {
				s, p := rawSession(t, r, Config{})
				p.send(synFrame(r.theirs(1), "0123456789"))
				st := accept(t, s)
				to := newBasin(1000)
				done := make(chan result, 2)
				first := &partly{basinTry{to}, 4, func() {
					test.meanwhile(s, p, st)
					synctest.Wait()
				}}
				st.startSink(&sink{w: to, try: first, done: func(n int64, err error) { done <- result{n: n, err: err} }})
				synctest.Wait()
				got := await(t, done, "the end")
				if string(to.b) != test.got || got.n != int64(len(test.got)) {
					t.Errorf("%q came, and %d bytes were counted", to.b, got.n)
				}
				se, _ := errors.AsType[*StreamError](got.err)
				if want, ok := test.want.(*StreamError); ok && (se == nil || *se != *want) || !ok && !errors.Is(got.err, test.want) {
					t.Errorf("ended with %v, want %v", got.err, test.want)
				}
				if n := st.Unread(); n != 0 {
					t.Errorf("%d bytes are counted unread", n)
				}
				if n := s.unread.Load(); n != 0 {
					t.Errorf("%d bytes of the session are", n)
				}
			})
		})
	}
}

// TestStartWriteTo carries much and little to sockets, of which one has a reader that
// pauses, and to what is none, with everything else that a stream does going on.
func TestStartWriteTo(t *testing.T) {
	c1, c2 := tcpPair(t)
	client, server := sessionPair(t, c1, c2, Config{})
	type wrapped struct{ net.Conn }
	var all sync.WaitGroup
	for i, name := range []string{"socket", "slow socket", "no socket"} {
		a, b := streamPair(t, client, server)
		out, dst := tcpPair(t)
		defer closeAll(out, dst)
		all.Go(func() {
			for at := int64(0); at < 20<<20; {
				piece := make([]byte, 1+rand.IntN(1+rand.IntN(300_000)))
				(&patternReader{i, at}).Read(piece)
				a.Write(piece)
				at += int64(len(piece))
			}
			a.CloseWrite()
		})
		done := make(chan result, 1)
		var w io.Writer = out
		if name == "no socket" {
			w = wrapped{out}
		}
		b.StartWriteTo(w, func(n int64, err error) {
			out.(*net.TCPConn).CloseWrite()
			done <- result{n: n, err: err}
		})
		all.Go(func() {
			want := &patternReader{i, 0}
			buf, wantBuf := make([]byte, 100_000), make([]byte, 100_000)
			for {
				if name == "slow socket" && rand.IntN(20) == 0 {
					b.Progress()
					b.SetReadDeadline(time.Now().Add(time.Hour))
				}
				n, err := dst.Read(buf)
				at := want.at
				want.Read(wantBuf[:n])
				if string(buf[:n]) != string(wantBuf[:n]) {
					t.Errorf("%s: other bytes than were written, from %d on", name, at)
				}
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Errorf("%s: %v", name, err)
					break
				}
			}
			sent, _ := a.Counts()
			if got := await(t, done, "end of StartWriteTo"); got.err != nil || got.n != sent || want.at != sent {
				t.Errorf("%s: %+v; %d bytes were sent, and %d came", name, got, sent, want.at)
			}
		})
	}
	all.Wait()
}
