package mux

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/inconshreveable/muxado/frame"
)

// malformed is something that no peer may send.
type malformed struct {
	name  string
	bytes func(r role) []byte
	want  Code

	first  bool              // it is the first that the peer sends
	before func(*Session)    // what was done to the session, if not nil
	last   func(role) uint32 // the last stream that the GOAWAY names; nil: the second
}

// Before a malformed frame that is not first, the peer has opened streams theirs(1),
// with the bytes "one", and theirs(2), with "two" and a FIN, and the session has
// opened ours(1).
func malformedFrames() []malformed {
	fixed := func(b []byte) func(role) []byte { return func(role) []byte { return b } }
	third := func(r role) uint32 { return r.theirs(3) }
	none := func(role) uint32 { return 0 }
	list := []malformed{
		{name: "DATA for stream 0", bytes: fixed(dataFrame(0, []byte("x"), 0)), want: ProtocolError},
		{name: "SYN for stream 0", bytes: fixed(synFrame(0, "x")), want: ProtocolError},
		{name: "FIN for stream 0", bytes: fixed(finFrame(0)), want: ProtocolError},
		{name: "RST for stream 0", bytes: fixed(rstFrame(0, StreamReset)), want: ProtocolError},
		{name: "WNDINC for stream 0", bytes: fixed(wndIncFrame(0, 1)), want: ProtocolError},
		{name: "GOAWAY for a stream", bytes: func(r role) []byte {
			return rawFrame(frame.TypeGoAway, 0, r.theirs(1), make([]byte, 8))
		}, want: ProtocolError},

		{name: "SYN with our parity", bytes: func(r role) []byte { return synFrame(r.ours(2), "x") }, want: ProtocolError},
		{name: "SYN for our stream", bytes: func(r role) []byte { return synFrame(r.ours(1), "x") }, want: ProtocolError},
		{name: "SYN again", bytes: func(r role) []byte { return synFrame(r.theirs(2), "x") }, want: ProtocolError},
		{name: "SYN for an earlier stream", bytes: func(r role) []byte { return synFrame(r.theirs(1), "x") }, want: ProtocolError},
		{name: "SYN below a refused one", bytes: func(r role) []byte {
			return append(synFrame(r.theirs(3), ""), synFrame(r.theirs(3), "")...)
		}, want: ProtocolError, before: (*Session).RefuseStreams, last: third},
		{name: "SYN where none may come", bytes: func(r role) []byte {
			return synFrame(r.theirs(3), "x")
		}, want: ProtocolError, before: (*Session).ForbidStreams},
		{name: "header of the longest SYN where none may come", bytes: func(r role) []byte {
			return header(maxLength, frame.TypeData, syn, r.theirs(3))
		}, want: ProtocolError, before: func(s *Session) { s.RefuseStreams(); s.ForbidStreams() }},

		{name: "WNDINC of 0", bytes: func(r role) []byte { return wndIncFrame(r.theirs(1), 0) }, want: ProtocolError},
		{name: "WNDINC of 0 with the top bit", bytes: func(r role) []byte { return wndIncFrame(r.theirs(1), 1<<31) }, want: ProtocolError},
		{name: "WNDINC overflows", bytes: func(r role) []byte { return wndIncFrame(r.theirs(1), maxID-Window+1) }, want: FlowControlError},
		{name: "WNDINC overflows behind a FIN", bytes: func(r role) []byte { return wndIncFrame(r.theirs(2), maxID) }, want: FlowControlError},
		{name: "WNDINC overflows our stream", bytes: func(r role) []byte {
			return wndIncFrame(r.ours(2), maxID-Window+1)
		}, want: FlowControlError, before: func(s *Session) { s.Open(nil) }},
		{name: "WNDINCs overflow together", bytes: func(r role) []byte {
			return append(wndIncFrame(r.theirs(1), maxID-Window), wndIncFrame(r.theirs(1), 1)...)
		}, want: FlowControlError},

		// Three bytes of the window are used up, and too few to be given back.
		{name: "DATA a byte beyond the window", bytes: func(r role) []byte {
			return dataFrame(r.theirs(1), make([]byte, Window-2), 0)
		}, want: FlowControlError},
		{name: "header of DATA a byte beyond the window", bytes: func(r role) []byte {
			return header(Window-2, frame.TypeData, 0, r.theirs(1))
		}, want: FlowControlError},
		{name: "header of DATA and FIN beyond the window", bytes: func(r role) []byte {
			return header(Window-2, frame.TypeData, fin, r.theirs(1))
		}, want: FlowControlError},
		{name: "header of DATA beyond our stream's window", bytes: func(r role) []byte {
			return header(Window+1, frame.TypeData, 0, r.ours(1))
		}, want: FlowControlError},
		{name: "header of the longest DATA", bytes: func(r role) []byte {
			return header(maxLength, frame.TypeData, 0, r.ours(1))
		}, want: FlowControlError},
		{name: "header of SYN beyond the window", bytes: func(r role) []byte {
			return header(Window+1, frame.TypeData, syn, r.theirs(3))
		}, want: FlowControlError, last: third},

		{name: "DATA after FIN", bytes: func(r role) []byte { return dataFrame(r.theirs(2), []byte("x"), 0) }, want: ProtocolError},
		{name: "DATA and FIN after FIN", bytes: func(r role) []byte { return dataFrame(r.theirs(2), []byte("x"), fin) }, want: ProtocolError},
		{name: "header of the longest DATA after FIN", bytes: func(r role) []byte {
			return header(maxLength, frame.TypeData, 0, r.theirs(2))
		}, want: ProtocolError},

		{name: "bytes that are no frames", bytes: fixed(bytes.Repeat([]byte{0xff}, 100)), want: ProtocolError, first: true, last: none},
		{name: "HTTP", bytes: fixed([]byte("GET / HTTP/1.1\r\nHost: relay\r\n\r\n")), want: FrameSizeError, first: true, last: none},
		{name: "HTTP/2", bytes: fixed([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")), want: FrameSizeError, first: true, last: none},
		{name: "SSH", bytes: fixed([]byte("SSH-2.0-OpenSSH_9.9\r\n")), want: FrameSizeError, first: true, last: none},
		{name: "almost TLS", bytes: fixed([]byte("\x16\x04\x01\x02\x00\x01\x00\x01")), want: FrameSizeError, first: true, last: none},
		{name: "TLS alert", bytes: fixed([]byte("\x15\x03\x03\x00\x02\x02\x46 and more")), want: FrameSizeError, first: true, last: none},
		{name: "TLS", bytes: fixed([]byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 and so on")), want: FrameSizeError, first: true, last: none},
	}
	for _, n := range []int{0, 1, 3, 5, 8, maxLength} {
		list = append(list,
			malformed{name: fmt.Sprintf("RST of length %d", n), bytes: func(r role) []byte {
				return append(header(n, frame.TypeRst, 0, r.theirs(1)), make([]byte, min(n, 100))...)
			}, want: FrameSizeError},
			malformed{name: fmt.Sprintf("WNDINC of length %d", n), bytes: func(r role) []byte {
				return append(header(n, frame.TypeWndInc, 0, r.theirs(1)), bytes.Repeat([]byte{1}, min(n, 100))...)
			}, want: FrameSizeError})
	}
	for n := range 8 {
		list = append(list, malformed{name: fmt.Sprintf("GOAWAY of length %d", n),
			bytes: fixed(append(header(n, frame.TypeGoAway, 0, 0), make([]byte, n)...)), want: FrameSizeError})
	}
	for typ := range frame.Type(16) {
		const top = 1 << 31
		length := map[frame.Type]int{frame.TypeRst: 4, frame.TypeWndInc: 4, frame.TypeGoAway: 8}[typ]
		list = append(list, malformed{name: fmt.Sprintf("top bit in the id of type %d", typ), bytes: func(r role) []byte {
			return append(header(length, typ, 0, top|r.theirs(1)), bytes.Repeat([]byte{1}, length)...)
		}, want: ProtocolError})
	}
	list = append(list, malformed{name: "top bit in the id of a SYN", bytes: func(r role) []byte {
		return synFrame(1<<31|r.theirs(3), "")
	}, want: ProtocolError})

	// Streams that nobody opened. A client's first is 3, so 1 is none in any role.
	for name, id := range map[string]func(role) uint32{
		"our next":     func(r role) uint32 { return r.ours(2) },
		"our last":     func(r role) uint32 { return maxID - 1 + r.odd },
		"their next":   third,
		"their last":   func(r role) uint32 { return maxID - r.odd },
		"never opened": func(r role) uint32 { return [...]uint32{r.theirs(3), 1}[r.odd] },
	} {
		for what, f := range map[string]func(uint32) []byte{
			"DATA":                       func(id uint32) []byte { return dataFrame(id, []byte("x"), 0) },
			"empty DATA":                 func(id uint32) []byte { return dataFrame(id, nil, 0) },
			"FIN":                        finFrame,
			"header of the longest DATA": func(id uint32) []byte { return header(maxLength, frame.TypeData, 0, id) },
			"RST":                        func(id uint32) []byte { return rstFrame(id, StreamReset) },
			"WNDINC":                     func(id uint32) []byte { return wndIncFrame(id, 1) },
		} {
			list = append(list, malformed{name: what + " for a stream that is " + name,
				bytes: func(r role) []byte { return f(id(r)) }, want: ProtocolError})
		}
	}
	return list
}

// TestMalformed sends malformed frames, at once and a byte at a time. Each ends the
// session with the right code for its streams and for the peer, and nothing else:
// another session in the process goes on. The bubble sees to it that nothing is left
// behind.
func TestMalformed(t *testing.T) {
	for _, r := range roles {
		for _, m := range malformedFrames() {
			t.Run(r.name+"/"+m.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { m.test(t, r, (*rawPeer).sendInto) })
			})
			t.Run(r.name+"/slowly/"+m.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { m.test(t, r, (*rawPeer).sendSlowly) })
			})
		}
	}
}

func (m malformed) test(t *testing.T, r role, send func(*rawPeer, []byte)) {
	other := startEcho(t)
	s, p := rawSession(t, r, Config{})
	var streams endedStreams
	if !m.first {
		p.send(synFrame(r.theirs(1), "one"), synFrame(r.theirs(2), "two"), finFrame(r.theirs(2)))
		streams.start(t, s)
	}
	if m.before != nil {
		m.before(s)
	}
	synctest.Wait()
	p.took()

	send(p, m.bytes(r))
	synctest.Wait()

	err := sessionError(t, s)
	if err.Code != m.want || err.Remote {
		t.Fatalf("the session ended with %+v, want a local %v", err, m.want)
	}
	if m.first && !strings.Contains(err.Error(), fmt.Sprintf("%q", m.bytes(r)[:8])) {
		t.Errorf("%q does not say what the peer began with", err)
	}
	if isTLS := strings.HasPrefix(m.name, "TLS"); errors.Is(err, ErrTLS) != isTLS {
		t.Errorf("%v is ErrTLS: %v, want %v", err, !isTLS, isTLS)
	}
	<-p.done
	if p.err != io.EOF {
		t.Errorf("the transport ended with %v, want EOF", p.err)
	}
	last := r.theirs(2)
	if m.last != nil {
		last = m.last(r)
	}
	frames := p.took()
	if n := len(frames); n == 0 || !frames[n-1].is(goAwayFrame(last, m.want, "")) {
		t.Errorf("the peer got %v, want a GOAWAY with last stream %d and %v", frames, last, m.want)
	}
	if !m.first {
		streams.check(t, err)
	}
	other.check(t)
}

// sessionError returns why s ended, which it has to have.
func sessionError(t testing.TB, s *Session) *SessionError {
	t.Helper()
	select {
	case <-s.Done():
	default:
		t.Fatal("the session goes on")
	}
	var se *SessionError
	if !errors.As(s.Err(), &se) {
		t.Fatalf("the session ended with %v, no *SessionError", s.Err())
	}
	if _, err := s.Open(nil); err != error(se) {
		t.Errorf("Open: %v, want %v", err, se)
	}
	if _, err := s.Accept(); err != error(se) {
		t.Errorf("Accept: %v, want %v", err, se)
	}
	return se
}

// endedStreams are streams of a session that is to end: one and two were opened by
// the peer, with the bytes "one" and with "two" and a FIN, and three by the session.
type endedStreams struct {
	one, two, three *Stream
	read, written   chan result
}

type result struct {
	b   []byte
	n   int64
	err error
}

// start accepts and opens them, and leaves a Read waiting on one and a Write on three.
func (e *endedStreams) start(t *testing.T, s *Session) {
	e.one, e.two, e.three = accept(t, s), accept(t, s), openStream(t, s)
	e.read = goReadAll(e.one)
	e.written = goWrite(e.three, make([]byte, Window+1))
}

// check looks at what they say once the session ended with want: the loss of the
// session is an end of the bytes only behind a FIN.
func (e *endedStreams) check(t *testing.T, want *SessionError) {
	t.Helper()
	if got := <-e.read; string(got.b) != "one" || got.err != error(want) {
		t.Errorf("the Read under way: %q, %v, want \"one\", %v", got.b, got.err, want)
	}
	if got := <-e.written; got.n != Window || got.err != error(want) {
		t.Errorf("the Write under way: %d, %v, want %d, %v", got.n, got.err, Window, want)
	}
	if b, err := io.ReadAll(e.two); string(b) != "two" || err != nil {
		t.Errorf("the stream whose FIN had come: %q, %v, want \"two\" and EOF", b, err)
	}
	if _, err := e.two.Write([]byte("x")); err != error(want) {
		t.Errorf("a Write behind the peer's FIN: %v, want %v", err, want)
	}
	if _, err := e.three.Read(make([]byte, 1)); err != error(want) {
		t.Errorf("a Read: %v, want %v", err, want)
	}
	if err := e.one.CloseWrite(); err != error(want) {
		t.Errorf("CloseWrite: %v, want %v", err, want)
	}
	for _, st := range []*Stream{e.one, e.two, e.three} {
		if err := st.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if _, err := st.Read(make([]byte, 1)); err != net.ErrClosed {
			t.Errorf("Read after Close: %v", err)
		}
	}
}

// goReadAll reads r to its end in a goroutine.
func goReadAll(r io.Reader) chan result {
	ch := make(chan result, 1)
	go func() {
		b, err := io.ReadAll(r)
		ch <- result{b: b, err: err}
	}()
	return ch
}

// goWrite writes p in a goroutine.
func goWrite(w io.Writer, p []byte) chan result {
	ch := make(chan result, 1)
	go func() {
		n, err := w.Write(p)
		ch <- result{n: int64(n), err: err}
	}()
	return ch
}

// An echo is a pair of sessions with a stream whose bytes come back.
type echo struct{ st *Stream }

func startEcho(t testing.TB) echo {
	a, b := pipeStreams(t, Config{})
	go io.Copy(b, b)
	return echo{a}
}

// check fails the test if its bytes do not come back.
func (e echo) check(t testing.TB) {
	t.Helper()
	want := bytes.Repeat([]byte("echo "), 20_000)
	go e.st.Write(want)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(e.st, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("another session: %v, or other bytes than it sent", err)
	}
}

// TestTruncated ends the transport within each kind of frame, at each of its bytes.
// What came of it can be read; that it was all cannot be taken from it.
func TestTruncated(t *testing.T) {
	for _, r := range roles {
		for name, f := range map[string][]byte{
			"SYN":     synFrame(r.theirs(3), "three"),
			"DATA":    dataFrame(r.theirs(1), []byte("more"), 0),
			"FIN":     dataFrame(r.theirs(1), []byte("more"), fin),
			"RST":     rstFrame(r.theirs(2), StreamReset),
			"WNDINC":  wndIncFrame(r.ours(1), 1),
			"GOAWAY":  goAwayFrame(r.ours(1), InternalError, "text"),
			"unknown": rawFrame(7, 3, 12345, []byte("body")),
		} {
			for cut := range len(f) {
				t.Run(fmt.Sprintf("%s/%s at %d", r.name, name, cut), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { testTruncated(t, r, f[:cut]) })
				})
			}
		}
	}
}

