package mux

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inconshreveable/muxado/frame"
)

// stopModes are whether sessions know their peers to be of this package.
var stopModes = []struct {
	name string
	set  func(...*Session)
}{
	{"stop", func(sessions ...*Session) {
		for _, s := range sessions {
			s.EnableStop()
		}
	}},
	{"plain", func(...*Session) {}},
}

// TestHalfClose sends all, half-closes and reads the answer, in both directions and
// over all transports.
func TestHalfClose(t *testing.T) {
	for _, tr := range transports {
		for _, mode := range stopModes {
			t.Run(tr.name+"/"+mode.name, func(t *testing.T) {
				c1, c2 := tr.pair(t)
				client, server := sessionPair(t, c1, c2, Config{})
				mode.set(client, server)
				a, b := streamPair(t, client, server)
				c, d := streamPair(t, server, client)
				var all sync.WaitGroup
				for i, ends := range [][2]*Stream{{a, b}, {c, d}} {
					asks, answers := ends[0], ends[1]
					question, answer := pattern(i, 3*Window+i), pattern(i+9, 5*Window+i)
					all.Go(func() {
						if _, err := asks.Write(question); err != nil {
							t.Errorf("Write: %v", err)
						}
						for range 2 { // the second does nothing
							if err := asks.CloseWrite(); err != nil {
								t.Errorf("CloseWrite: %v", err)
							}
						}
						if _, err := asks.Write([]byte("x")); err != syscall.EPIPE {
							t.Errorf("Write after CloseWrite: %v", err)
						}
						if got, err := io.ReadAll(asks); !bytes.Equal(got, answer) || err != nil {
							t.Errorf("the answer: %d bytes of %d, or other ones: %v", len(got), len(answer), err)
						}
						if err := asks.Close(); err != nil {
							t.Errorf("Close: %v", err)
						}
					})
					all.Go(func() {
						if got, err := io.ReadAll(answers); !bytes.Equal(got, question) || err != nil {
							t.Errorf("the question: %d bytes of %d, or other ones: %v", len(got), len(question), err)
						}
						if _, err := answers.Write(answer); err != nil {
							t.Errorf("Write behind a FIN: %v", err)
						}
						if err := answers.Close(); err != nil {
							t.Errorf("Close: %v", err)
						}
						if err := answers.Close(); err != net.ErrClosed {
							t.Errorf("Close again: %v", err)
						}
						if err := answers.CloseWrite(); err != net.ErrClosed {
							t.Errorf("CloseWrite after Close: %v", err)
						}
					})
				}
				all.Wait()
				for _, s := range []*Session{client, server} {
					if n := openStreams(s); n != 0 {
						t.Errorf("%d streams are left", n)
					}
				}
			})
		}
	}
}

// openStreams counts the streams in the table.
func openStreams(s *Session) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.streams)
}

// TestOverBothWays takes a stream out of the table when both FINs went and all is
// read, although nobody closed it.
func TestOverBothWays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := pipeStreams(t, Config{})
		a.Write([]byte("abc"))
		a.CloseWrite()
		b.CloseWrite()
		synctest.Wait()
		if na, nb := openStreams(a.s), openStreams(b.s); na != 0 || nb != 1 {
			t.Errorf("%d and %d streams are open, want 0 and the one that is unread", na, nb)
		}
		if b, err := io.ReadAll(b); string(b) != "abc" || err != nil {
			t.Errorf("read %q, %v", b, err)
		}
		if n := openStreams(b.s); n != 0 {
			t.Errorf("%d streams are open when all is read", n)
		}
		if b, err := io.ReadAll(a); len(b) != 0 || err != nil {
			t.Errorf("read %q, %v", b, err)
		}
	})
}

