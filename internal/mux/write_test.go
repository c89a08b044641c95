package mux

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inconshreveable/muxado/frame"
)

// TestWriteKeepsNothing overwrites what a Write was given as soon as it returns,
// while the transport has taken none of it.
func TestWriteKeepsNothing(t *testing.T) {
	for _, sizes := range [][]int{{1}, {100}, {smallData}, {smallData + 1}, {maxPayload}, {maxPayload, maxPayload},
		{2 * maxPayload}, {1, smallData, 10, 30_000, 20}} {
		t.Run(fmt.Sprint(sizes), func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) {
				s, p := stuckSession(t, r, Config{})
				opening := []byte("opening")
				st, err := s.Open(opening)
				if err != nil {
					t.Fatal(err)
				}
				clear(opening)
				want := []byte("opening")
				for i, size := range sizes {
					b := pattern(i, size)
					want = append(want, b...)
					if n, err := st.Write(b); n != size || err != nil {
						t.Fatalf("Write: %d, %v", n, err)
					}
					clear(b)
				}
				synctest.Wait()
				p.listen()
				synctest.Wait()
				if got := payload(p.took(), st.ID()); !bytes.Equal(got, want) {
					t.Errorf("the peer got other bytes than were written: %d of %d", len(got), len(want))
				}
			})
		})
	}
}

// TestWriteTimedOut lets Writes time out on a stuck transport and on a spent window.
// What they say they wrote is sent, in whole frames, and nothing else of it; the
// stream goes on from there.
func TestWriteTimedOut(t *testing.T) {
	for _, listens := range []bool{false, true} {
		for _, size := range []int{0, 1, smallData, smallData + 1, maxPayload, 3 * maxPayload, Window, Window + 1, 2 * Window} {
			t.Run(fmt.Sprintf("listens=%v/%d", listens, size), func(t *testing.T) {
				inBubble(t, func(t *testing.T, r role) {
					s, p := stuckSession(t, r, Config{})
					if listens {
						p.listen()
					}
					st := openStream(t, s)
					data := pattern(5, 4*Window)
					done := 0
					write := func(size int, wantErr error) {
						t.Helper()
						b := slices.Clone(data[done : done+size])
						n, err := st.Write(b)
						if err != wantErr || (n == size) != (err == nil) {
							t.Fatalf("Write of %d bytes: %d, %v, want %v", size, n, err, wantErr)
						}
						clear(b)
						done += n
					}
					var wantErr error
					if !listens && size > 2*maxPayload || listens && size > Window {
						wantErr = os.ErrDeadlineExceeded
					}
					st.SetWriteDeadline(time.Now().Add(time.Second))
					write(size, wantErr)
					time.Sleep(time.Second)
					write(1, os.ErrDeadlineExceeded)
					st.SetWriteDeadline(time.Time{})
					if !listens {
						p.listen()
					}
					p.send(wndIncFrame(st.ID(), maxID-Window))
					write(1, nil)
					write(Window, nil)
					synctest.Wait()
					if got := payload(p.took(), st.ID()); !bytes.Equal(got, data[:done]) {
						t.Errorf("the peer got %d bytes, or other ones; %d were written", len(got), done)
					}
					if sent, _ := st.Counts(); sent != int64(done) {
						t.Errorf("Counts says %d bytes were sent, %d were written", sent, done)
					}
				})
			})
		}
	}
}

// TestWritesAreWhole has several goroutines write to one stream at once. None's bytes
// come between those of another's Write.
func TestWritesAreWhole(t *testing.T) {
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			c1, c2 := tr.pair(t)
			client, server := sessionPair(t, c1, c2, Config{})
			a, b := streamPair(t, client, server)
			const writers, writes = 5, 6
			var all sync.WaitGroup
			for w := range writers {
				all.Go(func() {
					for i := range writes {
						size := []int{1, 100, smallData + 1, maxPayload + 1, Window + 1}[(w+i)%5]
						if n, err := a.Write(bytes.Repeat([]byte{byte(w*writes + i)}, size)); n != size || err != nil {
							t.Errorf("Write: %d, %v", n, err)
						}
					}
				})
			}
			go func() {
				all.Wait()
				a.CloseWrite()
			}()
			got, err := io.ReadAll(b)
			if err != nil {
				t.Fatal(err)
			}
			seen := make(map[byte]bool)
			for len(got) > 0 {
				first := got[0]
				n := len(got) - len(bytes.TrimLeft(got, string(rune(first))))
				w, i := int(first)/writes, int(first)%writes
				if want := []int{1, 100, smallData + 1, maxPayload + 1, Window + 1}[(w+i)%5]; n != want || seen[first] {
					t.Fatalf("%d bytes of writer %d's Write %d in a row, want %d once", n, w, i, want)
				}
				seen[first] = true
				got = got[n:]
			}
			if len(seen) != writers*writes {
				t.Errorf("%d Writes arrived, want %d", len(seen), writers*writes)
			}
		})
	}
}

