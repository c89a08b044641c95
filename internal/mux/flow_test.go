package mux

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inconshreveable/muxado/frame"
)

// pattern returns n bytes that differ from one place and seed to another.
func pattern(seed, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i>>16 ^ i>>8 ^ i ^ seed*37)
	}
	return b
}

// TestWindowIsKept sends no byte more than the peer lets it, in whichever steps the
// peer does, and all of them once it has.
func TestWindowIsKept(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		st := openStream(t, s)
		data := pattern(1, 3*Window)
		written := goWrite(st, data)
		synctest.Wait()
		got := payload(p.took(), st.ID())
		allowed := Window
		for _, inc := range []int{0, 1, 2, 1000, maxPayload, 1, Window, 1} {
			if inc > 0 {
				p.send(wndIncFrame(st.ID(), uint32(inc)))
			}
			synctest.Wait()
			got = append(got, payload(p.took(), st.ID())...)
			if allowed += inc; len(got) != allowed {
				t.Fatalf("sent %d bytes, allowed are %d", len(got), allowed)
			}
		}
		p.send(wndIncFrame(st.ID(), maxID-uint32(3*Window))) // more than it needs
		if w := <-written; w.n != int64(len(data)) || w.err != nil {
			t.Fatalf("Write: %d, %v", w.n, w.err)
		}
		synctest.Wait()
		if got = append(got, payload(p.took(), st.ID())...); !bytes.Equal(got, data) {
			t.Error("other bytes were sent than written")
		}
	})
}

// TestWindowToTheByte takes DATA that uses the window up exactly. TestMalformed has
// the byte beyond.
func TestWindowToTheByte(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		data := pattern(2, Window)
		p.send(synFrame(r.theirs(1), string(data[:10])), dataFrame(r.theirs(1), data[10:], 0))
		p.send(dataFrame(r.theirs(1), nil, 0), finFrame(r.theirs(1)))
		if b, err := io.ReadAll(accept(t, s)); !bytes.Equal(b, data) || err != nil {
			t.Errorf("read %d bytes, %v", len(b), err)
		}
	})
}

// TestNoByteBuffered sends the header of a DATA frame that is larger than what is
// left of the window. That alone ends the session; what is unread stays as it was.
func TestNoByteBuffered(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		p.send(synFrame(r.theirs(1), ""), dataFrame(r.theirs(1), make([]byte, 200_000), 0))
		st := accept(t, s)
		p.send(header(Window-200_000+1, frame.TypeData, 0, st.ID()))
		synctest.Wait()
		if code := sessionError(t, s).Code; code != FlowControlError {
			t.Errorf("the session ended with %v", code)
		}
		if n := st.Unread(); n != 200_000 {
			t.Errorf("%d bytes are unread", n)
		}
	})
}

// TestWindowUpdates reads bit by bit what a peer sends as fast as it may. Updates
// are few, never let the peer have more under way than the window, and always let
// it go on.
func TestWindowUpdates(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{MaxWindow: Window})
		p.send(synFrame(r.theirs(1), ""))
		st := accept(t, s)
		const total = 3 * Window
		buf := make([]byte, 16)
		sent, read, given, updates := 0, 0, Window, 0
		for read < total {
			if n := min(given, total) - sent; n > 0 {
				p.send(dataFrame(st.ID(), make([]byte, n), 0))
				sent += n
				synctest.Wait()
			}
			n, err := st.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			if read += n; read%(Window/8) == 0 || read == sent {
				synctest.Wait()
			}
			for _, f := range p.took() {
				if f.typ != frame.TypeWndInc || f.id != st.ID() {
					t.Fatalf("the session sent %v", f)
				}
				given += int(f.number(0))
				updates++
			}
			if given-read > Window {
				t.Fatalf("%d bytes may be under way or unread, more than the window", given-read)
			}
		}
		if updates > 2*total/Window {
			t.Errorf("%d window updates for %d windows", updates, total/Window)
		}
	})
}