// TestCloseDelivers closes a stream behind its last bytes. The peer gets them all and
// a clean end; what it writes from then on fails, at once between ends of this
// package and otherwise when it was told.
func TestCloseDelivers(t *testing.T) {
	for _, mode := range stopModes {
		t.Run(mode.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := pipeStreams(t, Config{})
				mode.set(a.s, b.s)
				data := pattern(1, Window)
				ended := make(chan error, 1)
				b.OnEnd(func(err error) { ended <- err })
				if _, err := a.Write(data); err != nil {
					t.Fatal(err)
				}
				a.Close()
				synctest.Wait()
				if mode.name == "plain" {
					if n, err := b.Write([]byte("x")); n != 1 || err != nil {
						t.Errorf("the first Write to a stream that nobody reads: %d, %v", n, err)
					}
				}
				want := &StreamError{Code: StreamClosed, Remote: true}
				if err := <-ended; !sameError(err, want) {
					t.Errorf("OnEnd got %v, want %v", err, want)
				}
				if ended, whole := b.Ended(); !ended || !whole {
					t.Errorf("Ended says %v, %v", ended, whole)
				}
				if _, err := b.Write([]byte("x")); !sameError(err, want) || !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("Write: %v, want %v", err, want)
				}
				if got, err := io.ReadAll(b); !bytes.Equal(got, data) || err != nil {
					t.Errorf("read %d bytes of %d, or other ones: %v", len(got), len(data), err)
				}
				if na, nb := openStreams(a.s), openStreams(b.s); na != 0 || nb != 0 {
					t.Errorf("%d and %d streams are left", na, nb)
				}
			})
		})
	}
}

// TestCloseUnblocksPeer closes a stream that the peer waits to write to.
func TestCloseUnblocksPeer(t *testing.T) {
	for _, mode := range stopModes {
		t.Run(mode.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := pipeStreams(t, Config{})
				mode.set(a.s, b.s)
				written := goWrite(b, make([]byte, 10*Window))
				synctest.Wait()
				a.Close()
				got := <-written
				if want := (&StreamError{Code: StreamClosed, Remote: true}); !sameError(got.err, want) {
					t.Errorf("Write: %v, want %v", got.err, want)
				}
				if _, err := b.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("Read: %v, want the clean end that Close is", err)
				}
			})
		})
	}
}