// TestOrder writes pieces of all sizes through Write and ReadFrom, over every
// transport: small frames and large ones take different ways out, and have to leave
// in order all the same.
func TestOrder(t *testing.T) {
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			c1, c2 := tr.pair(t)
			client, server := sessionPair(t, c1, c2, Config{})
			var all sync.WaitGroup
			defer all.Wait()
			for seed := range 4 {
				a, b := streamPair(t, client, server)
				data := pattern(seed, 2<<20)
				all.Go(func() {
					rnd := rand.New(rand.NewPCG(uint64(seed), 0))
					for rest := data; len(rest) > 0; {
						n := min(len(rest), 1+rnd.IntN([]int{10, smallData, 2 * smallData, maxPayload, 300_000}[rnd.IntN(5)]))
						var err error
						if rnd.IntN(2) == 0 {
							_, err = a.Write(rest[:n])
						} else {
							_, err = a.ReadFrom(bytes.NewReader(rest[:n]))
						}
						if err != nil {
							t.Errorf("writing: %v", err)
						}
						rest = rest[n:]
					}
					a.CloseWrite()
				})
				all.Go(func() {
					var got []byte
					var err error
					if seed%2 == 0 {
						got, err = io.ReadAll(b)
					} else {
						var buf bytes.Buffer
						_, err = b.WriteTo(&buf)
						got = buf.Bytes()
					}
					if !bytes.Equal(got, data) || err != nil {
						t.Errorf("stream %d: read %d bytes of %d, or other ones: %v", seed, len(got), len(data), err)
					}
					if _, n := b.Counts(); n != int64(len(data)) {
						t.Errorf("Counts says %d bytes were received", n)
					}
				})
			}
		})
	}
}

// TestTurns has streams write without end to a peer that takes a frame at a time.
// They take turns, and a stream that wants to say a word gets it in soon.
func TestTurns(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := stuckSession(t, r, Config{})
		const crowd = 7
		var streams []*Stream
		for range crowd + 1 {
			streams = append(streams, openStream(t, s))
		}
		// In time with the session: everything has come to rest between two frames.
		next := func() wireFrame {
			synctest.Wait()
			f, err := readWireFrame(p.conn)
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
		for range streams {
			next()
		}
		var ended sync.WaitGroup
		for _, st := range streams[:crowd] {
			p.send(wndIncFrame(st.ID(), maxID-Window))
			ended.Go(func() { st.ReadFrom(zeros{}) })
		}
		word := streams[crowd]
		sent := make(map[uint32]int)
		last := make(map[uint32]int) // the round of each one's last frame
		since := -1                  // bytes of others since the word was said
		const rounds = 1000
		for round := range rounds {
			if round%50 == 49 {
				synctest.Wait()
				if _, err := word.Write([]byte("word")); err != nil {
					t.Fatal(err)
				}
				since = 0
			}
			f := next()
			if f.id == word.ID() {
				since = -1
				continue
			}
			if since >= 0 {
				if since += len(f.body); since > batchBytes+maxPayload {
					t.Fatalf("a word waits behind %d bytes", since)
				}
			}
			// Everybody's frames are ahead in the queue, and in the batch that leaves.
			if wait := round - last[f.id]; wait > 2*streamFrames*(crowd+1) {
				t.Fatalf("stream %d waited for %d frames of others", f.id, wait)
			}
			last[f.id] = round
			sent[f.id] += len(f.body)
		}
		for _, st := range streams[:crowd] {
			if n := sent[st.ID()]; n < sent[streams[0].ID()]/2 || n > 2*sent[streams[0].ID()] {
				t.Errorf("of %d frames, one stream sent %d bytes and another %d", rounds, sent[streams[0].ID()], n)
			}
			if wait := rounds - last[st.ID()]; wait > 2*streamFrames*(crowd+1) {
				t.Errorf("stream %d waits for %d frames of others", st.ID(), wait)
			}
		}
		p.listen()
		s.Close()
		ended.Wait()
	})
}

