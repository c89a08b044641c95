package mux

import (
	"bytes"
	"net"
	"sync"
	"testing"

	"github.com/inconshreveable/muxado/frame"
)

// A conduct is what one end of a session sent, to be held against the rules that it
// holds its peer to.
type conduct struct {
	frames []wireFrame
	opened uint32           // the highest id of a SYN; those that it left out are over
	data   map[uint32]int64 // bytes that it sent for each stream
	window map[uint32]int64 // window that it gave for each stream
}

func newConduct() *conduct {
	return &conduct{data: make(map[uint32]int64), window: make(map[uint32]int64)}
}

// conductOf reads frames up to the end of b. One that is cut short there counts.
func conductOf(b []byte) *conduct {
	c := newConduct()
	r := bytes.NewReader(b)
	for {
		f, err := readWireFrame(r)
		if err == nil || f.id != 0 {
			c.add(f)
		}
		if err != nil {
			return c
		}
	}
}

func (c *conduct) add(f wireFrame) {
	c.frames = append(c.frames, f)
	switch f.typ {
	case frame.TypeData:
		if f.flags&syn != 0 {
			c.opened = max(c.opened, f.id)
		}
		c.data[f.id] += int64(len(f.body))
	case frame.TypeWndInc:
		if len(f.body) == 4 {
			c.window[f.id] += int64(f.number(0) & maxID)
		}
	}
}

// check fails the test for every frame that a session of role r should not have sent
// to a peer that has sent what peer holds.
func (c *conduct) check(t testing.TB, r role, peer *conduct, maxWindow int) {
	t.Helper()
	last := r.ours(0)
	finished := make(map[uint32]bool)
	given := make(map[uint32]int64)
	gone := false
	for i, f := range c.frames {
		bad := func(why string) { t.Errorf("frame %d of the %s, %v: %s", i, r.name, f, why) }
		ours := f.id&1 == r.odd
		if gone {
			bad("behind a GOAWAY")
		}
		if f.id > maxID {
			bad("top bit")
		}
		if f.typ != frame.TypeGoAway && f.flags&syn == 0 &&
			!(ours && f.id > r.odd && f.id <= last || !ours && f.id <= peer.opened) {
			bad("nobody opened that stream")
		}
		switch f.typ {
		case frame.TypeData:
			if f.flags&syn != 0 {
				if f.id != last+2 || !ours {
					bad("not the next of its ids")
				}
				if f.flags&fin != 0 {
					bad("SYN and FIN in one")
				}
				last = f.id
			}
			if f.flags == 0 && len(f.body) == 0 {
				bad("empty")
			}
			if finished[f.id] {
				bad("behind a FIN")
			}
			finished[f.id] = f.flags&fin != 0
			if len(f.body) > maxPayload {
				bad("too large")
			}
		case frame.TypeWndInc:
			given[f.id] += int64(f.number(0))
			if f.number(0) == 0 || given[f.id] > peer.data[f.id]+int64(maxWindow-Window) {
				bad("gives what it has not got")
			}
		case frame.TypeRst:
			if len(f.body) != 4 || f.number(0) > uint32(EnhanceYourCalm) {
				bad("no such code")
			}
		case frame.TypeGoAway:
			if f.id != 0 || len(f.body) != 8 {
				bad("not as it should be")
			}
			gone = true
		default:
			bad("unknown type")
		}
	}
	for id, n := range c.data {
		if n > Window+peer.window[id] {
			t.Errorf("the %s sent %d bytes for stream %d, where it may send %d", r.name, n, id, Window+peer.window[id])
		}
	}
}

// A tapConn keeps what is written to it.
type tapConn struct {
	net.Conn
	mu sync.Mutex
	b  []byte
}

func (c *tapConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.b = append(c.b, p[:n]...)
	return n, err
}

func (c *tapConn) written() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b
}
