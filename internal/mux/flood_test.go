package mux

import (
	"bytes"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inconshreveable/muxado/frame"
)

// emptyFrames are frames that cost the peer next to nothing and that it may send a
// burst of, but not without end. Before them the peer has opened theirs(1), which is
// open, theirs(2), which it has ended with a FIN, theirs(3), which is over, and
// theirs(4), which it has reset and whose bytes are unread.
var emptyFrames = []struct {
	name  string
	frame func(role) []byte
}{
	{"empty DATA", func(r role) []byte { return dataFrame(r.theirs(1), nil, 0) }},
	{"empty DATA behind a FIN", func(r role) []byte { return dataFrame(r.theirs(2), nil, 0) }},
	{"FIN behind a FIN", func(r role) []byte { return finFrame(r.theirs(2)) }},
	{"empty DATA for a dead stream", func(r role) []byte { return dataFrame(r.theirs(3), nil, 0) }},
	{"FIN for a reset stream that nobody reads", func(r role) []byte { return finFrame(r.theirs(4)) }},
	{"RST for a reset stream that nobody reads", func(r role) []byte { return rstFrame(r.theirs(4), StreamReset) }},
	{"FIN for a dead stream", func(r role) []byte { return finFrame(r.theirs(3)) }},
	{"WNDINC", func(r role) []byte { return wndIncFrame(r.theirs(1), 1) }},
	{"WNDINC for a dead stream", func(r role) []byte { return wndIncFrame(r.theirs(3), 1) }},
	{"RST for a dead stream", func(r role) []byte { return rstFrame(r.theirs(3), StreamReset) }},
	{"unknown", func(role) []byte { return rawFrame(9, 0, 0, nil) }},
	{"unknown with a body", func(role) []byte { return rawFrame(9, 0, 0, []byte("body")) }},
	{"GOAWAY", func(r role) []byte { return goAwayFrame(r.ours(9), NoError, "") }},
}

func floodedSession(t *testing.T, r role) (s *Session, p *rawPeer, open *Stream) {
	s, p = rawSession(t, r, Config{})
	p.send(synFrame(r.theirs(1), "open"), synFrame(r.theirs(2), "fin"), finFrame(r.theirs(2)),
		synFrame(r.theirs(3), "dead"), rstFrame(r.theirs(3), StreamReset),
		synFrame(r.theirs(4), "reset"), rstFrame(r.theirs(4), StreamReset))
	open = accept(t, s)
	accept(t, s)
	accept(t, s).Close()
	synctest.Wait()
	p.took()
	return s, p, open
}

// TestFlood ends a session whose peer sends empty frames without end, and says why.
func TestFlood(t *testing.T) {
	for _, test := range emptyFrames {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r role) {
				s, p, open := floodedSession(t, r)
				read := goReadAll(open)
				time.Sleep(time.Hour) // which earns no more than a burst
				p.sendInto(bytes.Repeat(test.frame(r), 3*calmBurst))
				synctest.Wait()
				err := sessionError(t, s)
				if err.Code != EnhanceYourCalm || err.Remote {
					t.Errorf("the session ended with %+v", err)
				}
				if got := <-read; string(got.b) != "open" || got.err != error(err) {
					t.Errorf("Read: %q, %v", got.b, got.err)
				}
				if f := p.takeOne(); !f.is(goAwayFrame(r.theirs(4), EnhanceYourCalm, "")) {
					t.Errorf("the session sent %v", f)
				}
			})
		})
	}
}

// TestCalm goes on however many empty frames there are in all, if they come in time.
func TestCalm(t *testing.T) {
	for _, test := range emptyFrames {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := roles[0]
				_, p, open := floodedSession(t, r)
				for range 10 {
					p.send(bytes.Repeat(test.frame(r), calmBurst/4))
					time.Sleep(time.Second / 4)
				}
				p.send(finFrame(open.ID()))
				if b, err := io.ReadAll(open); string(b) != "open" || err != nil {
					t.Errorf("Read: %q, %v", b, err)
				}
			})
		})
	}
}