// TestCrowdHoldsLittle has many streams write to a transport that is stuck. What is
// queued grows by little with each of them.
func TestCrowdHoldsLittle(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, _ := stuckSession(t, r, Config{})
		const crowd = 500
		written := make(map[*Stream]chan result)
		for range crowd {
			st := openStream(t, s)
			written[st] = goWrite(st, make([]byte, Window))
			synctest.Wait() // room is a guide: many who ask at once are all told the same
		}
		s.out.mu.Lock()
		queued := s.out.bulk
		s.out.mu.Unlock()
		// Without the tiers it would be 62 MiB.
		if most := 4<<20 + chunkSize + crowd*streamFrames*2<<10; queued > most {
			t.Errorf("%d streams queued %d bytes, more than %d", crowd, queued, most)
		}
		s.Close()
		for _, w := range written {
			if got := <-w; got.err != s.Err() {
				t.Fatalf("Write: %d, %v", got.n, got.err)
			}
		}
	})
}

// TestReadFromSharesWindow lets a Write use the window that ReadFrom had seen before
// it waited for bytes. Those go out all the same, as window comes.
func TestReadFromSharesWindow(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		st := openStream(t, s)
		data := pattern(6, Window+10_000)
		st.Write(data[:Window-1000])
		pr, pw := io.Pipe()
		copied := make(chan result, 1)
		go func() {
			n, err := st.ReadFrom(pr)
			copied <- result{n: n, err: err}
		}()
		synctest.Wait() // it waits for up to 1000 bytes
		st.Write(data[Window-1000 : Window-1])
		go func() {
			pw.Write(data[Window-1:])
			pw.CloseWithError(io.ErrNoProgress)
		}()
		got := 0
		for _, inc := range []int{0, 1, 100, 898, 3000, 10_000} {
			if inc > 0 {
				p.send(wndIncFrame(st.ID(), uint32(inc)))
			}
			synctest.Wait()
			b := payload(p.took(), st.ID())
			if !bytes.Equal(b, data[got:got+len(b)]) {
				t.Errorf("other bytes were sent than read, from %d on", got)
			}
			got += len(b)
		}
		if got != len(data) {
			t.Errorf("%d bytes were sent, want %d", got, len(data))
		}
		if c := <-copied; c.n != 10_001 || c.err != io.ErrNoProgress {
			t.Errorf("ReadFrom: %d, %v", c.n, c.err)
		}
		if sent, _ := st.Counts(); sent != int64(len(data)) {
			t.Errorf("Counts says %d bytes were sent", sent)
		}
	})
}

// TestReadFromErrors ends ReadFrom in all its ways.
func TestReadFromErrors(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		st := openStream(t, s)
		// Bytes that come with an error are sent first.
		n, err := st.ReadFrom(dataErrReader{[]byte("last words"), io.ErrUnexpectedEOF})
		if n != 10 || err != io.ErrUnexpectedEOF {
			t.Errorf("ReadFrom: %d, %v", n, err)
		}
		if n, err := st.ReadFrom(dataErrReader{[]byte("!"), io.EOF}); n != 1 || err != nil {
			t.Errorf("ReadFrom: %d, %v", n, err)
		}
		synctest.Wait()
		if got := payload(p.took(), st.ID()); string(got) != "last words!" {
			t.Errorf("sent %q", got)
		}
		for _, test := range []struct {
			end  func()
			want error
		}{
			{func() { st.SetWriteDeadline(time.Now()) }, os.ErrDeadlineExceeded},
			{func() { st.Close() }, net.ErrClosed},
		} {
			st.SetWriteDeadline(time.Time{})
			copied := make(chan error, 1)
			go func() {
				_, err := st.ReadFrom(zeros{}) // until the window is spent
				copied <- err
			}()
			synctest.Wait()
			test.end()
			if err := <-copied; err != test.want {
				t.Errorf("ReadFrom: %v, want %v", err, test.want)
			}
		}
	})
}