// TestCloseSends looks at the frames of a Close.
func TestCloseSends(t *testing.T) {
	closedRst := func(id uint32) []byte { return rstFrame(id, StreamClosed) }
	resetRst := func(id uint32) []byte { return rstFrame(id, StreamReset) }
	nothing := func(*Stream) {}
	for _, test := range []struct {
		name   string
		frames func(id uint32) [][]byte // of the peer
		before func(*Stream)
		stop   []func(uint32) []byte // what Close sends to a peer of ours
		plain  []func(uint32) []byte // and to any other
	}{
		{"fresh", nil, nothing, list(finFrame, closedRst), list(finFrame)},
		{"unread", func(id uint32) [][]byte { return [][]byte{dataFrame(id, []byte("x"), 0)} },
			nothing, list(finFrame, closedRst), list(finFrame, closedRst)},
		{"half-closed by the peer", func(id uint32) [][]byte { return [][]byte{finFrame(id)} },
			nothing, list(finFrame), list(finFrame)},
		{"unread and half-closed by the peer", func(id uint32) [][]byte { return [][]byte{dataFrame(id, []byte("x"), fin)} },
			nothing, list(finFrame), list(finFrame)},
		{"half-closed here", nil, func(st *Stream) { st.CloseWrite() }, list(closedRst), nil},
		{"half-closed both ways", func(id uint32) [][]byte { return [][]byte{finFrame(id)} },
			func(st *Stream) { st.CloseWrite() }, nil, nil},
		{"reset by the peer", func(id uint32) [][]byte { return [][]byte{rstFrame(id, StreamReset)} }, nothing, nil, nil},

		{"linger 0", nil, func(st *Stream) { st.SetLinger(0) }, list(resetRst), list(resetRst)},
		{"linger 0, then again", nil, func(st *Stream) { st.SetLinger(0); st.SetLinger(-1) },
			list(finFrame, closedRst), list(finFrame)},
		{"linger 5", nil, func(st *Stream) { st.SetLinger(5) }, list(finFrame, closedRst), list(finFrame)},
		{"linger 0, half-closed here", nil, func(st *Stream) { st.CloseWrite(); st.SetLinger(0) }, list(resetRst), list(resetRst)},
		{"linger 0, half-closed by the peer", func(id uint32) [][]byte { return [][]byte{finFrame(id)} },
			func(st *Stream) { st.SetLinger(0) }, list(resetRst), list(resetRst)},
		{"linger 0, half-closed both ways", func(id uint32) [][]byte { return [][]byte{finFrame(id)} },
			func(st *Stream) { st.CloseWrite(); st.SetLinger(0) }, nil, nil},
		{"linger 0, reset by the peer", func(id uint32) [][]byte { return [][]byte{rstFrame(id, StreamReset)} },
			func(st *Stream) { st.SetLinger(0) }, nil, nil},
	} {
		for _, mode := range stopModes {
			t.Run(test.name+"/"+mode.name, func(t *testing.T) {
				inBubble(t, func(t *testing.T, r role) {
					s, p := rawSession(t, r, Config{})
					mode.set(s)
					st := openStream(t, s)
					if test.frames != nil {
						p.send(test.frames(st.ID())...)
					}
					synctest.Wait()
					test.before(st)
					synctest.Wait()
					p.took()
					if err := st.Close(); err != nil {
						t.Errorf("Close: %v", err)
					}
					synctest.Wait()
					want := test.plain
					if mode.name == "stop" {
						want = test.stop
					}
					frames := p.took()
					if !slices.EqualFunc(frames, want, func(f wireFrame, lay func(uint32) []byte) bool { return f.is(lay(st.ID())) }) {
						t.Errorf("Close sent %v", frames)
					}
					if err := st.Close(); err != net.ErrClosed {
						t.Errorf("Close again: %v", err)
					}
					if _, err := st.Read(make([]byte, 1)); err != net.ErrClosed {
						t.Errorf("Read: %v", err)
					}
					if _, err := st.Write(make([]byte, 1)); err != net.ErrClosed {
						t.Errorf("Write: %v", err)
					}
					if n := openStreams(s); n != 0 {
						t.Errorf("%d streams are left", n)
					}
					if n := s.unread.Load(); n != 0 {
						t.Errorf("%d bytes are left", n)
					}
				})
			})
		}
	}
}

func list[T any](v ...T) []T { return v }

// TestAbort resets a stream behind bytes that the peer has not read yet. It gets an
// error, before or behind those, and never a clean end.
func TestAbort(t *testing.T) {
	for _, tr := range transports {
		for _, mode := range stopModes {
			for _, size := range []int{0, 1, smallData, maxPayload, Window} {
				t.Run(fmt.Sprintf("%s/%s/%d", tr.name, mode.name, size), func(t *testing.T) {
					c1, c2 := tr.pair(t)
					client, server := sessionPair(t, c1, c2, Config{})
					mode.set(client, server)
					a, b := streamPair(t, client, server)
					ended := make(chan error, 1)
					b.OnEnd(func(err error) { ended <- err })
					data := pattern(2, size)
					if _, err := a.Write(data); err != nil {
						t.Fatal(err)
					}
					a.SetLinger(0)
					a.Close()
					got, err := io.ReadAll(b)
					want := &StreamError{Code: StreamReset, Remote: true}
					if !sameError(err, want) {
						t.Errorf("Read: %v, want %v", err, want)
					}
					if !bytes.HasPrefix(data, got) {
						t.Error("read other bytes than were written")
					}
					if _, err := b.Write([]byte("x")); !sameError(err, want) {
						t.Errorf("Write: %v, want %v", err, want)
					}
					if err := await(t, ended, "call of OnEnd"); !sameError(err, want) {
						t.Errorf("OnEnd: %v, want %v", err, want)
					}
					if ended, whole := b.Ended(); !ended || whole {
						t.Errorf("Ended says %v, %v", ended, whole)
					}
				})
			}
		}
	}
}

// stuckCalls are calls of a stream that wait: for bytes, for window or the transport,
// and for each other.
type stuckCalls struct{ read, writeTo, write, second, readFrom chan result }

