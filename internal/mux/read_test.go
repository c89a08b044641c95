package mux

import (
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
)

// Discard takes what Peek has shown from the queue, wherever the pieces lie, and counts it
// as read. Of a stream that has ended meanwhile it tells.
func TestDiscard(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		p.send(synFrame(r.theirs(1), "header"), dataFrame(r.theirs(1), make([]byte, 2<<10), 0), dataFrame(r.theirs(1), []byte("rest"), 0))
		st := accept(t, s)
		synctest.Wait()
		const all = 6 + 2<<10 + 4
		if n := st.Peek(make([]byte, all+1)); n != all {
			t.Fatalf("Peek shows %d bytes", n)
		}
		for _, step := range []struct {
			n    int
			next byte
		}{{1, 'e'}, {4, 'r'}, {1 + 2<<10, 'r'}, {1, 'e'}} {
			if err := st.Discard(step.n); err != nil {
				t.Fatal(err)
			}
			var next [1]byte
			if st.Peek(next[:]); next[0] != step.next {
				t.Errorf("behind %d bytes comes %q, want %q", step.n, next[0], step.next)
			}
		}
		if got := st.Progress(); got.Received != all-3 || got.Unread != 3 {
			t.Errorf("%+v", got)
		}
		p.send(rstFrame(st.ID(), StreamReset))
		synctest.Wait()
		if err := st.Discard(1); err != nil { // what came before an RST stands
			t.Error(err)
		}
		st.Close()
		if err := st.Discard(1); !errors.Is(err, net.ErrClosed) {
			t.Errorf("of a closed stream: %v", err)
		}
		p.send(synFrame(r.theirs(2), ""), finFrame(r.theirs(2)))
		st = accept(t, s)
		synctest.Wait()
		if err := st.Discard(1); err != io.EOF {
			t.Errorf("of one that has ended: %v", err)
		}
	})
}