// TestWindowIncEachByte lets a peer send a WNDINC for each byte that it reads, as stock
// muxado does when its user reads byte by byte: however late, and in no time at all.
func TestWindowIncEachByte(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := rawSession(t, r, Config{})
		p.send(synFrame(r.theirs(1), ""))
		st := accept(t, s)
		const total = 3 * calmBurst
		for range 2 {
			if n, err := st.Write(make([]byte, total)); n != total || err != nil {
				t.Fatalf("Write: %d, %v", n, err)
			}
			synctest.Wait()
			if n := len(payload(p.took(), st.ID())); n != total {
				t.Fatalf("the peer got %d bytes", n)
			}
			p.send(bytes.Repeat(wndIncFrame(st.ID(), 1), total))
			synctest.Wait()
		}
		// And while the writer waits for them.
		st.Write(make([]byte, Window-calmBurst))
		synctest.Wait()
		p.took()
		written := goWrite(st, make([]byte, total))
		for acked := 0; acked < total; {
			synctest.Wait()
			n := len(payload(p.took(), st.ID()))
			if n == 0 {
				t.Fatalf("nothing came behind byte %d", acked)
			}
			acked += n
			for n > 0 { // in steps, so that the writer goes on meanwhile
				step := min(n, 1000)
				p.send(bytes.Repeat(wndIncFrame(st.ID(), 1), step))
				n -= step
			}
		}
		if got := <-written; got.n != total || got.err != nil {
			t.Errorf("Write: %d, %v", got.n, got.err)
		}
	})
}

// TestManyShortStreams takes a great many streams in no time, one after the other and
// at once, with all the empty frames that begin and end them.
func TestManyShortStreams(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		const many = calmBurst + calmBurst/5
		s, p := rawSession(t, r, Config{Backlog: many})
		s.EnableStop()
		id := r.theirs(1)
		for range many {
			p.send(synFrame(id, ""), finFrame(id), rstFrame(id, StreamClosed))
			accept(t, s).Close()
			id += 2
		}
		var frames []byte
		for range many {
			frames = append(append(frames, synFrame(id, "")...), finFrame(id)...)
			id += 2
		}
		p.send(frames)
		for range many {
			accept(t, s).Close()
		}
		synctest.Wait()
		if err := s.Err(); err != nil {
			t.Errorf("the session ended: %v", err)
		}
	})
}

// TestOverflow ends a session whose peer asks for replies and reads none.
func TestOverflow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := roles[1]
		s, p := stuckSession(t, r, Config{})
		s.RefuseStreams()
		st := openStream(t, s)
		read := goReadAll(st)
		id := r.theirs(1)
		for sent := 0; s.Err() == nil; sent++ {
			if sent > 2*overflow/len(rstFrame(0, 0)) {
				t.Fatalf("%d replies wait to be sent", sent)
			}
			var syns []byte
			for range 1000 {
				syns = append(syns, synFrame(id, "")...)
				id += 2
			}
			sent += 1000
			p.sendInto(syns)
		}
		<-s.Done()
		err := sessionError(t, s)
		if err.Code != EnhanceYourCalm || err.Remote {
			t.Errorf("the session ended with %+v", err)
		}
		if got := <-read; got.err != error(err) {
			t.Errorf("Read: %v", got.err)
		}
	})
}

// TestCongested opens no more streams while the transport takes nothing. Those that
// are open can be closed, and all is in order when it takes bytes again.
func TestCongested(t *testing.T) {
	inBubble(t, func(t *testing.T, r role) {
		s, p := stuckSession(t, r, Config{})
		var streams []*Stream
		var st *Stream
		var err error
		for err == nil {
			if st, err = s.Open(make([]byte, 10_000)); err == nil {
				streams = append(streams, st)
			}
			if len(streams) > 2*congested/10_000 {
				t.Fatalf("%d streams wait for the transport", len(streams))
			}
		}
		if err != ErrCongested {
			t.Fatalf("Open: %v", err)
		}
		for _, st := range streams[1:] {
			st.Close()
		}
		p.listen()
		synctest.Wait()
		frames := p.took()
		opened, finished := 0, 0
		for _, f := range frames {
			switch {
			case f.typ == frame.TypeData && f.flags == syn && f.id == streams[opened].ID() && len(f.body) == 10_000:
				opened++
			case f.is(finFrame(streams[1+finished].ID())):
				finished++
			default:
				t.Fatalf("the session sent %v", f)
			}
		}
		if opened != len(streams) || finished != len(streams)-1 {
			t.Errorf("the session sent %d SYNs and %d FINs for %d streams", opened, finished, len(streams))
		}
		if st, err := s.Open(nil); err != nil || st.ID() != streams[len(streams)-1].ID()+2 {
			t.Errorf("Open: %v, %v", st, err)
		}
	})
}