// TestStoppedReader fills the window of a stream that nobody reads. The stream holds
// that much and no more, whatever the size of its frames, and no other stream is
// held up.
func TestStoppedReader(t *testing.T) {
	for _, size := range []int{10, 1000, minRef - 1, minRef, 40_000, Window} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) {
				s, p := rawSession(t, r, Config{})
				p.send(synFrame(r.theirs(1), ""), synFrame(r.theirs(2), ""))
				stopped, other := accept(t, s), accept(t, s)
				otherGot := goReadAll(other)

				data, otherData := pattern(3, Window), pattern(4, 3*Window)
				given, sent := Window, 0
				var batch []byte
				for i := 0; i < len(data); i += size {
					batch = append(batch, dataFrame(stopped.ID(), data[i:min(i+size, len(data))], 0)...)
					// Bytes of the other stream in between, so that the two share chunks.
					if n := min(size, len(otherData)-sent, given-sent); n > 0 {
						batch = append(batch, dataFrame(other.ID(), otherData[sent:sent+n], 0)...)
						sent += n
					}
					if len(batch) > 100_000 {
						p.send(batch)
						batch = batch[:0]
					}
				}
				p.send(batch)
				for sent < len(otherData) {
					synctest.Wait()
					for _, f := range p.took() {
						if f.typ != frame.TypeWndInc || f.id != other.ID() {
							t.Fatalf("the session sent %v", f)
						}
						given += int(f.number(0))
					}
					n := min(len(otherData), given) - sent
					if n == 0 {
						t.Fatal("the other stream is held up")
					}
					p.send(dataFrame(other.ID(), otherData[sent:sent+n], 0))
					sent += n
				}
				p.send(finFrame(other.ID()))
				if got := <-otherGot; !bytes.Equal(got.b, otherData) || got.err != nil {
					t.Errorf("the other stream got %d bytes, %v", len(got.b), got.err)
				}

				if n := stopped.Unread(); n != Window {
					t.Errorf("%d bytes are unread, want %d", n, Window)
				}
				if n := heldBy(stopped); n > 2*Window {
					t.Errorf("%d bytes unread hold %d of memory", Window, n)
				}
				if got := readNow(t, stopped); got != string(data) {
					t.Error("the stopped reader gets other bytes than were sent")
				}
			})
		})
	}
}

// heldBy adds up the chunks that a stream's unread bytes keep from being used again.
func heldBy(st *Stream) (n int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	seen := make(map[*chunk]bool)
	for _, seg := range st.segs {
		if !seen[seg.c] {
			seen[seg.c] = true
			n += len(seg.c.buf)
		}
	}
	return n
}

// TestShedLargest exceeds what a session may hold unread where no reader ever read.
// The stream that holds most is reset, on both ends, and the others keep what they
// have.
func TestShedLargest(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{MaxUnread: 300_000})
		var streams []*Stream
		for n, size := range []int{50_000, 100_000, 75_000, 74_999} {
			id := r.theirs(n + 1)
			p.send(synFrame(id, ""), dataFrame(id, pattern(n, size), 0))
			streams = append(streams, accept(t, s))
		}
		synctest.Wait()
		p.takeNone()
		ended := make(chan error, 1)
		streams[1].OnEnd(func(err error) { ended <- err })
		p.send(dataFrame(streams[0].ID(), []byte("ab"), 0)) // a byte too many
		synctest.Wait()
		if f := p.takeOne(); !f.is(rstFrame(streams[1].ID(), EnhanceYourCalm)) {
			t.Errorf("the session sent %v, want an RST of the stream with most", f)
		}
		want := &StreamError{Code: EnhanceYourCalm}
		if _, err := streams[1].Read(make([]byte, 1)); !sameError(err, want) {
			t.Errorf("Read: %v, want %v", err, want)
		}
		if _, err := streams[1].Write(make([]byte, 1)); !sameError(err, want) {
			t.Errorf("Write: %v, want %v", err, want)
		}
		if err := <-ended; !sameError(err, want) {
			t.Errorf("OnEnd: %v, want %v", err, want)
		}
		if err := streams[1].Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		p.send(dataFrame(streams[1].ID(), make([]byte, 1000), 0)) // sent before it knew
		for n, size := range map[int]int{0: 50_002, 2: 75_000, 3: 74_999} {
			if got := streams[n].Unread(); got != size {
				t.Errorf("stream %d has %d bytes, want %d", n, got, size)
			}
			readNow(t, streams[n])
		}
		synctest.Wait()
		if n := s.unread.Load(); n != 0 {
			t.Errorf("%d bytes count as unread when all were read", n)
		}
	})
}

