package mux

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// checkKept holds what Kept returns against want; nil means that it must be nothing,
// and no refusal.
func checkKept(t *testing.T, st *Stream, want []byte) {
	t.Helper()
	switch b, ok := st.Kept(); {
	case ok != (want != nil):
		t.Errorf("Kept says %v, want %v", ok, !ok)
	case !bytes.Equal(b, want):
		t.Errorf("kept %d bytes, or other ones, want %d", len(b), len(want))
	}
}

// TestKept takes bytes in all ways and sizes and has the peer refuse them, or end the
// stream with another code.
func TestKept(t *testing.T) {
	sizes := []int{0, 1, smallData, smallData + 1, maxPayload, maxPayload + 1, Window - 8}
	for code := range EnhanceYourCalm + 2 {
		for way, take := range map[string]func(*Stream, []byte) error{
			"Write": func(st *Stream, b []byte) error {
				defer clear(b) // it is ours again
				_, err := st.Write(b)
				return err
			},
			"ReadFrom": func(st *Stream, b []byte) error {
				_, err := st.ReadFrom(bytes.NewReader(b))
				return err
			},
			"both": func(st *Stream, b []byte) error {
				for piece := range len(b) / 3 {
					if piece == 3 {
						break
					}
					if _, err := st.Write(b[:piece]); err != nil {
						return err
					}
					b = b[piece:]
				}
				_, err := st.ReadFrom(bytes.NewReader(b))
				return err
			},
		} {
			t.Run(fmt.Sprintf("%v/%s", code, way), func(t *testing.T) {
				inBubble(t, func(t *testing.T, r role) {
					s, p := rawSession(t, r, Config{})
					for _, size := range sizes {
						st, err := s.Open([]byte("opening")) // which is not kept
						if err != nil {
							t.Fatal(err)
						}
						st.Keep(Window)
						checkKept(t, st, nil)
						if err := take(st, pattern(1, size)); err != nil {
							t.Fatal(err)
						}
						checkKept(t, st, nil)
						p.send(rstFrame(st.ID(), code))
						synctest.Wait()
						var want []byte
						if code == StreamRefused || code == AcceptQueueFull {
							want = append([]byte{}, pattern(1, size)...)
						}
						for range 2 {
							checkKept(t, st, want)
						}
						if _, err := st.Write([]byte("x")); !sameError(err, &StreamError{code, true}) {
							t.Errorf("Write: %v", err)
						}
						checkKept(t, st, want)
						st.Close()
						checkKept(t, st, nil)
					}
				})
			})
		}
	}
}

