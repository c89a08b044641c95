// Package link has long links on loopback: a proxy for TCP that carries bytes both ways
// with a delay and at a limited rate, which all conns through a link share, so that it is
// their one bottleneck.
//
// TCP itself sees no delay: both of its connections end at the link. A conn through it is
// thus what TCP would be with windows that are large enough from the start, without loss
// and without slow start, and its queue is short and fair: each conn has about a
// millisecond's bytes in it. What is slower than that is so by its own windows, and what
// waits for longer does so in its own queues: the sender's socket, too, may hold megabytes
// in front of a link, here as elsewhere.
package link

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

const (
	// ahead is how far beyond the present the line may be booked out, or else a reader
	// that sleeps for the shortest time there is would leave it idle.
	ahead = time.Millisecond
	// behind is how much of the line's time a reader that overslept may still use.
	behind = 5 * time.Millisecond
	// beyond is what a direction of a conn holds more than is in flight at most.
	beyond = 64 << 10
)

// A Link is a line in both directions. Conns that share a Link share its rate.
type Link struct {
	delay    time.Duration // one way
	chunk    int           // bytes, at most, of one turn of a conn
	limit    int           // bytes that a direction of a conn holds
	buffer   int           // of the sockets towards the line
	up, down pacer
	chunks   sync.Pool
}

// New returns a link of that round-trip time and of so many bits per second in each
// direction.
func New(rtt time.Duration, bitsPerSecond int) *Link {
	perSecond := bitsPerSecond / 8
	l := &Link{
		delay:  rtt / 2,
		chunk:  min(max(perSecond/4000, 1500), 64<<10),
		limit:  int(rtt.Seconds()*float64(perSecond)) + beyond,
		buffer: min(max(perSecond/500, 64<<10), 256<<10),
		up:     pacer{perSecond: perSecond},
		down:   pacer{perSecond: perSecond},
	}
	l.chunks.New = func() any { b := make([]byte, l.chunk); return &b }
	return l
}

// A Conn is what a link joins.
type Conn interface {
	net.Conn
	CloseWrite() error
	SetLinger(sec int) error
}

// Carry carries bytes both ways until both have ended, and closes both conns. Ends and
// resets are passed on like bytes. A receiver that does not take what arrives holds its
// sender up, once what is between them fills the line and 64 KiB more; what the sender
// does then, a reset too, is seen when there is room again.
func (l *Link) Carry(near, far Conn) {
	defer near.Close()
	defer far.Close()
	var wg sync.WaitGroup
	l.start(&wg, &l.up, near, far)
	l.start(&wg, &l.down, far, near)
	wg.Wait()
}

func (l *Link) start(wg *sync.WaitGroup, p *pacer, src, dst Conn) {
	f := &flow{l: l, pacer: p, src: src, dst: dst}
	f.changed.L = &f.mu
	wg.Go(f.feed)
	wg.Go(f.deliver)
}

// A flow is one direction of a conn. The goroutine of feed puts in what that of deliver
// takes out.
type flow struct {
	l        *Link
	pacer    *pacer
	src, dst Conn

	mu      sync.Mutex
	changed sync.Cond
	way     []parcel // what is under way, in order
	held    int      // bytes that are, or that dst does not take
	broken  bool     // nobody delivers any more
}

// A parcel is bytes or, without any, the end of them.
type parcel struct {
	bytes  []byte
	chunk  *[]byte // that bytes are in, to be reused
	reset  bool    // how they end
	arrive time.Time
}

func (f *flow) feed() {
	for f.awaitRoom() {
		chunk := f.l.chunks.Get().(*[]byte)
		n, err := f.src.Read(*chunk)
		if n > 0 {
			sent := f.pacer.take(n)
			p := parcel{bytes: (*chunk)[:n], chunk: chunk, arrive: sent.Add(f.l.delay)}
			if n < len(*chunk)/4 { // many small ones must not hold many chunks
				p.bytes, p.chunk = append([]byte(nil), p.bytes...), nil
				f.l.chunks.Put(chunk)
			}
			f.put(p)
			time.Sleep(time.Until(sent) - ahead)
		}
		if err != nil {
			end := parcel{reset: !errors.Is(err, io.EOF), arrive: time.Now().Add(f.l.delay)}
			f.put(end)
			if end.reset { // does not wait behind what dst does not take
				time.Sleep(time.Until(end.arrive))
				reset(f.dst)
			}
			return
		}
	}
}

func (f *flow) deliver() {
	for {
		p := f.next()
		time.Sleep(time.Until(p.arrive))
		if p.bytes == nil {
			if p.reset {
				reset(f.dst)
			} else {
				f.dst.CloseWrite()
			}
			return
		}
		if _, err := f.dst.Write(p.bytes); err != nil {
			time.Sleep(f.l.delay) // of the news
			reset(f.src)
			f.stop()
			return
		}
		f.taken(p)
	}
}

// awaitRoom waits until the flow may hold more. It returns false if that is no use.
func (f *flow) awaitRoom() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.held >= f.l.limit && !f.broken {
		f.changed.Wait()
	}
	return !f.broken
}

func (f *flow) put(p parcel) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.way = append(f.way, p)
	f.held += len(p.bytes)
	f.changed.Broadcast()
}

func (f *flow) next() parcel {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.way) == 0 {
		f.changed.Wait()
	}
	p := f.way[0]
	f.way[0] = parcel{}
	f.way = f.way[1:]
	return p
}

func (f *flow) taken(p parcel) {
	if p.chunk != nil {
		f.l.chunks.Put(p.chunk)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held -= len(p.bytes)
	f.changed.Broadcast()
}

func (f *flow) stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.broken = true
	f.changed.Broadcast()
}

func reset(c Conn) {
	c.SetLinger(0)
	c.Close()
}

// A pacer shares out the time of one direction of a line.
type pacer struct {
	perSecond int // bytes

	mu   sync.Mutex
	free time.Time // when the line is done with all that it was given
}

// take gives n bytes to the line and returns when it has sent them. It counts in points
// in time, not in lengths of sleep: what a sleep takes too long is made up for.
func (p *pacer) take(n int) (sent time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if earliest := now.Add(-behind); p.free.Before(earliest) {
		p.free = earliest
	}
	p.free = p.free.Add(time.Duration(n) * time.Second / time.Duration(p.perSecond))
	if p.free.Before(now) {
		return now
	}
	return p.free
}