func startStuckCalls(st *Stream) (c stuckCalls) {
	c.write = goWrite(st, make([]byte, 2*Window))
	synctest.Wait()
	c.second = goWrite(st, []byte("second"))
	c.readFrom, c.writeTo = make(chan result, 1), make(chan result, 1)
	go func() {
		n, err := st.ReadFrom(zeros{})
		c.readFrom <- result{n: n, err: err}
	}()
	go func() {
		n, err := st.WriteTo(io.Discard)
		c.writeTo <- result{n: n, err: err}
	}()
	c.read = make(chan result, 1)
	go func() {
		n, err := st.Read(make([]byte, 1))
		c.read <- result{n: int64(n), err: err}
	}()
	synctest.Wait()
	return c
}

func (c stuckCalls) check(t *testing.T, readErr, writeErr error) {
	t.Helper()
	synctest.Wait()
	for _, call := range []struct {
		name string
		ch   chan result
		want error
	}{
		{"Read", c.read, readErr}, {"WriteTo", c.writeTo, readErr},
		{"Write", c.write, writeErr}, {"a second Write", c.second, writeErr}, {"ReadFrom", c.readFrom, writeErr},
	} {
		select {
		case got := <-call.ch:
			if !sameError(got.err, call.want) {
				t.Errorf("%s: %v, want %v", call.name, got.err, call.want)
			}
		default:
			if call.want != nil {
				t.Errorf("%s still waits", call.name)
			}
		}
	}
}

// TestUnblock ends in all ways a stream whose calls wait, while the peer gives no
// window and while the transport takes no byte. No way takes time, and all calls
// return with the error that it gives them.
func TestUnblock(t *testing.T) {
	for _, stuck := range []string{"window", "transport"} {
		for _, test := range []struct {
			name              string
			end               func(*Stream, *rawPeer)
			readErr, writeErr error // nil: the calls go on waiting
			lost              bool  // the errors are the session's
		}{
			{"Close", func(st *Stream, _ *rawPeer) { st.Close() }, net.ErrClosed, net.ErrClosed, false},
			{"abort", func(st *Stream, _ *rawPeer) { st.SetLinger(0); st.Close() }, net.ErrClosed, net.ErrClosed, false},
			{"CloseWrite", func(st *Stream, _ *rawPeer) { st.CloseWrite() }, nil, syscall.EPIPE, false},
			{"SetDeadline", func(st *Stream, _ *rawPeer) { st.SetDeadline(time.Now()) },
				os.ErrDeadlineExceeded, os.ErrDeadlineExceeded, false},
			{"SetReadDeadline", func(st *Stream, _ *rawPeer) { st.SetReadDeadline(time.Unix(1, 0)) },
				os.ErrDeadlineExceeded, nil, false},
			{"SetWriteDeadline", func(st *Stream, _ *rawPeer) { st.SetWriteDeadline(time.Unix(1, 0)) },
				nil, os.ErrDeadlineExceeded, false},
			{"FIN", func(st *Stream, p *rawPeer) { p.send(finFrame(st.ID())) }, io.EOF, nil, false},
			{"RST", func(st *Stream, p *rawPeer) { p.send(rstFrame(st.ID(), StreamCancelled)) },
				&StreamError{StreamCancelled, true}, &StreamError{StreamCancelled, true}, false},
			{"GOAWAY", func(st *Stream, p *rawPeer) { p.send(goAwayFrame(0, NoError, "")) },
				&StreamError{StreamRefused, true}, &StreamError{StreamRefused, true}, false},
			{"loss of the transport", func(st *Stream, p *rawPeer) { p.conn.Close() }, nil, nil, true},
			{"Session.Close", func(st *Stream, p *rawPeer) { go st.s.Close() }, nil, nil, true},
			{"Session.CloseWithError", func(st *Stream, p *rawPeer) { go st.s.CloseWithError(InternalError, io.ErrNoProgress) },
				nil, nil, true},
		} {
			t.Run(stuck+"/"+test.name, func(t *testing.T) {
				inBubble(t, func(t *testing.T, r role) {
					s, p := stuckSession(t, r, Config{})
					st := openStream(t, s)
					if stuck == "window" {
						p.listen()
					}
					calls := startStuckCalls(st)
					start := time.Now()
					test.end(st, p)
					synctest.Wait()
					if took := time.Since(start); took != 0 {
						t.Errorf("it took %v", took)
					}
					readErr, writeErr := test.readErr, test.writeErr
					if test.lost {
						readErr, writeErr = s.Err(), s.Err()
						if readErr == nil {
							t.Fatal("the session goes on")
						}
					}
					if readErr == io.EOF { // of which WriteTo makes a success
						if got := <-calls.writeTo; got.err != nil {
							t.Errorf("WriteTo: %v", got.err)
						}
						calls.writeTo <- result{err: io.EOF}
					}
					calls.check(t, readErr, writeErr)
					st.Close()
					calls = stuckCalls{}
				})
			})
		}
	}
}