// TestKeepDrops drops the copy when the peer shows that the bytes are in use, when it
// gets too large, and when the stream ends otherwise; and for good.
func TestKeepDrops(t *testing.T) {
	type env struct {
		t  *testing.T
		s  *Session
		p  *rawPeer
		st *Stream
	}
	for _, test := range []struct {
		name string
		do   func(env)
		kept bool
	}{
		{"nothing", func(env) {}, true},
		{"half-close", func(e env) { e.st.CloseWrite() }, true},
		{"empty DATA", func(e env) { e.p.send(dataFrame(e.st.ID(), nil, 0)) }, true},
		{"DATA for others", func(e env) {
			e.p.send(dataFrame(openStream(e.t, e.s).ID(), []byte("x"), fin))
		}, true},
		{"up to the limit", func(e env) { e.st.Write(make([]byte, 996)) }, true},
		{"beyond the limit", func(e env) { e.st.Write(make([]byte, 997)) }, false},
		{"far beyond the limit", func(e env) { e.st.Write(make([]byte, Window-4)) }, false},
		{"ReadFrom up to the limit", func(e env) { e.st.ReadFrom(bytes.NewReader(make([]byte, 996))) }, true},
		{"ReadFrom beyond the limit", func(e env) { e.st.ReadFrom(bytes.NewReader(make([]byte, 997))) }, false},
		{"large ReadFrom beyond the limit", func(e env) { e.st.ReadFrom(bytes.NewReader(make([]byte, Window-5))) }, false},
		{"DATA", func(e env) { e.p.send(dataFrame(e.st.ID(), []byte("x"), 0)) }, false},
		{"DATA that was read", func(e env) {
			e.p.send(dataFrame(e.st.ID(), []byte("x"), 0))
			e.st.Read(make([]byte, 1))
		}, false},
		{"DATA, then Keep", func(e env) {
			e.p.send(dataFrame(e.st.ID(), []byte("x"), 0))
			synctest.Wait()
			readNow(e.t, e.st)
			e.st.Keep(1000)
		}, false},
		{"FIN", func(e env) { e.p.send(finFrame(e.st.ID())) }, false},
		{"FIN, then Keep", func(e env) { e.p.send(finFrame(e.st.ID())); synctest.Wait(); e.st.Keep(1000) }, false},
		{"WNDINC", func(e env) { e.p.send(wndIncFrame(e.st.ID(), 1)) }, false},
		{"RST", func(e env) { e.p.send(rstFrame(e.st.ID(), StreamReset)) }, false},
		{"RST, then Keep", func(e env) {
			e.p.send(rstFrame(e.st.ID(), StreamReset))
			synctest.Wait()
			e.st.Keep(1000)
		}, false},
		{"RST of ours", func(e env) { e.st.abort(EnhanceYourCalm, &StreamError{Code: StreamRefused}) }, false},
		{"Close", func(e env) { e.st.Close() }, false},
		{"Close, then Keep", func(e env) { e.st.Close(); e.st.Keep(1000) }, false},
		{"Refuse", func(e env) { e.st.Refuse() }, false},
		{"loss of the transport", func(e env) { e.p.conn.Close() }, false},
		{"Session.Close", func(e env) { e.s.Close() }, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) {
				s, p := rawSession(t, r, Config{})
				st := openStream(t, s)
				st.Keep(1000)
				st.Write([]byte("some"))
				test.do(env{t, s, p, st})
				synctest.Wait()
				p.sendInto(rstFrame(st.ID(), StreamRefused))
				synctest.Wait()
				if _, ok := st.Kept(); ok != test.kept {
					t.Errorf("Kept says %v", ok)
				}
				if st.mu.Lock(); !test.kept && st.kept != nil {
					t.Error("the copy is still there")
				}
				st.mu.Unlock()
			})
		})
	}
}

// TestKeepLate calls Keep when the refusal has come already, as it may at any time.
func TestKeepLate(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		st := openStream(t, s)
		checkKept(t, st, nil)
		p.send(rstFrame(st.ID(), AcceptQueueFull))
		synctest.Wait()
		checkKept(t, st, nil)
		st.Keep(0)
		checkKept(t, st, []byte{})
		src := bytes.NewReader([]byte("nothing is read of it"))
		if n, err := st.ReadFrom(src); n != 0 || !sameError(err, &StreamError{AcceptQueueFull, true}) || src.Len() != 21 {
			t.Errorf("ReadFrom: %d, %v; %d bytes are left", n, err, src.Len())
		}
		checkKept(t, st, []byte{})
	})
}

// TestKeptUnseen keeps the bytes of a stream that the peer says, when it goes away, it
// has never seen.
func TestKeptUnseen(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		seen, unseen := openStream(t, s), openStream(t, s)
		for _, st := range []*Stream{seen, unseen} {
			st.Keep(1000)
			st.Write([]byte("bytes"))
		}
		p.send(goAwayFrame(seen.ID(), NoError, ""))
		synctest.Wait()
		checkKept(t, seen, nil)
		checkKept(t, unseen, []byte("bytes"))
		p.conn.Close()
		<-s.Done()
		checkKept(t, seen, nil)
		checkKept(t, unseen, []byte("bytes"))
	})
}

// A countedSource is a source of a pattern's bytes that comes to an end.
type countedSource struct {
	seed  int
	taken int
	read  func(p []byte) (int, error) // how many of them are there
}

func (c *countedSource) Read(p []byte) (int, error) {
	n, err := c.read(p)
	(&patternReader{c.seed, int64(c.taken)}).Read(p[:n])
	c.taken += n
	return n, err
}