// dataErrReader is a reader that returns its bytes together with an error.
type dataErrReader struct {
	b   []byte
	err error
}

func (r dataErrReader) Read(p []byte) (int, error) { return copy(p, r.b), r.err }

// TestSockets moves bytes from one TCP socket to another through a stream, the way
// that neither end copies them, with half-close, and with a reset of the source.
func TestSockets(t *testing.T) {
	src, in := tcpPair(t)
	out, dst := tcpPair(t)
	defer closeAll(src, in, out, dst)
	c1, c2 := tcpPair(t)
	client, server := sessionPair(t, c1, c2, Config{})
	a, b := streamPair(t, client, server)
	data := pattern(7, 5<<20)
	var all sync.WaitGroup
	all.Go(func() {
		for rest := data; len(rest) > 0; { // small and large reads on the other side
			n, _ := src.Write(rest[:min(len(rest), 1+len(rest)/7)])
			rest = rest[n:]
		}
		src.(*net.TCPConn).CloseWrite()
	})
	all.Go(func() {
		if n, err := a.ReadFrom(in); n != int64(len(data)) || err != nil {
			t.Errorf("ReadFrom: %d, %v", n, err)
		}
		a.CloseWrite()
	})
	all.Go(func() {
		if n, err := b.WriteTo(out); n != int64(len(data)) || err != nil {
			t.Errorf("WriteTo: %d, %v", n, err)
		}
		out.Close()
	})
	got, err := io.ReadAll(dst)
	if !bytes.Equal(got, data) || err != nil {
		t.Errorf("read %d bytes of %d, or other ones: %v", len(got), len(data), err)
	}
	all.Wait()

	src2, in2 := tcpPair(t)
	defer closeAll(src2, in2)
	a, b = streamPair(t, client, server)
	copied := make(chan error, 1)
	go func() {
		_, err := a.ReadFrom(in2)
		copied <- err
	}()
	src2.Write([]byte("x"))
	io.ReadFull(b, make([]byte, 1))
	src2.(*net.TCPConn).SetLinger(0)
	src2.Close()
	if err := await(t, copied, "end of ReadFrom"); err == nil {
		t.Error("ReadFrom took a reset for the end of the bytes")
	}
	// A deadline of the source applies while ReadFrom waits for it.
	src3, in3 := tcpPair(t)
	defer closeAll(src3, in3)
	go func() {
		_, err := a.ReadFrom(in3)
		copied <- err
	}()
	in3.SetReadDeadline(time.Now())
	if err := await(t, copied, "end of ReadFrom"); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("ReadFrom: %v, want a timeout", err)
	}
}

func closeAll(conns ...io.Closer) {
	for _, c := range conns {
		c.Close()
	}
}

// TestMergedFrames sees what is queued while the transport is stuck leave in few
// writes of it.
func TestMergedFrames(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		c1, c2 := net.Pipe()
		counted := &countedWrites{Conn: c1}
		s, p := r.start(counted, Config{}), newRawPeer(t, c2)
		defer s.Close()
		defer c2.Close()
		var streams []*Stream
		for range 50 {
			streams = append(streams, openStream(t, s))
		}
		for _, st := range streams {
			st.Write([]byte("one"))
			st.Write([]byte("two"))
			st.CloseWrite()
		}
		p.listen()
		synctest.Wait()
		if n := len(p.took()); n != 4*len(streams) {
			t.Errorf("the session sent %d frames", n)
		}
		if n := counted.writes; n > 2 {
			t.Errorf("%d frames left in %d writes", 4*len(streams), n)
		}
	})
}

type countedWrites struct {
	net.Conn
	writes int // of the flusher's alone
}

func (c *countedWrites) Write(p []byte) (int, error) {
	c.writes++
	return c.Conn.Write(p)
}

// TestFrameSizes sees no frame that is larger than a chunk.
func TestFrameSizes(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		st := openStream(t, s)
		p.send(wndIncFrame(st.ID(), 1<<24))
		st.Write(make([]byte, 1<<20))
		st.ReadFrom(bytes.NewReader(make([]byte, 1<<20)))
		synctest.Wait()
		for _, f := range p.took() {
			if f.typ != frame.TypeData || len(f.body) > maxPayload {
				t.Fatalf("the session sent %v", f)
			}
		}
	})
}