func testTruncated(t *testing.T, r role, piece []byte) {
	s, p := rawSession(t, r, Config{})
	p.send(synFrame(r.theirs(1), "one"), synFrame(r.theirs(2), "two"), finFrame(r.theirs(2)))
	one, two, three := accept(t, s), accept(t, s), openStream(t, s)
	reads := []chan result{goReadAll(one), goReadAll(two), goReadAll(three)}
	if len(piece) > 0 {
		p.send(piece)
	}
	synctest.Wait() // until nothing is to be written, or that would be what fails
	p.conn.Close()
	synctest.Wait()

	err := sessionError(t, s)
	if err.Code != NoError || err.Remote || !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		t.Errorf("the session ended with %+v, want an unexpected EOF of the transport", err)
	}
	got := <-reads[0]
	wantOne := "one"
	if len(piece) > 8 && piece[3]>>4 == byte(frame.TypeData) && piece[7] == byte(one.ID()) {
		wantOne += string(piece[8:])
	}
	if string(got.b) != wantOne || got.err != error(err) {
		t.Errorf("stream cut short: %q, %v, want %q, %v", got.b, got.err, wantOne, err)
	}
	if got := <-reads[1]; string(got.b) != "two" || got.err != nil {
		t.Errorf("stream with FIN: %q, %v", got.b, got.err)
	}
	if got := <-reads[2]; len(got.b) != 0 || got.err != error(err) {
		t.Errorf("stream without a byte: %q, %v", got.b, got.err)
	}
}