// TestShedStandingStill exceeds what a session may hold unread where some readers read.
// The one that has not for longest is reset, unless it holds little, although others
// hold more; and then the next, even if the bytes of the first are still held.
func TestShedStandingStill(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{MaxUnread: 300_000})
		var streams []*Stream
		for n, size := range []int{1000, 90_000, 91_000, 100_000} {
			id := r.theirs(n + 1)
			p.send(synFrame(id, ""), dataFrame(id, pattern(n, size), 0))
			streams = append(streams, accept(t, s))
		}
		var calls [4]int
		for i, st := range streams {
			st.OnEnd(func(error) { calls[i]++ })
		}
		// A stream that the peer has reset holds its bytes as any other does.
		p.send(rstFrame(streams[1].ID(), StreamReset))
		synctest.Wait()
		// Streams 3 and 4 are read, first the one and then the other. The reader of the
		// second hands its bytes on to somebody who does not take them.
		_, pw := io.Pipe()
		copied := make(chan error, 1)
		go func() {
			_, err := streams[1].WriteTo(pw)
			copied <- err
		}()
		synctest.Wait()
		for _, st := range streams[2:] {
			io.ReadFull(st, make([]byte, 100))
		}
		shed := func() (n int) {
			for i, st := range streams {
				if _, err := st.Write(nil); sameError(err, &StreamError{Code: EnhanceYourCalm}) {
					n |= 1 << i
				}
			}
			return n
		}
		for _, want := range []int{1 << 1, 1<<1 | 1<<2} {
			p.send(dataFrame(streams[3].ID(), make([]byte, max(1, 300_001-int(s.unread.Load()))), 0))
			synctest.Wait()
			if got := shed(); got != want {
				t.Errorf("shed are %04b, want %04b", got, want)
			}
		}
		if calls != [4]int{0, 1, 1, 0} {
			t.Errorf("OnEnd was called %v times", calls)
		}
		if frames := p.took(); len(frames) != 1 || !frames[0].is(rstFrame(streams[2].ID(), EnhanceYourCalm)) {
			t.Errorf("the session sent %v", frames)
		}
		pw.CloseWithError(io.ErrShortWrite)
		if err := <-copied; err == nil {
			t.Error("WriteTo made a clean end of a stream that was shed")
		}
		for _, st := range streams {
			st.Close()
		}
		if n := s.unread.Load(); n != 0 {
			t.Errorf("%d bytes count as unread when all streams are closed", n)
		}
	})
}