// TestEndBehindData ends a stream's sending side while its bytes wait for the
// transport: what ends it comes behind them.
func TestEndBehindData(t *testing.T) {
	for _, size := range []int{0, 10, smallData, smallData + 1, maxPayload, 2 * maxPayload} {
		for _, test := range []struct {
			name string
			end  func(*Stream) error
			want []func(uint32) []byte
		}{
			{"CloseWrite", (*Stream).CloseWrite, list(finFrame)},
			{"Close", (*Stream).Close, list(finFrame, func(id uint32) []byte { return rstFrame(id, StreamClosed) })},
		} {
			t.Run(fmt.Sprintf("%s/%d", test.name, size), func(t *testing.T) {
				inBubble(t, func(t *testing.T, r role) {
					s, p := stuckSession(t, r, Config{})
					s.EnableStop()
					st := openStream(t, s)
					data := pattern(3, size)
					if _, err := st.Write(data); err != nil {
						t.Fatal(err)
					}
					if err := test.end(st); err != nil {
						t.Errorf("%s: %v", test.name, err)
					}
					p.listen()
					synctest.Wait()
					frames := p.took()
					if got := payload(frames, st.ID()); !bytes.Equal(got, data) {
						t.Errorf("the peer got %d bytes of %d, or other ones", len(got), len(data))
					}
					end := frames[max(0, len(frames)-len(test.want)):]
					if !slices.EqualFunc(end, test.want, func(f wireFrame, lay func(uint32) []byte) bool { return f.is(lay(st.ID())) }) {
						t.Errorf("the last frames were %v", end)
					}
				})
			})
		}
	}
}

