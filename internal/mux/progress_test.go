package mux

import (
	"io"
	"net"
	"testing"
	"testing/synctest"
)

// TestProgress looks at a stream's figures and its half-close in all its states.
func TestProgress(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		check := func(st *Stream, want Progress) {
			t.Helper()
			synctest.Wait()
			if got := st.Progress(); got != want {
				t.Errorf("%+v, want %+v", got, want)
			}
		}
		p.send(synFrame(r.theirs(1), "opening"), synFrame(r.theirs(2), ""))
		st := accept(t, s)
		check(st, Progress{Unread: 7})
		st.Read(make([]byte, 3))
		check(st, Progress{Received: 3, Unread: 4})
		st.Write(make([]byte, 10))
		check(st, Progress{10, 3, 4, false})
		p.send(finFrame(st.ID()))
		check(st, Progress{10, 3, 4, true})
		readNow(t, st)
		check(st, Progress{10, 7, 0, true})
		st.CloseWrite()
		check(st, Progress{10, 7, 0, false})
		st.Close()
		check(st, Progress{10, 7, 0, false})

		st = accept(t, s)
		st.CloseWrite()
		check(st, Progress{HalfClosed: true})
		p.send(rstFrame(st.ID(), StreamReset))
		check(st, Progress{})

		st, err := s.Open([]byte("opening"))
		if err != nil {
			t.Fatal(err)
		}
		check(st, Progress{Sent: 7})
		p.send(dataFrame(st.ID(), []byte("unread"), fin))
		check(st, Progress{7, 0, 6, true})
		s.Close()
		check(st, Progress{7, 0, 6, false})
		st.Close()
		check(st, Progress{Sent: 7})
	})
}

// TestProgressOfWriteTo has a reader that is slow take a large window. Its progress
// shows all the time, and nothing is lost sight of.
func TestProgressOfWriteTo(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		const size = 2 << 20
		s, p := rawSession(t, r, Config{MaxWindow: size})
		st := grownStream(t, s, p, r.theirs(1), size)
		before := st.Progress()
		if before.Unread != size {
			t.Fatalf("%d bytes are unread", before.Unread)
		}
		p.send(finFrame(st.ID()))
		pr, pw := io.Pipe()
		copied := make(chan result, 1)
		go func() {
			n, err := st.WriteTo(pw)
			pw.Close()
			copied <- result{n: n, err: err}
		}()
		taken := int64(0)
		for buf := make([]byte, 10_000); ; {
			n, err := pr.Read(buf)
			taken += int64(n)
			synctest.Wait()
			got := st.Progress()
			if seen := got.Received - before.Received; seen > taken || taken-seen > maxTake {
				t.Fatalf("the reader has %d bytes, and %d show", taken, seen)
			}
			if got.Received-before.Received+int64(got.Unread) != size {
				t.Fatalf("%+v: %d bytes in all, want %d", got, got.Received-before.Received+int64(got.Unread), size)
			}
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if got := <-copied; got.n != size || got.err != nil || taken != size {
			t.Errorf("WriteTo: %d, %v; the reader has %d bytes", got.n, got.err, taken)
		}
	})
}

// TestWriteToSmallPieces leaves something in the queue at each take, while more comes
// that is put into the same chunks.
func TestWriteToSmallPieces(t *testing.T) {
	c1, c2 := tcpPair(t)
	client, server := sessionPair(t, c1, c2, Config{})
	a, b := streamPair(t, client, server)
	out, dst := tcpPair(t)
	defer closeAll(out, dst)
	go func() {
		for at := int64(0); at < 20<<20; {
			piece := make([]byte, 1+at%5000)
			(&patternReader{3, at}).Read(piece)
			a.Write(piece)
			at += int64(len(piece))
		}
		a.CloseWrite()
	}()
	copied := make(chan error, 1)
	go func() {
		_, err := b.WriteTo(out)
		out.(*net.TCPConn).CloseWrite()
		copied <- err
	}()
	want := &patternReader{3, 0}
	buf, wantBuf := make([]byte, 100_000), make([]byte, 100_000)
	for {
		n, err := dst.Read(buf)
		at := want.at
		want.Read(wantBuf[:n])
		if string(buf[:n]) != string(wantBuf[:n]) {
			t.Fatalf("other bytes than were written, from %d on", at)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := await(t, copied, "end of WriteTo"); err != nil {
		t.Errorf("WriteTo: %v", err)
	}
	if sent, _ := a.Counts(); sent != want.at {
		t.Errorf("%d bytes arrived, %d were sent", want.at, sent)
	}
}