// TestUnreadInWriteTo counts as unread what WriteTo has and its writer did not take
// yet, and no longer when it did.
func TestUnreadInWriteTo(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		p.send(synFrame(r.theirs(1), ""), dataFrame(r.theirs(1), make([]byte, Window), 0))
		st := accept(t, s)
		pr, pw := io.Pipe()
		copied := make(chan error, 1)
		go func() {
			_, err := st.WriteTo(pw)
			copied <- err
		}()
		synctest.Wait()
		if n := s.unread.Load(); n != Window || st.Unread() != Window {
			t.Errorf("%d and %d bytes count as unread, want %d", n, st.Unread(), Window)
		}
		p.takeNone() // no window for bytes that nobody took
		io.CopyN(io.Discard, pr, Window)
		synctest.Wait()
		if n := s.unread.Load(); n != 0 || st.Unread() != 0 {
			t.Errorf("%d and %d bytes count as unread, want 0", n, st.Unread())
		}
		if f := p.takeOne(); f.typ != frame.TypeWndInc || f.number(0) < Window {
			t.Errorf("the session sent %v, want the window back", f)
		}
		// A writer that fails ends WriteTo with its error; the stream goes on.
		p.send(dataFrame(st.ID(), []byte("more"), 0))
		pr.CloseWithError(io.ErrShortWrite)
		if err := <-copied; err != io.ErrShortWrite {
			t.Errorf("WriteTo: %v", err)
		}
		if n := s.unread.Load(); n != 0 {
			t.Errorf("%d bytes count as unread behind a writer that failed", n)
		}
		if _, n := st.Counts(); n != Window {
			t.Errorf("Counts says %d bytes were received, the writer took %d", n, Window)
		}
		p.send(dataFrame(st.ID(), []byte("even more"), 0))
		synctest.Wait()
		if got := readNow(t, st); got != "even more" {
			t.Errorf("read %q", got)
		}
	})
}

// TestWindowGrows sends over a link on which the initial window is under way most of
// the time. The receiver finds out, and the link gets used; it grants no more than
// it may, and nothing beyond the initial window to a reader that stands still.
func TestWindowGrows(t *testing.T) {
	const (
		delay   = 50 * time.Millisecond
		rate    = 50 << 20                          // bytes in a second
		fill    = rate / int(time.Second/delay) * 2 // what is under way when the link is full
		maximum = 16 << 20
		total   = 64 << 20
	)
	for _, test := range []struct {
		name            string
		max             int // MaxWindow
		unread          int // MaxUnread; 0: the default
		read            int // bytes that one Read takes; 0: WriteTo reads
		atLeast, atMost int // what the window may become
	}{
		{"to fit the link", maximum, 0, 0, fill, maximum},
		{"to fit the link in large reads", maximum, 0, 64 << 10, fill, maximum},
		{"to fit the link in small reads", maximum, 0, 512, fill, maximum},
		{"to MaxWindow", 1 << 20, 0, 0, 1 << 20, 1 << 20},
		{"not at all", 1, 0, 0, Window, Window},
		{"within half of MaxUnread", maximum, 4 << 20, 0, Window + 1, Window + 2<<20},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c1, c2 := newLine(lineConfig{delay: delay, rate: rate, room: 64 << 20})
				client, server := sessionPair(t, c1, c2, Config{MaxWindow: test.max, MaxUnread: test.unread})
				a, b := streamPair(t, client, server)
				stoppedA, stoppedB := streamPair(t, client, server)
				stopped := goWrite(stoppedA, make([]byte, 1<<20))
				go func() {
					a.ReadFrom(io.LimitReader(zeros{}, total))
					a.CloseWrite()
				}()
				start := time.Now()
				var n int64
				var err error
				if test.read > 0 {
					n, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{b}, make([]byte, test.read))
				} else {
					n, err = b.WriteTo(io.Discard)
				}
				if n != total || err != nil {
					t.Fatalf("got %d bytes, %v", n, err)
				}
				took := time.Since(start)
				if size := windowOf(b); size > test.atMost || size < test.atLeast {
					t.Errorf("the window became %d, want %d to %d", size, test.atLeast, test.atMost)
				}
				t.Logf("window %d KiB, %.0f%% of the link", windowOf(b)>>10, 100*float64(n)/rate/took.Seconds())
				if test.atLeast == fill && took > 2*time.Duration(n)*time.Second/rate {
					t.Errorf("took %v, more than twice what the link needs", took)
				}
				if size := windowOf(stoppedB); size != Window || stoppedB.Unread() != Window {
					t.Errorf("the window of a stopped reader became %d; it holds %d", size, stoppedB.Unread())
				}

				// What grew is given back when the stream is over.
				b.Close()
				synctest.Wait()
				if n := server.grown.Load(); n != 0 {
					t.Errorf("windows of no stream take %d bytes", n)
				}
				stoppedA.Close()
				<-stopped
			})
		})
	}
}

