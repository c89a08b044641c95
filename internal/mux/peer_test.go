package mux

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"

	"github.com/inconshreveable/muxado/frame"
)

// The frames of this file are laid out by hand, neither with this package's
// encoder nor with muxado's: tests that share code with what they test share its
// mistakes, and most of these frames no encoder would make.

const (
	fin = frame.FlagDataFin
	syn = frame.FlagDataSyn

	maxLength = 1<<24 - 1 // what a frame's header can say
)

// header lays out the header of a frame, whether or not it makes sense.
func header(length int, typ frame.Type, flags frame.Flags, id uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(length)<<8|uint32(typ)<<4|uint32(flags))
	return binary.BigEndian.AppendUint32(b, id)
}

func rawFrame(typ frame.Type, flags frame.Flags, id uint32, body []byte) []byte {
	return append(header(len(body), typ, flags, id), body...)
}

func dataFrame(id uint32, body []byte, flags frame.Flags) []byte {
	return rawFrame(frame.TypeData, flags, id, body)
}

func synFrame(id uint32, body string) []byte { return dataFrame(id, []byte(body), syn) }

func finFrame(id uint32) []byte { return dataFrame(id, nil, fin) }

func rstFrame(id uint32, code Code) []byte {
	return rawFrame(frame.TypeRst, 0, id, binary.BigEndian.AppendUint32(nil, uint32(code)))
}

func wndIncFrame(id, n uint32) []byte {
	return rawFrame(frame.TypeWndInc, 0, id, binary.BigEndian.AppendUint32(nil, n))
}

func goAwayFrame(last uint32, code Code, text string) []byte {
	b := binary.BigEndian.AppendUint32(nil, last)
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	return rawFrame(frame.TypeGoAway, 0, 0, append(b, text...))
}

// A wireFrame is a frame that a session sent.
type wireFrame struct {
	typ   frame.Type
	flags frame.Flags
	id    uint32
	body  []byte
}

func (f wireFrame) String() string {
	return fmt.Sprintf("%v id %d flags %d: %d bytes %.20q", f.typ, f.id, f.flags, len(f.body), f.body)
}

// is reports whether f is what the one frame in b says.
func (f wireFrame) is(b []byte) bool {
	return slices.Equal(rawFrame(f.typ, f.flags, f.id, f.body), b)
}

// number is the nth four bytes of a control frame's body: a code, an increment.
func (f wireFrame) number(n int) uint32 { return binary.BigEndian.Uint32(f.body[4*n:]) }

// readWireFrame reads a frame. With io.ErrUnexpectedEOF it returns what is there of
// one, which is nothing, with type 0 and no id, if that is less than a header.
func readWireFrame(r io.Reader) (f wireFrame, err error) {
	var h [8]byte
	if _, err = io.ReadFull(r, h[:]); err != nil {
		return f, err
	}
	first := binary.BigEndian.Uint32(h[:])
	f.typ, f.flags = frame.Type(first>>4&0xf), frame.Flags(first&0xf)
	f.id = binary.BigEndian.Uint32(h[4:])
	f.body, err = io.ReadAll(io.LimitReader(r, int64(first>>8)))
	if err == nil && len(f.body) < int(first>>8) {
		err = io.ErrUnexpectedEOF
	}
	return f, err
}

// A rawPeer is the other end of a session's transport. It sends whatever bytes a
// test likes, and keeps the frames that the session sends.
type rawPeer struct {
	t    testing.TB
	conn net.Conn
	done chan struct{} // closed when the session sends no more

	mu     sync.Mutex
	frames []wireFrame
	err    error // what reading the transport ended with
}

// newRawPeer returns a peer that reads nothing before listen.
func newRawPeer(t testing.TB, conn net.Conn) *rawPeer {
	return &rawPeer{t: t, conn: conn, done: make(chan struct{})}
}

func (p *rawPeer) listen() { go p.collect() }

func (p *rawPeer) collect() {
	defer close(p.done)
	for {
		f, err := readWireFrame(p.conn)
		p.mu.Lock()
		if err != nil {
			p.err = err
			p.mu.Unlock()
			return
		}
		p.frames = append(p.frames, f)
		p.mu.Unlock()
	}
}

// send sends frames in one write of the transport.
func (p *rawPeer) send(frames ...[]byte) {
	p.t.Helper()
	if _, err := p.conn.Write(slices.Concat(frames...)); err != nil {
		p.t.Fatalf("the session takes no bytes: %v", err)
	}
}

// sendInto sends what a session may refuse to read to its end.
func (p *rawPeer) sendInto(b []byte) { p.conn.Write(b) }

// sendSlowly sends b a byte a write, or in a thousand pieces if it is long, as far as
// the session takes it.
func (p *rawPeer) sendSlowly(b []byte) {
	for piece := range slices.Chunk(b, 1+len(b)/1000) {
		if _, err := p.conn.Write(piece); err != nil {
			return
		}
	}
}

// took returns the frames that came since it was called last.
func (p *rawPeer) took() []wireFrame {
	p.mu.Lock()
	defer p.mu.Unlock()
	frames := p.frames
	p.frames = nil
	return frames
}

// takeOne returns the only frame that came since took was called last.
func (p *rawPeer) takeOne() wireFrame {
	p.t.Helper()
	frames := p.took()
	if len(frames) != 1 {
		p.t.Fatalf("the session sent %d frames, want 1: %v", len(frames), frames)
	}
	return frames[0]
}

// takeNone fails the test if the session sent anything.
func (p *rawPeer) takeNone() {
	p.t.Helper()
	if frames := p.took(); len(frames) > 0 {
		p.t.Fatalf("the session sent %v, want nothing", frames)
	}
}

// payload joins the bytes of stream id's DATA frames.
func payload(frames []wireFrame, id uint32) (b []byte) {
	for _, f := range frames {
		if f.typ == frame.TypeData && f.id == id {
			b = append(b, f.body...)
		}
	}
	return b
}

// A role is what differs between the two ends of a session.
type role struct {
	name  string
	start func(net.Conn, Config) *Session
	odd   uint32
}

var roles = []role{{"client", Client, 1}, {"server", Server, 0}}

// ours is the id of the nth stream that a session of this role opens, from 1 on,
// and theirs of the nth that its peer does. Muxado's clients start with 3.
func (r role) ours(n int) uint32   { return uint32(2*n) + r.odd }
func (r role) theirs(n int) uint32 { return uint32(2*n) + 1 - r.odd }

// rawSession starts a session whose peer is raw and listens. Both are gone when the
// test is over.
func rawSession(t testing.TB, r role, cfg Config) (*Session, *rawPeer) {
	t.Helper()
	s, p := stuckSession(t, r, cfg)
	p.listen()
	return s, p
}

// stuckSession is rawSession with a peer that does not listen yet, on a transport
// that takes nothing before it does.
func stuckSession(t testing.TB, r role, cfg Config) (*Session, *rawPeer) {
	t.Helper()
	c1, c2 := net.Pipe()
	s, p := r.start(c1, cfg), newRawPeer(t, c2)
	t.Cleanup(func() {
		c2.Close()
		s.Close()
	})
	return s, p
}

func openStream(t testing.TB, s *Session) *Stream {
	t.Helper()
	st, err := s.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func accept(t testing.TB, s *Session) *Stream {
	t.Helper()
	st, err := s.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return st
}