// TestKeptOfReadFrom has the refusal come while ReadFrom has bytes in hand that it
// cannot send: they are kept, all of them, once, and behind what was sent before.
func TestKeptOfReadFrom(t *testing.T) {
	for _, test := range []struct {
		name string
		// Before: by a Write while ReadFrom waits for its source, so that what it reads
		// then has to wait. Negative: by one that is still under way.
		write int
		n     int // bytes that it reads, of 1000 that it saw room for
	}{
		{"small", 0, 1},
		{"no window", 1000, 1000},
		{"window for a part", 999, 1000},
		{"window for most", 1, 1000},
		{"window for all", 0, 1000},
		{"no turn", -2000, 1000},
		{"no turn, small", -1001, 1},
	} {
		for _, how := range []struct {
			name string
			end  func(*Stream, *rawPeer)
			kept bool
		}{
			{"refused", func(st *Stream, p *rawPeer) { p.send(rstFrame(st.ID(), StreamRefused)) }, true},
			{"no room at the peer", func(st *Stream, p *rawPeer) { p.send(rstFrame(st.ID(), AcceptQueueFull)) }, true},
			{"unseen", func(st *Stream, p *rawPeer) { p.send(goAwayFrame(0, NoError, "")) }, true},
			{"reset", func(st *Stream, p *rawPeer) { p.send(rstFrame(st.ID(), StreamReset)) }, false},
			{"lost", func(_ *Stream, p *rawPeer) { p.conn.Close() }, false},
			{"closed", func(st *Stream, _ *rawPeer) { st.Close() }, false},
			// These lose what ReadFrom had in hand, if anything, and so the copy is not
			// whole when a refusal comes.
			{"timed out, refused", func(st *Stream, p *rawPeer) {
				st.SetWriteDeadline(time.Now())
				synctest.Wait()
				p.send(rstFrame(st.ID(), StreamRefused))
			}, test.n <= 1000-test.write && test.write >= 0},
			{"half-closed, refused", func(st *Stream, p *rawPeer) {
				st.CloseWrite()
				synctest.Wait()
				p.send(rstFrame(st.ID(), StreamRefused))
			}, test.n <= 1000-test.write && test.write >= 0},
		} {
			t.Run(test.name+"/"+how.name, func(t *testing.T) {
				inBubble(t, func(t *testing.T, r role) {
					s, p := rawSession(t, r, Config{})
					st := openStream(t, s)
					st.Keep(1 << 20)
					want := pattern(1, Window-1000)
					st.Write(want)
					src := &countedSource{seed: 2}
					wait, more := make(chan int), make(chan struct{})
					src.read = func([]byte) (int, error) {
						select {
						case n := <-wait:
							return n, nil
						case <-more:
							return 0, io.EOF
						}
					}
					copied := make(chan result, 1)
					go func() {
						n, err := st.ReadFrom(src)
						copied <- result{n: n, err: err}
					}()
					synctest.Wait()
					written := make(chan result, 1)
					if test.write >= 0 {
						st.Write(pattern(3, test.write))
						want = append(want, pattern(3, test.write)...)
					} else {
						written = goWrite(st, pattern(3, -test.write))
						synctest.Wait()
						want = append(want, pattern(3, -test.write)[:1000]...) // it took no more
					}
					wait <- test.n
					want = append(want, pattern(2, test.n)...)
					synctest.Wait()
					how.end(st, p)
					synctest.Wait()
					close(more) // as a source would be told that waits
					if got := <-copied; src.taken != test.n || got.n > int64(test.n) {
						t.Errorf("ReadFrom read %d bytes and sent %d, %v; want %d", src.taken, got.n, got.err, test.n)
					}
					if test.write < 0 {
						if got := <-written; got.n != 1000 || got.err == nil {
							t.Errorf("Write: %d, %v", got.n, got.err)
						}
					}
					if !how.kept {
						want = nil
					}
					checkKept(t, st, want)
				})
			})
		}
	}
}

