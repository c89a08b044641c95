package mux

import (
	"io"
	"testing"
	"testing/synctest"
)

// grownStream has the peer open a stream whose window grows to size, for a reader that
// keeps up, and fill it.
func grownStream(t *testing.T, s *Session, p *rawPeer, id uint32, size int) *Stream {
	t.Helper()
	p.send(synFrame(id, ""))
	st := accept(t, s)
	for windowOf(st) < size {
		n := windowOf(st)
		p.send(dataFrame(id, make([]byte, n), 0))
		synctest.Wait()
		readNow(t, st)
		if windowOf(st) == n {
			t.Fatalf("the window stays at %d", n)
		}
	}
	p.send(dataFrame(id, make([]byte, size), 0))
	synctest.Wait()
	return st
}

func hasEnded(st *Stream) bool {
	ended, _ := st.Ended()
	return ended
}

// TestShedSparesReader exceeds what a session may hold unread by streams that nobody
// reads. One that is read, be it slowly, and holds more than any of them, stays.
func TestShedSparesReader(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		const limit = 4 << 20
		s, p := rawSession(t, r, Config{MaxUnread: limit, MaxWindow: 1 << 20})
		reader := grownStream(t, s, p, r.theirs(1), 1<<20)
		var stopped []*Stream
		for n := range 2 * limit / Window {
			if _, err := reader.Read(make([]byte, 1000)); err != nil {
				t.Fatalf("Read beside %d stopped readers: %v", n, err)
			}
			id := r.theirs(n + 2)
			p.send(synFrame(id, ""), dataFrame(id, make([]byte, Window), 0))
			stopped = append(stopped, accept(t, s))
			synctest.Wait()
			if n := s.unread.Load(); n > limit {
				t.Fatalf("%d bytes are unread, more than %d", n, limit)
			}
		}
		if n := reader.Unread(); hasEnded(reader) || n < 3*Window {
			t.Errorf("the reader was shed: %t; it has %d bytes", hasEnded(reader), n)
		}
		readNow(t, reader)
		shed := 0
		for _, st := range stopped {
			if hasEnded(st) {
				shed++
			}
		}
		// Half of them is too much, and what the reader holds.
		if half := len(stopped) / 2; shed < half || shed > half+5 {
			t.Errorf("%d of %d were shed", shed, len(stopped))
		}
	})
}

// TestShedInWriteTo sheds a stream of whose bytes some stay, since a WriteTo is stuck
// with them. It is done with: others are shed instead when more comes.
func TestShedInWriteTo(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		const limit = 4 << 20
		s, p := rawSession(t, r, Config{MaxUnread: limit, MaxWindow: 1 << 20})
		stuck := grownStream(t, s, p, r.theirs(1), 1<<20)
		pr, pw := io.Pipe()
		defer pr.Close()
		copied := make(chan error, 1)
		go func() {
			_, err := stuck.WriteTo(pw)
			copied <- err
		}()
		synctest.Wait()
		var others []*Stream
		for n := range 2 * limit / Window {
			id := r.theirs(n + 2)
			p.send(synFrame(id, ""), dataFrame(id, make([]byte, Window), 0))
			others = append(others, accept(t, s))
			synctest.Wait()
			if n := s.unread.Load(); n > limit+Window {
				t.Fatalf("%d bytes are unread, far more than %d", n, limit)
			}
		}
		if n := stuck.Unread(); !hasEnded(stuck) || n == 0 || n > maxTake {
			t.Errorf("the stuck stream was shed: %t; it holds %d bytes", hasEnded(stuck), stuck.Unread())
		}
		// The bytes are let go of when the writer is.
		pr.CloseWithError(io.ErrShortWrite)
		if err := <-copied; err != io.ErrShortWrite {
			t.Errorf("WriteTo: %v", err)
		}
		for _, st := range others {
			st.Close()
		}
		if n := s.unread.Load(); n != 0 {
			t.Errorf("%d bytes count as unread, of no stream", n)
		}
	})
}
