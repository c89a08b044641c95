package memnet

import (
	"bytes"
	"time"
)

// A kind says what arrives.
type kind int

const (
	data kind = iota
	fin
	rst
)

// A parcel is what arrives at one time.
type parcel struct {
	kind kind
	n    int       // bytes of data, the next of the buffer
	at   time.Time // not before, nor before what is ahead of it
}

// A pipe is one direction of a connection, guarded by its link's lock. Its buffer
// holds all that was written and not read: first what has arrived, then what is under
// way.
type pipe struct {
	l       *link
	to      *Conn
	buf     bytes.Buffer
	arrived int      // bytes of buf that can be read
	way     []parcel // in order
	timer   *time.Timer
	cut     bool // a reset was sent: nothing gets behind it
}

// put writes what fits of b, one piece of it at most, and returns how much that was.
func (p *pipe) put(b []byte) int {
	if p.cut {
		return len(b) // into the void, until the reset has come back
	}
	n := min(len(b), max(p.l.buffer-p.buf.Len(), 0))
	if p.l.slice > 0 {
		n = min(n, p.l.slice)
	}
	if p.l.budget >= 0 {
		n = int(min(int64(n), p.l.budget))
	}
	if n == 0 {
		return 0
	}
	p.buf.Write(b[:n])
	p.send(data, n)
	if p.l.budget >= 0 {
		if p.l.budget -= int64(n); p.l.budget == 0 {
			p.to.cutBehind()
		}
	}
	return n
}

// take reads into b.
func (p *pipe) take(b []byte) int {
	n := min(len(b), p.arrived)
	if p.l.slice > 0 {
		n = min(n, p.l.slice)
	}
	p.arrived -= n
	return copy(b, p.buf.Next(n))
}

// lose loses what is under way, a reset too.
func (p *pipe) lose() {
	p.buf.Truncate(p.arrived)
	p.way, p.cut = nil, false
}

// stop ends the pipe, when nobody is left to write or read.
func (p *pipe) stop() {
	p.buf = bytes.Buffer{}
	p.arrived, p.way = 0, nil
	if p.timer != nil {
		p.timer.Stop()
	}
}

// send puts on the way the last n bytes of the buffer, or a FIN or RST behind them.
func (p *pipe) send(k kind, n int) {
	if p.cut {
		return
	}
	p.cut = k == rst
	p.way = append(p.way, parcel{k, n, time.Now().Add(p.l.latency)})
	p.deliver()
}

// deliver lets arrive what is due, and sets the timer for what is not.
func (p *pipe) deliver() {
	for !p.l.frozen && len(p.way) > 0 {
		next := p.way[0]
		left := time.Until(next.at)
		if left > 0 {
			p.wait(left)
			return
		}
		p.way = p.way[1:]
		p.arrive(next.kind, next.n)
	}
}

func (p *pipe) wait(d time.Duration) {
	if p.timer != nil {
		p.timer.Reset(d)
		return
	}
	p.timer = time.AfterFunc(d, func() {
		p.l.mu.Lock()
		defer p.l.mu.Unlock()
		p.deliver()
	})
}

func (p *pipe) arrive(k kind, n int) {
	switch k {
	case data:
		p.arrived += n
		p.to.readable.Broadcast()
		if p.to.closed {
			p.to.sendReset()
		}
	case fin:
		p.to.eof = true
		p.to.readable.Broadcast()
	case rst:
		p.to.receiveReset()
	}
}