// TestKeptWithSourceError has the source say in one Read its last bytes, which cannot
// be sent any more, and how it ended. An error of its own would not show again.
func TestKeptWithSourceError(t *testing.T) {
	refused := &StreamError{StreamRefused, true}
	for _, test := range []struct{ says, want error }{
		{nil, refused}, {io.EOF, refused}, {syscall.ECONNRESET, syscall.ECONNRESET},
	} {
		inBubble(t, func(t *testing.T, r role) {
			s, p := rawSession(t, r, Config{})
			st := openStream(t, s)
			st.Keep(1000)
			src := &countedSource{seed: 2, read: func([]byte) (int, error) {
				p.send(rstFrame(st.ID(), StreamRefused))
				synctest.Wait()
				return 100, test.says
			}}
			if n, err := st.ReadFrom(src); n != 0 || !sameError(err, test.want) {
				t.Errorf("ReadFrom: %d, %v, want %v", n, err, test.want)
			}
			checkKept(t, st, pattern(2, 100))
		})
	}
}

// TestKeptOfSocket has the refusal come while ReadFrom waits for a socket, reads it or
// sends from it. What the peer refused and what the socket still has is all of it.
func TestKeptOfSocket(t *testing.T) {
	for i := range 200 {
		src, in := tcpPair(t)
		c1, c2 := tcpPair(t)
		client, server := sessionPair(t, c1, c2, Config{})
		st, far := streamPair(t, client, server)
		st.Keep(2 * Window)
		data := pattern(i, i*i*10)
		go func() {
			for rest := data; len(rest) > 0; {
				n, _ := src.Write(rest[:min(len(rest), 1+i*100)])
				rest = rest[n:]
			}
			src.(*net.TCPConn).CloseWrite()
		}()
		copied := make(chan error, 1)
		go func() {
			_, err := st.ReadFrom(in)
			copied <- err
		}()
		for far.Unread() < min(len(data)*(i%4)/3, Window) { // none of it up to all
			runtime.Gosched()
		}
		if err := far.Refuse(); err != nil {
			t.Errorf("Refuse: %v", err)
		}
		refused := make(chan struct{})
		st.OnEnd(func(error) { close(refused) })
		await(t, refused, "refusal")
		in.SetReadDeadline(time.Unix(1, 0))
		if err := await(t, copied, "end of ReadFrom"); err != nil &&
			!sameError(err, &StreamError{StreamRefused, true}) && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("ReadFrom: %v", err)
		}
		kept, ok := st.Kept()
		if !ok {
			t.Fatal("nothing is kept")
		}
		in.SetReadDeadline(time.Time{})
		// The next one goes on where this one stopped.
		again, farAgain := streamPair(t, client, server)
		read := goReadAll(farAgain)
		if _, err := again.Write(kept); err != nil {
			t.Errorf("Write: %v", err)
		}
		if _, err := again.ReadFrom(in); err != nil {
			t.Errorf("ReadFrom: %v", err)
		}
		again.CloseWrite()
		if got := await(t, read, "end of the bytes"); !bytes.Equal(got.b, data) || got.err != nil {
			t.Errorf("%d bytes came, or other ones, want %d: %v", len(got.b), len(data), got.err)
		}
		closeAll(src, in, client, server)
	}
}