// TestStuckSocket has a peer that reads nothing from its socket although it gives
// window without end, so that a Write waits for the kernel. Everything else of the
// session goes on as if it did not.
func TestStuckSocket(t *testing.T) {
	for _, r := range roles {
		t.Run(r.name, func(t *testing.T) {
			c1, c2 := tcpPair(t)
			s, p := r.start(c1, Config{}), newRawPeer(t, c2)
			defer s.Close()
			defer c2.Close()
			stuck, closed, halfClosed, aborted := openStream(t, s), openStream(t, s), openStream(t, s), openStream(t, s)
			written := make(chan error, 1)
			p.send(wndIncFrame(stuck.ID(), maxID-Window), synFrame(r.theirs(1), "echo"))
			go func() {
				_, err := stuck.ReadFrom(zeros{})
				written <- err
			}()
			// The kernel has taken all it does once the flusher holds a batch that does
			// not get smaller: what is behind it waits.
			awaitStuck(t, s)

			// The other direction is alive.
			st := accept(t, s)
			if b := make([]byte, 4); true {
				if _, err := io.ReadFull(st, b); err != nil || string(b) != "echo" {
					t.Errorf("Read: %q, %v", b, err)
				}
			}
			if n, err := closed.Write(make([]byte, 1000)); n != 1000 || err != nil {
				t.Errorf("a small Write: %d, %v", n, err)
			}
			if err := closed.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
			if err := halfClosed.CloseWrite(); err != nil {
				t.Errorf("CloseWrite: %v", err)
			}
			aborted.SetLinger(0)
			if err := aborted.Close(); err != nil {
				t.Errorf("Close with linger 0: %v", err)
			}
			stuck.SetWriteDeadline(time.Now())
			if err := await(t, written, "timeout of ReadFrom"); err != os.ErrDeadlineExceeded {
				t.Errorf("ReadFrom: %v, want a timeout", err)
			}
			stuck.SetWriteDeadline(time.Time{})
			go func() {
				_, err := stuck.ReadFrom(zeros{})
				written <- err
			}()
			stuck.Close()
			if err := await(t, written, "end of ReadFrom"); err != net.ErrClosed {
				t.Errorf("ReadFrom: %v, want net.ErrClosed", err)
			}
			late := openStream(t, s)

			// And when the peer reads again, it finds everything in order.
			end := make(map[uint32]wireFrame)
			for end[late.ID()].typ == 0 {
				f, err := readWireFrame(c2)
				if err != nil {
					t.Fatal(err)
				}
				end[f.id] = f
			}
			for id, want := range map[uint32][]byte{
				closed.ID(): finFrame(closed.ID()), halfClosed.ID(): finFrame(halfClosed.ID()),
				aborted.ID(): rstFrame(aborted.ID(), StreamReset), late.ID(): synFrame(late.ID(), ""),
			} {
				if !end[id].is(want) {
					t.Errorf("the last frame of stream %d was %v", id, end[id])
				}
			}
		})
	}
}

// awaitStuck waits until the flusher is in a write that does not end, with as much
// queued behind it as one stream may have.
func awaitStuck(t testing.TB, s *Session) {
	t.Helper()
	giveUp := time.Now().Add(patience)
	for since, last := time.Now(), int64(-1); time.Since(since) < 50*time.Millisecond; {
		s.out.mu.Lock()
		total, bulk := s.out.total, s.out.bulk
		s.out.mu.Unlock()
		if total != last || bulk == 0 {
			since, last = time.Now(), total
		}
		if time.Now().After(giveUp) {
			t.Fatal("the kernel takes bytes without end")
		}
		time.Sleep(time.Millisecond)
	}
}

// TestFinThenLost loses the session behind a FIN: what came stands.
func TestFinThenLost(t *testing.T) {
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			c1, c2 := tr.pair(t)
			client, server := sessionPair(t, c1, c2, Config{})
			whole, wholeB := streamPair(t, client, server)
			cut, cutB := streamPair(t, client, server)
			data := pattern(4, Window)
			whole.Write(data)
			cut.Write(data)
			whole.CloseWrite()
			mark, markB := streamPair(t, client, server) // all before it has arrived
			mark.Write([]byte("x"))
			markB.Read(make([]byte, 1))
			client.Close()
			<-server.Done()
			if got, err := io.ReadAll(wholeB); !bytes.Equal(got, data) || err != nil {
				t.Errorf("behind a FIN: %d bytes of %d, or other ones: %v", len(got), len(data), err)
			}
			if _, err := wholeB.Write([]byte("x")); err != server.Err() {
				t.Errorf("Write behind a FIN: %v, want %v", err, server.Err())
			}
			got, err := io.ReadAll(cutB)
			if !bytes.HasPrefix(data, got) || err != server.Err() {
				t.Errorf("without a FIN: %d bytes, %v, want %v behind them", len(got), err, server.Err())
			}
		})
	}
}

// TestNoFinWithSyn gives a stream that is closed right after Open both frames.
func TestNoFinWithSyn(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := stuckSession(t, r, Config{})
		for range 3 {
			openStream(t, s).Close()
		}
		p.listen()
		synctest.Wait()
		for i, f := range p.took() {
			want := [][]byte{synFrame(f.id, ""), finFrame(f.id)}[i%2]
			if f.typ != frame.TypeData || !f.is(want) {
				t.Errorf("frame %d is %v", i, f)
			}
		}
	})
}