func windowOf(st *Stream) int {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.window.size
}

// TestSlowReader keeps the window of a reader that is slower than the link, however
// long the link is: more would only be held unread.
func TestSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c1, c2 := newLine(lineConfig{delay: 50 * time.Millisecond, rate: 100 << 20, room: 64 << 20})
		client, server := sessionPair(t, c1, c2, Config{})
		a, b := streamPair(t, client, server)
		go func() {
			a.Write(make([]byte, 8<<20))
			a.CloseWrite()
		}()
		buf := make([]byte, 64<<10)
		for {
			time.Sleep(200 * time.Millisecond) // the window would allow eight times as much
			if _, err := io.ReadFull(b, buf); err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			if size := windowOf(b); size != Window {
				t.Fatalf("the window became %d", size)
			}
		}
	})
}

// TestWindowShrinks slows down a reader for whom the window has grown. It holds ever less
// unread, down to the initial window, and more again once it is fast.
func TestWindowShrinks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate = 100 << 20
		c1, c2 := newLine(lineConfig{delay: 50 * time.Millisecond, rate: rate, room: 64 << 20})
		client, server := sessionPair(t, c1, c2, Config{})
		a, b := streamPair(t, client, server)
		go a.ReadFrom(zeros{})
		fast := func(n int64) {
			t.Helper()
			if _, err := io.CopyN(io.Discard, b, n); err != nil {
				t.Fatal(err)
			}
		}
		fast(64 << 20)
		grown := windowOf(b)
		if grown < 8<<20 {
			t.Fatalf("the window became %d", grown)
		}
		for n := 0; windowOf(b) > 2*Window; n++ { // what is under way at that pace
			time.Sleep(50 * time.Millisecond)
			fast(64 << 10)
			grown = max(grown, windowOf(b)) // once more, by what was under way
			if n > 4*grown/(64<<10) {
				t.Fatalf("after %d bytes the window is %d, and was %d", n*64<<10, windowOf(b), grown)
			}
		}
		if n := b.Unread(); n > 2*Window {
			t.Errorf("%d bytes are unread", n)
		}
		if n := server.grown.Load(); n > Window {
			t.Errorf("a window that has shrunk takes %d bytes of growth", n)
		}
		fast(64 << 20)
		if size := windowOf(b); size < 8<<20 {
			t.Errorf("the window became %d again", size)
		}
	})
}

// TestPace measures how fast a transport takes bulk, and has the system, and a batch, hold
// ten milliseconds of that: no less than what keeps a transport busy, and as much as it
// likes on a fast one. A transport that was slow for a while is not for ever.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for rate, want := range map[int]int{
			1 << 20:    leastUnsent,
			12_500_000: 125_000, // 100 Mbit/s
			1 << 30:    0,       // not told
		} {
			c1, c2 := newLine(lineConfig{rate: rate, room: 64 << 10})
			client, server := sessionPair(t, c1, c2, Config{})
			a, b := streamPair(t, client, server)
			go a.ReadFrom(zeros{})
			if _, err := io.CopyN(io.Discard, b, int64(rate)); err != nil { // for a second
				t.Fatal(err)
			}
			client.out.mu.Lock()
			got := client.out.unsent
			client.out.mu.Unlock()
			if got < want*8/10 || got > want*12/10 {
				t.Errorf("at %d bytes a second the system was told to hold %d, want %d", rate, got, want)
			}
			client.Close()
		}
	})
	var w writer
	w.init(discard{}, nil)
	for _, step := range []struct {
		rate int64
		want int
	}{{1 << 20, leastUnsent}, {1 << 22, leastUnsent}, {1 << 25, 1 << 25 / 100}, {1 << 33, 0}, {1 << 33, 0}, {1 << 20, leastUnsent}} {
		w.pace(step.rate, time.Second)
		if w.unsent != step.want {
			t.Errorf("at %d bytes a second: %d, want %d", step.rate, w.unsent, step.want)
		}
	}
}