// TestRefuse resets with StreamRefused only what nobody has used.
func TestRefuse(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(*testing.T, *Stream, *rawPeer)
		want Code
	}{
		{"nothing", func(*testing.T, *Stream, *rawPeer) {}, StreamRefused},
		{"Peek", func(_ *testing.T, st *Stream, _ *rawPeer) { st.Peek(make([]byte, 100)) }, StreamRefused},
		{"more came", func(_ *testing.T, st *Stream, p *rawPeer) {
			p.send(dataFrame(st.ID(), make([]byte, 100_000), 0))
		}, StreamRefused},
		{"FIN came", func(_ *testing.T, st *Stream, p *rawPeer) { p.send(finFrame(st.ID())) }, StreamRefused},
		{"looked at", func(_ *testing.T, st *Stream, _ *rawPeer) {
			st.Counts()
			st.Progress()
			st.SetLinger(0)
			st.SetDeadline(time.Unix(1, 0))
			st.Read(make([]byte, 1))
			st.Read(nil)
			st.Write([]byte("x"))
			st.SetDeadline(time.Time{})
			st.Read(nil)
			st.Write(nil)
			st.ReadFrom(bytes.NewReader(nil))
		}, StreamRefused},
		{"Read", func(_ *testing.T, st *Stream, _ *rawPeer) { st.Read(make([]byte, 1)) }, StreamReset},
		{"Read of the end", func(_ *testing.T, st *Stream, p *rawPeer) {
			st.Read(make([]byte, 100))
			p.send(finFrame(st.ID()))
			st.Read(make([]byte, 1))
		}, StreamReset},
		{"Read of nothing but the end", func(_ *testing.T, st *Stream, p *rawPeer) {
			p.send(finFrame(st.ID()))
			st.Read(make([]byte, 1))
		}, StreamReset},
		{"WriteTo", func(t *testing.T, st *Stream, _ *rawPeer) {
			pr, pw := io.Pipe() // nobody reads: nothing counts as received
			t.Cleanup(func() { pr.Close() })
			go st.WriteTo(pw)
			synctest.Wait()
			if _, n := st.Counts(); n != 0 {
				t.Errorf("%d bytes were received", n)
			}
		}, StreamReset},
		{"Write", func(_ *testing.T, st *Stream, _ *rawPeer) { st.Write([]byte("x")) }, StreamReset},
		{"ReadFrom", func(_ *testing.T, st *Stream, _ *rawPeer) { st.ReadFrom(bytes.NewReader([]byte("x"))) }, StreamReset},
		{"CloseWrite", func(_ *testing.T, st *Stream, _ *rawPeer) { st.CloseWrite() }, StreamReset},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) {
				s, p := rawSession(t, r, Config{})
				opening := "bytes"
				if test.name == "Read of nothing but the end" {
					opening = ""
				}
				p.send(synFrame(r.theirs(1), opening))
				st := accept(t, s)
				test.do(t, st, p)
				synctest.Wait()
				p.took()
				if err := st.Refuse(); err != nil {
					t.Errorf("Refuse: %v", err)
				}
				synctest.Wait()
				if f := p.takeOne(); !f.is(rstFrame(st.ID(), test.want)) {
					t.Errorf("the session sent %v, want an RST with %v", f, test.want)
				}
				if n := openStreams(s); n != 0 {
					t.Errorf("%d streams are left", n)
				}
				for name, end := range map[string]func() error{"Refuse": st.Refuse, "Close": st.Close} {
					if err := end(); err != net.ErrClosed {
						t.Errorf("%s behind it: %v", name, err)
					}
				}
				if _, err := st.Read(make([]byte, 1)); err != net.ErrClosed {
					t.Errorf("Read: %v", err)
				}
				p.send(dataFrame(st.ID(), []byte("late"), 0), finFrame(st.ID()))
				synctest.Wait()
			})
		})
	}
}

// TestRefuseEnded refuses streams that are over in some way. Nothing is said of that.
func TestRefuseEnded(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		p.send(synFrame(r.theirs(1), "one"), synFrame(r.theirs(2), "two"), synFrame(r.theirs(3), "three"),
			rstFrame(r.theirs(1), StreamCancelled))
		one, two, three := accept(t, s), accept(t, s), accept(t, s)
		two.Close()
		synctest.Wait()
		p.took()
		if err := one.Refuse(); err != nil {
			t.Errorf("Refuse of a stream that the peer reset: %v", err)
		}
		if err := two.Refuse(); err != net.ErrClosed {
			t.Errorf("Refuse of a closed stream: %v", err)
		}
		synctest.Wait()
		p.takeNone()
		s.Close()
		if err := three.Refuse(); err != nil {
			t.Errorf("Refuse of a lost stream: %v", err)
		}
		if n := s.unread.Load(); n != 0 {
			t.Errorf("%d bytes are left", n)
		}
	})
}

// TestRefuseUnblocks ends the calls of a stream that wait.
func TestRefuseUnblocks(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		p.send(synFrame(r.theirs(1), ""))
		st := accept(t, s)
		calls := startStuckCalls(st)
		st.Refuse()
		calls.check(t, net.ErrClosed, net.ErrClosed)
	})
}
