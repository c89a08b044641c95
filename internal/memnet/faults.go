package memnet

import "time"

// The faults act on the connection, whichever end they are called on, in both
// directions.

// Freeze stops all delivery, without an end noticing: what is written stays in the
// buffer, and Write waits when that is full. A Close shows at the other end after
// Thaw; if it is one that resets, what was not delivered yet is lost. What had arrived
// can be read.
func (c *Conn) Freeze() {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	c.l.frozen = true
}

// Thaw ends a Freeze.
func (c *Conn) Thaw() {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	c.l.frozen = false
	c.in.deliver()
	c.out.deliver()
}

// Cut resets both ends at once, even of a frozen connection. What is under way is
// lost; what had arrived can be read before the error.
func (c *Conn) Cut() {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	c.in.lose()
	c.out.lose()
	c.receiveReset()
	c.peer.receiveReset()
}

// CutAfter cuts the connection when n more bytes were written, counted over both
// directions: those arrive, and then a reset at either end, each behind what was under
// way there. Further bytes go nowhere. The cut is due at once if n is 0; a negative n
// takes it back.
func (c *Conn) CutAfter(n int64) {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	c.l.budget = n
	if n == 0 {
		c.cutBehind()
	}
}

// cutBehind sends a reset to either end, behind what is under way.
func (c *Conn) cutBehind() {
	c.in.send(rst, 0)
	c.out.send(rst, 0)
}

// SetLatency makes everything arrive, in order, d after it was written. It is meant
// for what is written from now on. Bytes under way are in the buffer, so that at most
// a buffer gets across per d. The default is 0; less is the same.
func (c *Conn) SetLatency(d time.Duration) {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	c.l.latency = d
}

// SetSlice lets a Read return no more than n bytes, and a Write hand on its bytes in
// such pieces. The default, and what less than 1 stands for, is no limit.
func (c *Conn) SetSlice(n int) {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	c.l.slice = n
}

// SetBuffer sets how many bytes a direction holds, those under way and those that
// arrived. The default, which 0 and less restore, is 64 KiB.
func (c *Conn) SetBuffer(n int) {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	if n <= 0 {
		n = defaultBuffer
	}
	c.l.buffer = n
	c.writable.Broadcast()
	c.peer.writable.Broadcast()
}
