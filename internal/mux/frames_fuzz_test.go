package mux

import (
	"encoding/binary"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inconshreveable/muxado/frame"
)

// FuzzFrames has a raw peer send what the input says to a session whose streams are
// used in various ways. Whatever that is, the session does not panic and keeps to the
// protocol itself; when it ends, or the transport does, nothing is left of it.
//
// The first byte chooses the session's role, its limits, and whether the rest is
// bytes to be sent as they are or a list of frames: of four bytes each, for type and
// flags, stream, and the body's length, so that mutations stay frames.
func FuzzFrames(f *testing.F) {
	for _, r := range roles {
		kind := byte(r.odd)
		one, two, ours := r.theirs(1), r.theirs(2), r.ours(1)
		for _, frames := range [][][]byte{
			{synFrame(one, "hello"), dataFrame(one, []byte("more"), 0), finFrame(one)},
			{synFrame(one, "hello"), rstFrame(one, StreamReset), dataFrame(one, []byte("late"), fin)},
			{synFrame(one, "a"), synFrame(two, "b"), wndIncFrame(one, 1000), rstFrame(two, StreamClosed)},
			{dataFrame(ours, []byte("answer"), fin), rstFrame(ours, StreamClosed), wndIncFrame(ours, maxID)},
			{goAwayFrame(ours, InternalError, "some text"), synFrame(one, "x"), rawFrame(9, 0, 0, []byte("unknown"))},
			{synFrame(one, ""), header(Window+1, frame.TypeData, 0, one)},
			{[]byte("GET / HTTP/1.1\r\n\r\n")},
		} {
			f.Add(slices.Concat([]byte{kind}, slices.Concat(frames...)))
		}
		const list = 2
		data, b1, b2, b3 := byte(frame.TypeData)<<4, byte(one), byte(two), byte(ours)
		f.Add([]byte{kind | list, data | syn, b1, 0x10, 0, data, b1, 0, 3, data | fin, b1, 0, 0})
		f.Add([]byte{kind | list | 4, data | syn, b1, 0, 0, data | syn, b2, 0x20, 0, data, b3, 0xff, 0, 0x20, b3, 0, 4, 0, b2, 0, 4})
		f.Add([]byte{kind | list | 8, data | syn, b1, 0, 9, data | syn | fin, b2, 1, 0, 0x30, 0, 0, 20, data, b1, 0, 1, 0x70, 1, 2, 3})
		f.Add([]byte{kind | list | 16, data | syn, b1, 0, 9, data, b1, 0xff, 0xff, data, b1, 0xff, 0xff, data, b1, 0xff, 0xff, data, b1, 0xff, 0xff})
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) == 0 || len(input) > 1<<12 {
			return
		}
		synctest.Test(t, func(t *testing.T) { fuzzFrames(t, input[0], input[1:]) })
	})
}

func fuzzFrames(t *testing.T, kind byte, input []byte) {
	r := roles[1-kind&1] // as odd
	frames := input
	if kind&2 != 0 {
		frames = frameList(input)
	}
	cfg := Config{}
	if kind&4 != 0 {
		cfg = Config{Backlog: 1, MaxStreams: 3, MaxUnread: Window, MaxWindow: Window}
	}
	cfg.setDefaults()
	c1, c2 := net.Pipe()
	s, p := r.start(c1, cfg), newRawPeer(t, c2)
	if kind&8 != 0 {
		s.EnableStop()
	}
	if kind&16 == 0 {
		p.listen()
	}
	if kind&32 != 0 {
		s.RefuseStreams()
	}
	var users sync.WaitGroup
	for range 2 {
		st := openStream(t, s)
		users.Go(func() { fuzzUse(t, st) })
	}
	users.Go(func() {
		for st := range acceptedBy(s) {
			users.Go(func() { fuzzUse(t, st) })
		}
	})
	if kind&64 != 0 {
		p.sendSlowly(frames)
	} else {
		p.sendInto(frames)
	}
	synctest.Wait()
	ended := s.Err() != nil // of itself
	if kind&16 != 0 {
		p.listen()
		synctest.Wait()
	}
	if kind&128 != 0 {
		c2.Close()
	} else {
		s.Close()
	}
	<-s.Done()
	err := sessionError(t, s)
	if ended && err.Remote || err.Code > EnhanceYourCalm && !err.Remote {
		t.Errorf("the session ended with %+v", err)
	}
	s.Close()
	c2.Close()
	<-p.done
	users.Wait()
	if n := s.unread.Load(); n < 0 {
		t.Errorf("%d bytes are unread", n)
	}

	got := newConduct()
	for _, f := range p.took() {
		got.add(f)
	}
	got.check(t, r, conductOf(frames), cfg.MaxWindow)
	if ended && kind&16 == 0 && err.Code != NoError && !slices.ContainsFunc(got.frames, func(f wireFrame) bool {
		return f.typ == frame.TypeGoAway && f.number(1) == uint32(err.Code)
	}) {
		t.Errorf("the session ended with %v, and did not tell the peer", err)
	}
}

// frameList makes frames of a list.
func frameList(list []byte) (frames []byte) {
	for ; len(list) >= 4 && len(frames) < 1<<19; list = list[4:] {
		typ, id, n := frame.Type(list[0]>>4), uint32(list[1]), int(binary.BigEndian.Uint16(list[2:]))
		body := pattern(int(id), n)
		switch typ {
		case frame.TypeWndInc:
			body = binary.BigEndian.AppendUint32(nil, uint32(n))
		case frame.TypeRst:
			body = binary.BigEndian.AppendUint32(nil, uint32(n%12))
		case frame.TypeGoAway:
			body = append(binary.BigEndian.AppendUint64(nil, uint64(n)), body[:n%100]...)
		}
		frames = append(frames, rawFrame(typ, frame.Flags(list[0]&15), id, body)...)
	}
	return frames
}

// fuzzUse uses a stream in a way that depends on its id, and closes it in the end.
func fuzzUse(t *testing.T, st *Stream) {
	defer st.Close()
	switch st.ID() / 2 % 6 {
	case 0: // an echo
		io.Copy(st, st)
	case 1: // says something, and reads to the end
		st.Write(make([]byte, Window+1000))
		st.CloseWrite()
		io.Copy(io.Discard, struct{ io.Reader }{st})
	case 2: // has no patience
		st.SetDeadline(time.Now().Add(time.Second))
		io.ReadAll(st)
		st.Write(make([]byte, 2*Window))
	case 3: // takes a look and goes
		st.Peek(make([]byte, 100))
		if st.ID()&1 != 0 {
			st.Read(make([]byte, 100))
		}
		st.Refuse()
	case 4: // does not read
		time.Sleep(time.Minute)
	case 5: // is reset when the peer is gone
		st.OnEnd(func(error) {})
		st.Keep(100_000)
		n, err := st.ReadFrom(io.LimitReader(zeros{}, 100_000))
		if b, ok := st.Kept(); ok && (len(b) < int(n) || err == nil && len(b) != 100_000) {
			t.Errorf("kept %d bytes; ReadFrom sent %d, %v", len(b), n, err)
		}
	}
}
