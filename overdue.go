package relay

import (
	"net"
	"time"

	"github.com/tcprelay/relay/internal/dedicated"
	"github.com/tcprelay/relay/internal/socket"
	"github.com/tcprelay/relay/internal/throttle"
)

// startSweeping looks after the clients' times, if there are any, until the service
// is closed and the last client has left.
func (svc *service) startSweeping() {
	every := svc.limits.sweepEvery()
	if every == 0 {
		return
	}
	svc.mu.Lock()
	defer svc.mu.Unlock()
	svc.sweeper = time.AfterFunc(every, func() { svc.sweep(every) })
}

func (svc *service) sweep(every time.Duration) {
	now := time.Now()
	var overdue []carrier
	var conns []net.Conn
	svc.mu.Lock()
	for c := range svc.clients {
		if c.st == nil || c.cut != "" {
			continue
		}
		if c.cut = c.overdue(now); c.cut != "" || c.unseenReset() {
			overdue = append(overdue, c.st)
			conns = append(conns, c.conn)
		}
	}
	if !svc.closed || len(svc.clients) > 0 {
		svc.sweeper.Reset(every)
	}
	svc.mu.Unlock()
	for i, st := range overdue {
		hangUp(conns[i])
		st.SetLinger(0)
		st.Close()
	}
}

// unseenReset reports that the app has reset a client whose bytes nobody reads any more,
// because the client takes none. A stream tells that by itself.
func (c *client) unseenReset() bool {
	d, ok := c.st.(*dedicated.Conn)
	return ok && c.last.Unread > 0 && d.Reset()
}

// overdue returns the time limit that a client is over.
func (c *client) overdue(now time.Time) (kind string) {
	p := c.st.Progress()
	if p.Sent != c.last.Sent || p.Received != c.last.Received || p.HalfClosed != c.last.HalfClosed {
		c.movedAt = now
	}
	if p.Unread == 0 || c.last.Unread == 0 || p.Received != c.last.Received {
		c.tookAt = now
	}
	c.last = p
	if c.gauge != nil {
		if took := c.gauge.Took(); took != c.took {
			c.took, c.tookAt, c.movedAt = took, now, now
		}
	}
	// Who waits for its rate is not idle, and may have much to take.
	reads, writes := throttle.Waits(c.conn)
	if reads || writes {
		c.movedAt = now
	}
	if writes {
		c.tookAt = now
	}
	// The system takes much for a slow client at once, and then nothing for long.
	if p.Unread > 0 {
		if n, ok := socket.Unacked(c.raw); ok {
			if n < c.queued {
				c.tookAt, c.movedAt = now, now
			}
			c.queued = n
		}
	}
	over := func(since time.Time, d time.Duration) bool { return d > 0 && now.Sub(since) >= d }
	limits := &c.svc.limits
	switch {
	case over(c.tookAt, limits.StallTime):
		return kindStalled
	case p.HalfClosed && over(c.movedAt, limits.LingerTime):
		return kindLingered
	case over(c.movedAt, limits.IdleTime):
		return kindIdle
	}
	return ""
}