// discard is a transport of which nothing is asked.
type discard struct{ net.Conn }

// zeros reads as zeros without end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// TestWindowFitsThePath has eight senders saturate a link with a short round trip: their
// windows do not grow beyond what that takes, for what they let be sent would only queue
// up. A message that comes in between takes little longer than the initial windows make it.
func TestWindowFitsThePath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const (
			delay = time.Millisecond
			rate  = 50 << 20
			path  = rate / int(time.Second/delay) * 2
		)
		c1, c2 := newLine(lineConfig{delay: delay, rate: rate, room: 64 << 20})
		client, server := sessionPair(t, c1, c2, Config{})
		server.Trip(2 * delay) // as a ping tells it before there is anything else
		small, answers := streamPair(t, client, server)
		var readers []*Stream
		for range 8 {
			a, b := streamPair(t, client, server)
			go b.WriteTo(io.Discard)
			go func() {
				a.ReadFrom(io.LimitReader(zeros{}, 32<<20))
				a.CloseWrite()
			}()
			readers = append(readers, b)
		}
		time.Sleep(3 * time.Second)
		start := time.Now()
		small.Write([]byte("x"))
		if _, err := io.ReadFull(answers, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		took := time.Since(start)
		all := 0
		for _, b := range readers {
			size := windowOf(b)
			all += size
			if size > max(Window, paths*path) {
				t.Errorf("a window became %d, of a path that holds %d", size, path)
			}
		}
		if most := 2*delay + time.Duration(all)*time.Second/rate; took > most {
			t.Errorf("a message took %v, want %v at most", took, most)
		}
		t.Logf("windows of %d KiB in all; a message took %v", all>>10, took)
	})
}

// TestTrips keeps the shortest round trip for some minutes, and then believes a longer one.
func TestTrips(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var tr trips
		see := func(d, want time.Duration) {
			t.Helper()
			tr.add(d, time.Now())
			if got := tr.shortest(); got != want {
				t.Errorf("after %v the shortest is %v, want %v", d, got, want)
			}
		}
		see(0, 0) // a clock that stood still
		see(20, 20)
		see(30, 20)
		see(10, 10)
		time.Sleep(tripsTurn)
		see(40, 10)
		see(35, 10)
		time.Sleep(tripsTurn)
		see(50, 35)
		time.Sleep(tripsTurn)
		see(60, 50)
		see(5, 5)
	})
}

// TestFinIsNoTrip ends a direction exactly where the window of an update before ends: the
// FIN did not wait for that update, and says nothing of how far away the peer is.
func TestFinIsNoTrip(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		p.send(synFrame(r.theirs(1), ""))
		st := accept(t, s)
		go io.Copy(io.Discard, st)
		for range Window / (32 << 10) {
			p.send(dataFrame(st.ID(), make([]byte, 32<<10), 0))
			synctest.Wait()
		}
		time.Sleep(time.Millisecond)
		p.send(finFrame(st.ID()))
		synctest.Wait()
		if d := s.trips.shortest(); d != 0 {
			t.Errorf("a FIN counts as a round trip of %v", d)
		}
		// Bytes beyond that end did wait.
		p.send(synFrame(r.theirs(2), ""))
		st = accept(t, s)
		go io.Copy(io.Discard, st)
		for range Window / (32 << 10) {
			p.send(dataFrame(st.ID(), make([]byte, 32<<10), 0))
			synctest.Wait()
		}
		time.Sleep(time.Millisecond)
		p.send(dataFrame(st.ID(), []byte("x"), 0))
		synctest.Wait()
		if d := s.trips.shortest(); d != time.Millisecond {
			t.Errorf("the round trip is %v", d)
		}
		st.Close()
	})
}
