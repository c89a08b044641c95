package throttle

import (
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tcprelay/relay/internal/join"
)

// Conn returns c with all that is read from it taken from each of the read buckets,
// and all that is written to it from each of the write ones. Buckets that are nil
// are left out. If there are no others, it returns c.
//
// A Read returns its bytes when they may pass; a Write writes them then. Close and the
// deadlines end such a wait as they end any other. A Read that is cut short
// returns its bytes, and the next one waits for what is left.
func Conn(c join.Conn, read, write []*Bucket) join.Conn {
	t := &conn{Conn: c}
	t.reads.init(read)
	t.writes.init(write)
	if len(t.reads.buckets) == 0 && len(t.writes.buckets) == 0 {
		return c
	}
	return t
}

type conn struct {
	join.Conn
	reads, writes side
}

// Waits reports whether a read, or a write, of c waits for the rate now.
func Waits(c net.Conn) (read, write bool) {
	t, ok := c.(*conn)
	if !ok {
		return false, false
	}
	return t.reads.waits.Load(), t.writes.waits.Load()
}

// NetConn returns the connection that c slows down.
func (c *conn) NetConn() net.Conn { return c.Conn }

// A side is one direction of a conn.
type side struct {
	buckets []*Bucket
	piece   int           // how much may move at once
	changed chan struct{} // has room for one: the deadline was set, or the conn closed

	turn  chan struct{} // a lock: full through a whole Read or Write
	waits atomic.Bool   // the call that has it waits for the rate
	owed  time.Time     // when what was read may pass; guarded by turn

	mu       sync.Mutex
	deadline time.Time // zero: none
	closed   bool
}

func (s *side) init(buckets []*Bucket) {
	s.changed = make(chan struct{}, 1)
	s.turn = make(chan struct{}, 1)
	for _, b := range buckets {
		if b == nil {
			continue
		}
		if len(s.buckets) == 0 || b.piece() < s.piece {
			s.piece = b.piece()
		}
		s.buckets = append(s.buckets, b)
	}
}

// take takes n tokens, or gives them back, and returns when the bytes may pass.
func (s *side) take(n int) time.Time {
	var wait time.Duration
	for _, b := range s.buckets {
		wait = max(wait, b.Take(n))
	}
	return time.Now().Add(wait)
}

// wait waits until then. The caller has the turn.
func (s *side) wait(then time.Time) error {
	if time.Until(then) > 0 {
		s.waits.Store(true)
		defer s.waits.Store(false)
	}
	for {
		left := time.Until(then)
		if left <= 0 {
			return nil
		}
		s.mu.Lock()
		deadline, closed := s.deadline, s.closed
		s.mu.Unlock()
		if closed {
			return net.ErrClosed
		}
		if !deadline.IsZero() {
			left = min(left, time.Until(deadline))
			if left <= 0 {
				return os.ErrDeadlineExceeded
			}
		}
		timer := time.NewTimer(left)
		select {
		case <-timer.C:
		case <-s.changed:
			timer.Stop()
		}
	}
}

// change wakes the call that waits, if there is one.
func (s *side) change() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

func (c *conn) Read(p []byte) (int, error) {
	s := &c.reads
	if len(s.buckets) == 0 || len(p) == 0 {
		return c.Conn.Read(p)
	}
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	if err := s.wait(s.owed); err != nil {
		return 0, err
	}
	n, err := c.Conn.Read(p[:min(len(p), s.piece)])
	if n > 0 {
		s.owed = s.take(n)
		s.wait(s.owed) // if it is cut short, the next Read says so
	}
	return n, err
}

// Write takes its tokens before it writes, and gives back those for what it could not
// write: nobody is to wait for bytes that will not pass.
func (c *conn) Write(p []byte) (n int, err error) {
	s := &c.writes
	if len(s.buckets) == 0 || len(p) == 0 {
		return c.Conn.Write(p)
	}
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	for n < len(p) && err == nil {
		piece := p[n:]
		piece = piece[:min(len(piece), s.piece)]
		m := 0
		if err = s.wait(s.take(len(piece))); err == nil {
			m, err = c.Conn.Write(piece)
		}
		n += m
		if m < len(piece) {
			s.take(m - len(piece))
		}
	}
	return n, err
}

func (c *conn) Close() error {
	for _, s := range []*side{&c.reads, &c.writes} {
		s.mu.Lock()
		s.closed = true
		s.mu.Unlock()
		s.change()
	}
	return c.Conn.Close()
}

func (c *conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

func (c *conn) SetReadDeadline(t time.Time) error {
	return c.reads.setDeadline(t, c.Conn.SetReadDeadline)
}

func (c *conn) SetWriteDeadline(t time.Time) error {
	return c.writes.setDeadline(t, c.Conn.SetWriteDeadline)
}

// setDeadline sets the deadline of the side and of the conn below it, both under the
// lock, so that they stay the same.
func (s *side) setDeadline(t time.Time, below func(time.Time) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := below(t); err != nil {
		return err
	}
	s.deadline = t
	s.change()
	return nil
}
